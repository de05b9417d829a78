"""Elementwise methods as methods of a module: on the products ΔW, or on the factors A and B apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.layer import Layer

# Parameters that say what is done before or after the entries are merged.
NOT_OF_ENTRIES = ("space", "lambda", "truncate")


def elementwise(merge: Callable[..., mx.array]) -> Callable[[Layer], Factors | mx.array]:
    """The method that runs ``merge(deltas, weights, key, **parameters)`` in the space that ``space`` names.

    In product space the updates are formed one by one and the dense result is for the caller to truncate. In factor
    space the masks and signs of A are chosen apart from those of B (not the same as on the products).
    ``lambda`` multiplies the merged update once.
    """

    def method(layer: Layer) -> Factors | mx.array:
        options: dict[str, Any] = {
            name: value for name, value in layer.parameters.items() if name not in NOT_OF_ENTRIES
        }
        factor = layer.parameters["lambda"]
        if layer.parameters["space"] == "product":
            return factor * merge(layer.dense_updates, layer.weights, layer.key, **options)
        key_a, key_b = mx.random.split(layer.key)
        a = merge([update.a for update in layer.factors], layer.weights, key_a, **options)
        return Factors(a, factor * merge([update.b for update in layer.factors], layer.weights, key_b, **options))

    return method
