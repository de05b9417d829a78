"""Norms and inner products of low-rank products, without forming them.

A module's update is ΔW = scale · A B with A (in, r) and B (r, out); ⟨A₁B₁, A₂B₂⟩ = sum((A₁ᵀA₂) ⊙ (B₁B₂ᵀ)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_rsgwm.adapter import Adapter
from mlx_rsgwm.errors import RsgwmError

COLLAPSE_SHARE = 0.01


def inner_product(a1: mx.array, b1: mx.array, a2: mx.array, b2: mx.array) -> mx.array:
    """⟨A₁B₁, A₂B₂⟩, a float32 scalar."""
    a1, b1, a2, b2 = (x.astype(mx.float32) for x in (a1, b1, a2, b2))
    return ((a1.T @ a2) * (b1 @ b2.T)).sum()


def gram(factors: Sequence[tuple[mx.array, mx.array]]) -> mx.array:
    """(n, n) matrix of inner products between n products of one module."""
    return mx.stack([mx.stack([inner_product(*first, *second) for second in factors]) for first in factors])


def diagnose(sources: Sequence[Adapter], merged: Adapter) -> dict[str, Any]:
    """What a merge did to ΔW, per module and over all: norm against the sources' mean norm, cosine to each source.

    Raises:
        RsgwmError: when a module's product falls below 1 % of its sources' mean norm (SPEC 6.14): such a merge
            silently is the base model.
    """
    grams = {}
    for module in merged.modules():
        pairs = []
        for adapter in (merged, *sources):
            a, b = (adapter.weights[f"{module}.{leaf}"] for leaf in ("lora_a", "lora_b"))
            pairs.append((a, b * adapter.spec.scale))
        grams[module] = gram(pairs)
    mx.eval(grams)
    per_module = {module: _summary(value) for module, value in grams.items()}
    overall = _summary(sum(grams.values(), mx.array(0.0)))
    dead = {module: row["norm_share"] for module, row in per_module.items() if row["norm_share"] < COLLAPSE_SHARE}
    if dead:
        module, share = min(dead.items(), key=lambda item: item[1])
        raise RsgwmError(
            f"the merge collapses in {len(dead)} of {len(per_module)} modules ({module}: the product keeps {share:.2%} "
            "of the sources' mean norm); use the quantile scope 'tensor', the reference 'init' or a lower tau"
        )
    return {"overall": overall, "modules": per_module}


def _summary(products: mx.array) -> dict[str, Any]:
    values: Any = products.tolist()
    norms = [max(values[index][index], 0.0) ** 0.5 for index in range(len(values))]
    mean = sum(norms[1:]) / (len(norms) - 1)
    cosines = [
        values[0][index] / (norms[0] * norms[index]) if norms[0] and norms[index] else 0.0
        for index in range(1, len(norms))
    ]
    return {
        "norm": norms[0],
        "source_norms": norms[1:],
        "norm_share": norms[0] / mean if mean else 0.0,
        "cosines": cosines,
    }


def mean_product_cosine(sources: Sequence[Adapter], weights: Mapping[str, mx.array], scale: float) -> float:
    """Cosine, over all modules, between a merged ΔW and the mean of the sources' ΔW."""
    dot = merged_square = mean_square = mx.array(0.0)
    for module, _, _ in sources[0].factors():
        a, b = weights[f"{module}.lora_a"], weights[f"{module}.lora_b"] * scale
        factors = [
            (s.weights[f"{module}.lora_a"], s.weights[f"{module}.lora_b"] * (s.spec.scale / len(sources)))
            for s in sources
        ]
        dot = dot + sum((inner_product(a, b, *pair) for pair in factors), mx.array(0.0))
        merged_square = merged_square + inner_product(a, b, a, b)
        mean_square = mean_square + gram(factors).sum()
    norm = mx.sqrt(merged_square * mean_square)
    cosine: Any = (dot / mx.maximum(norm, 1e-30)).item()
    return float(cosine)
