"""LoRA on layers of experts: mlx-lm's three stacked projections, PEFT's stacked parameters, or one layer an expert.

mlx-lm: ``switch_mlp.gate_proj`` and so on, ``lora_a`` (experts, rank, in), ``lora_b`` (experts, out, rank). PEFT on
transformers 5 targets the parameters ``experts.gate_up_proj`` and ``experts.down_proj`` with ``lora_A`` (experts ·
rank, in), rank by rank inside an expert, and ``lora_B`` (out, rank · experts), expert by expert inside a rank
(``ParamWrapper.get_delta_factors``). Gate and up share one pair there; two pairs of mlx-lm become one of twice the
rank, with zeros where they do not meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

GATE_UP = ("gate_proj", "up_proj")
Pair = tuple[mx.array, mx.array]


def split_experts(a: mx.array, b: mx.array, rank: int) -> Pair:
    """PEFT's pair for a stacked parameter as ``lora_a`` (experts, rank, in), ``lora_b`` (experts, out, rank)."""
    experts = a.shape[0] // rank
    return a.reshape(experts, rank, a.shape[1]), b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1)


def stack_experts(a: mx.array, b: mx.array) -> Pair:
    """The reverse of :func:`split_experts`: PEFT's pair, (experts · rank, in) and (out, rank · experts)."""
    experts, rank, inputs = a.shape
    return a.reshape(experts * rank, inputs), b.transpose(1, 2, 0).reshape(b.shape[1], rank * experts)


def split_gate_up(a: mx.array, b: mx.array, joined: Sequence[str] = ()) -> dict[str, Pair]:
    """Gate's and up's pairs from the one of the parameter that holds both, gate first: ``b`` (experts, out, rank).

    Both get ``a`` whole. Where ``joined`` says that :func:`join_gate_up` made the pair, its blocks come back.
    """
    half = b.shape[1] // 2
    halves = {"gate_proj": b[:, :half], "up_proj": b[:, half:]}
    if not joined:
        return {name: (a, half_b) for name, half_b in halves.items()}
    rank = a.shape[1] // len(joined)
    blocks = {name: slice(i * rank, (i + 1) * rank) for i, name in enumerate(joined)}
    return {name: (a[:, block], halves[name][:, :, block]) for name, block in blocks.items()}


def join_gate_up(pairs: Mapping[str, Pair]) -> Pair:
    """One pair for the parameter that holds gate and up, from those of one of them or of both.

    Pairs as of :func:`split_experts`; the result's ranks and outputs are those of its parts one after another.
    """
    names = [name for name in GATE_UP if name in pairs]
    a = mx.concatenate([pairs[name][0] for name in names], axis=1)
    rows = []
    for name in GATE_UP:
        blocks = [pairs[part][1] if part == name else mx.zeros_like(pairs[part][1]) for part in names]
        rows.append(mx.concatenate(blocks, axis=2))
    return a, mx.concatenate(rows, axis=1)


def parameter_names(config: Mapping[str, Any], experts: str) -> list[str]:
    """Which of the two stacked parameters of the module ``experts`` PEFT wraps, the inner wrapper first."""
    targets = config.get("target_parameters") or ()
    return [
        name
        for name in ("gate_up_proj", "down_proj")
        if any(f"{experts}.{name}" == target or f"{experts}.{name}".endswith("." + target) for target in targets)
    ]
