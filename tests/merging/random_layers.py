"""Random updates, and the layer that a merge method sees of them, for tests of methods that read factors alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.layer import Layer


def random_updates(
    seed: int, inputs: int, outputs: int, ranks: Sequence[int], sizes: Sequence[float] = ()
) -> list[Factors]:
    """One update for each rank, (inputs, rank) times (rank, outputs), normal entries; those of b times its size."""
    rng = np.random.default_rng(seed)
    return [
        Factors(
            mx.array(rng.standard_normal((inputs, rank)).astype(np.float32)),
            mx.array((size * rng.standard_normal((rank, outputs))).astype(np.float32)),
        )
        for rank, size in zip(ranks, sizes or (1.0,) * len(ranks), strict=True)
    ]


def layers_with(defaults: Mapping[str, Any]) -> Callable[..., Layer]:
    """What makes a layer of updates: all scales and, unless given, weights 1, a method's ``defaults`` as parameters."""

    def layer_of(
        factors: Sequence[Factors], weights: Sequence[float] | None = None, key: int = 3, **parameters: Any
    ) -> Layer:
        count = len(factors)
        settled = {**defaults, **parameters}
        given = tuple(weights or (1.0,) * count)
        return Layer("layer", tuple(factors), (1.0,) * count, given, mx.random.key(key), parameters=settled)

    return layer_of
