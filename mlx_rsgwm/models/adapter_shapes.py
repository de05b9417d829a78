"""Whether an adapter's arrays fit each other: names, shapes, ranks and types; no value is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_rsgwm.models.token_layers import is_embedding

if TYPE_CHECKING:
    from mlx_rsgwm.models.adapter import Adapter

FULL_LEAVES = ("weight", "bias")


def factor_problems(adapter: Adapter) -> list[str]:
    """What is wrong with the factors of its modules."""
    problems = []
    for module in adapter.modules():
        a, b = adapter.weights.get(f"{module}.lora_a"), adapter.weights.get(f"{module}.lora_b")
        if a is None or b is None:
            problems.append(f"{module} has no lora_{'a' if a is None else 'b'}")
        elif a.ndim == 2 and b.ndim == 2:
            if a.shape[1] != adapter.spec.rank or b.shape[0] != adapter.spec.rank:
                problems.append(f"{module}: lora_a {a.shape} and lora_b {b.shape} do not have rank {adapter.spec.rank}")
        elif a.ndim == 3 and b.ndim == 3:
            if a.shape[1] != adapter.spec.rank or b.shape[2] != adapter.spec.rank or a.shape[0] != b.shape[0]:
                problems.append(f"{module}: lora_a {a.shape} and lora_b {b.shape} do not have rank {adapter.spec.rank}")
        else:
            problems.append(f"{module}: lora_a has shape {a.shape} and lora_b {b.shape}")
        if adapter.spec.fine_tune_type == "dora" and f"{module}.m" not in adapter.weights:
            problems.append(f"{module} has no magnitude m")
        m = adapter.weights.get(f"{module}.m")
        if m is not None and b is not None and not is_embedding(module) and m.shape != (b.shape[-1],):
            problems.append(f"{module}: m has shape {m.shape}, and lora_b {b.shape}")
    return problems


def array_problems(adapter: Adapter) -> list[str]:
    """What is wrong with the names and types of its arrays, and with what stands beside the weights."""
    problems = []
    leaves = {"lora_a", "lora_b"} | ({"m"} if adapter.spec.fine_tune_type == "dora" else set())
    problems += [f"unknown array {name}" for name in adapter.weights if name.rpartition(".")[2] not in leaves]
    if not adapter.spec.is_full:
        problems += [f"unknown array {name}" for name in adapter.full if name.rpartition(".")[2] not in FULL_LEAVES]
    for group in (adapter.weights, adapter.importance, adapter.init):
        kinds = {name: value.dtype for name, value in group.items()}
        wrong = {name: kind for name, kind in kinds.items() if not mx.issubdtype(kind, mx.floating)}
        problems += [f"{name} has the type {str(kind).rpartition('.')[2]}" for name, kind in wrong.items()]
    if not adapter.weights and not adapter.full:
        problems.append("holds no arrays")
    for name, value in adapter.importance.items():
        signal, _, parameter = name.partition("/")
        weight = adapter.weights.get(parameter)
        if not signal.isidentifier() or weight is None or weight.shape != value.shape:
            problems.append(f"importance {name} {value.shape} has no weight of its shape")
    for name, value in adapter.init.items():
        if name not in adapter.weights or adapter.weights[name].shape != value.shape:
            problems.append(f"init {name} {value.shape} has no weight of its shape")
    return problems
