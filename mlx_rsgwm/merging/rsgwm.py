"""Role-Specific Gradient-Weighted Merging in factor space (SPEC 6 and 8)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_rsgwm.adapter import Adapter
from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.merging.masks import masked_weighted_mean, normalised, quantile_masks
from mlx_rsgwm.merging.options import MergeOptions


def rsgwm(adapters: Sequence[Adapter], options: MergeOptions) -> dict[str, mx.array]:
    """Merged factors θ = θ_ref + Σ_t w_t s_t m_t (θ_t − θ_ref) / (Σ_t w_t s_t m_t + ε), per entry of A and B.

    With ``reference=init`` an entry of A that every mask drops falls back to the shared initialisation instead of
    zero, which keeps B·A alive (SPEC 6.14). ``weights`` multiply the importances.
    """
    signal = options.role if options.signal == "per_role" else "all"
    weights = options.weights or (1.0,) * len(adapters)
    importances, masks = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        recorded = adapter.importance_of(signal)
        if not recorded:
            raise RsgwmError(
                f"{adapter.where} has no importance for {signal!r}; train it here with {signal} rows, or merge with "
                "--signal shared or --method linear"
            )
        masks.append(quantile_masks(recorded, options.quantile, options.scope))
        scaled = normalised(recorded, options.normalise)
        importances.append({name: s * weight for name, s in scaled.items()})
    merged = {}
    for name in adapters[0].weights:
        reference = adapters[0].init.get(name) if options.reference == "init" else None
        zero = mx.zeros(adapters[0].weights[name].shape)
        origin = zero if reference is None else reference.astype(mx.float32)
        deltas = [adapter.weights[name].astype(mx.float32) - origin for adapter in adapters]
        merged[name] = origin + masked_weighted_mean(
            deltas, [s[name] for s in importances], [m[name] for m in masks], options.epsilon
        )
    return merged
