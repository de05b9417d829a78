"""The plain weighted mean, the baseline of every other method."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_rsgwm.adapter import Adapter
from mlx_rsgwm.merging.options import MergeOptions


def linear(adapters: Sequence[Adapter], options: MergeOptions) -> dict[str, mx.array]:
    """Weighted mean of the factors, weights normalised to sum 1. Only ``weights`` is used.

    Mean factors are not the mean of the products: for adapters that do not share their initialisation the difference
    is large (SPEC 6.13), which is why the caller refuses those.
    """
    weights = options.weights or (1.0,) * len(adapters)
    total = sum(weights)
    return {
        name: sum(
            (
                adapter.weights[name].astype(mx.float32) * (w / total)
                for adapter, w in zip(adapters, weights, strict=True)
            ),
            mx.zeros(value.shape),
        )
        for name, value in adapters[0].weights.items()
    }
