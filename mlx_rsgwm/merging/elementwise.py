"""Elementwise methods as methods of a module: on the products ΔW, or on the factors A and B apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_rsgwm.merging.module import Factors, Module


def elementwise(merge: Callable[..., mx.array]) -> Callable[[Module], Factors | mx.array]:
    """The method that runs ``merge(deltas, weights, key, **parameters)`` in the space that ``space`` names.

    In product space the updates are formed one by one and the dense result is for the caller to truncate. In factor
    space the masks and signs of A are chosen apart from those of B (not the same as on the products).
    ``lambda`` multiplies the merged update once.
    """

    def method(module: Module) -> Factors | mx.array:
        own: dict[str, Any] = {
            name: value for name, value in module.parameters.items() if name not in ("space", "lambda")
        }
        factor = module.parameters["lambda"]
        if module.parameters["space"] == "product":
            return factor * merge(module.dense_updates, module.weights, module.key, **own)
        key_a, key_b = mx.random.split(module.key)
        a = merge([one.a for one in module.factors], module.weights, key_a, **own)
        return Factors(a, factor * merge([one.b for one in module.factors], module.weights, key_b, **own))

    return method
