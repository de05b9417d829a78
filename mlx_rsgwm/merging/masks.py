"""The steps of role-specific gradient-weighted merging: quantiles, masks, the masked weighted mean (SPEC 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

SCOPES = ("tensor", "global")
NORMALISATIONS = ("mean", "none", "rank")


def quantile(values: mx.array, tau: float) -> mx.array:
    """The ``tau``-quantile of all entries, linearly interpolated as ``numpy.quantile`` does; a float32 scalar."""
    ordered = mx.sort(values.astype(mx.float32).reshape(-1))
    position = tau * (ordered.size - 1)
    low = int(position)
    high = min(low + 1, ordered.size - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def quantile_masks(importance: Mapping[str, mx.array], tau: float, scope: str) -> dict[str, mx.array]:
    """m = 1[s ≥ Q_tau(s)] for one task: float32 arrays of the importance's shapes.

    ``scope``: ``tensor`` takes the quantile of every array by itself; ``global`` one over all arrays together, which
    favours lora_b, whose gradients are larger, and may leave nothing of lora_a (SPEC 6.14).
    """
    if scope == "global":
        threshold = quantile(mx.concatenate([s.reshape(-1) for s in importance.values()]), tau)
        return {name: (s >= threshold).astype(mx.float32) for name, s in importance.items()}
    return {name: (s >= quantile(s, tau)).astype(mx.float32) for name, s in importance.items()}


def normalised(importance: Mapping[str, mx.array], how: str) -> dict[str, mx.array]:
    """Importance of one task on a scale that other tasks share (SPEC 6.11: s grows with the task's loss).

    ``mean`` divides by the mean over all entries; ``rank`` replaces every entry by its rank in (0, 1] within its array;
    ``none`` leaves it as recorded.
    """
    if how == "mean":
        total = sum(s.sum() for s in importance.values())
        mean = total / sum(s.size for s in importance.values())
        return {name: s / mx.maximum(mean, 1e-30) for name, s in importance.items()}
    if how == "rank":
        return {name: _ranks(s) for name, s in importance.items()}
    return dict(importance)


def _ranks(values: mx.array) -> mx.array:
    flat = values.reshape(-1)
    order = mx.argsort(mx.argsort(flat))
    return ((order + 1).astype(mx.float32) / flat.size).reshape(values.shape)


def masked_weighted_mean(
    deltas: Sequence[mx.array], importances: Sequence[mx.array], masks: Sequence[mx.array], epsilon: float
) -> mx.array:
    """Δ = Σ s ⊙ m ⊙ Δ_t / (Σ s ⊙ m + ε), entry by entry; where no task keeps an entry the result is 0."""
    numerator = mx.zeros(deltas[0].shape)
    denominator = mx.zeros(deltas[0].shape)
    for delta, importance, mask in zip(deltas, importances, masks, strict=True):
        weight = importance * mask
        numerator = numerator + weight * delta.astype(mx.float32)
        denominator = denominator + weight
    return numerator / (denominator + epsilon)
