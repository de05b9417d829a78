"""Methods whose result is a combination Σ c_t ΔW_t: all that differs is how the coefficients come about.

The coefficients follow from the (T, T) inner products of the updates alone, so nothing dense is ever formed and the
result is exact up to the output rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.merging.lowrank import cross, gram, stack
from mlx_rsgwm.merging.module import Factors, Module
from mlx_rsgwm.merging.pool import Pool

Coefficients = Callable[[Module], mx.array]

TINY = 1e-30


def combination(coefficients: Coefficients) -> Callable[[Module], Factors]:
    """The method Σ_t c_t ΔW_t with these (T,) coefficients, as stacked factors of rank Σ r_t."""

    def method(module: Module) -> Factors:
        found = coefficients(module)
        module.notes["coefficients"] = found
        return stack(module.factors, found)

    return method


def linear(module: Module) -> Factors:
    """Weighted mean of the products, or with ``space`` factor of the factors.

    Mean factors are not the mean of the products: for adapters that do not share their initialisation the difference
    is large (SPEC 6.13).
    """
    if module.parameters["space"] == "product":
        return combination(weighted_mean)(module)
    shares = weighted_mean(module)
    a, b = (
        sum((getattr(one, leaf) * shares[index] for index, one in enumerate(module.factors)), mx.array(0.0))
        for leaf in ("a", "b")
    )
    return Factors(a, b)


def weighted_mean(module: Module) -> mx.array:
    """c_t = w_t / Σ w: the mean of the products, which PEFT's factor-space ``linear`` is not (SPEC 5)."""
    weights = mx.array(module.weights)
    return weights / weights.sum()


def weighted_sum(module: Module) -> mx.array:
    """c_t = λ w_t: task arithmetic (Ilharco et al., 2023); ``lambda`` scales the sum."""
    return module.parameters["lambda"] * mx.array(module.weights)


def survey_norms(pool: Pool, parameters: Mapping[str, Any]) -> mx.array:
    """‖·‖_F of every adapter over all its modules, (T,)."""
    squares = mx.zeros((len(pool.sources),))
    for _, factors in pool.updates():
        squares = squares + mx.stack([cross(one, one) for one in factors])
        mx.eval(squares)
    return mx.sqrt(squares)


def norm_equalised(module: Module) -> mx.array:
    """Unequal adapters made equal, by one of two definitions (SPEC 1.4).

    ``definition`` global: c_t ∝ w_t / F_t with F_t the adapter's norm over all modules, Σ c = 1 (Study 16: for two,
    F_b / (F_a + F_b)); geometric: every module's update is scaled to the module's geometric-mean norm, then averaged.
    """
    weights = mx.array(module.weights)
    if module.parameters["definition"] == "global":
        inverse = weights / mx.maximum(module.survey, TINY)
        return inverse / inverse.sum()
    norms = _norms(module)
    return weights / weights.sum() * mx.exp(mx.log(norms).mean()) / norms


def slerp(module: Module) -> mx.array:
    """Spherical interpolation of two updates by the angle between them (mergekit ``slerp``; Shoemake, 1985).

    t = w_2 / (w_1 + w_2); c = (sin((1−t)θ), sin(tθ)) / sin θ. Nearly parallel updates (|cos θ| > .9995) are
    interpolated linearly, as mergekit does.
    """
    products = gram(module.factors)
    norms = mx.sqrt(mx.maximum(mx.diag(products), TINY))
    cosine = mx.clip(products[0, 1] / (norms[0] * norms[1]), -1.0, 1.0)
    weights = mx.array(module.weights)
    t = weights[1] / weights.sum()
    theta = mx.arccos(cosine)
    ends = mx.stack([mx.sin((1 - t) * theta), mx.sin(t * theta)]) / mx.maximum(mx.sin(theta), TINY)
    return mx.where(mx.abs(cosine) > 0.9995, mx.stack([1 - t, t]), ends)


def multislerp(module: Module) -> mx.array:
    """Spherical mean of several updates in the tangent space at their weighted mean (mergekit ``karcher``'s).

    mergekit's own ``multislerp`` leaves out θ / sin θ, so that its tangent vectors cancel and it returns the start.

    Directions are taken to the tangent space at the normalised weighted mean direction, averaged there, and taken
    back; the length is the weighted mean of the lengths.
    """
    directions, norms, weights = _directions(module)
    start = _unit(weights, directions)
    return _back_to_length(_step(start, directions, weights)[0], norms, weights)


def karcher(module: Module) -> mx.array:
    """Riemannian (Karcher) mean of the updates' directions on the sphere, at their weighted mean length.

    The fixed point of :func:`multislerp`'s step (mergekit ``karcher``): at most ``iterations`` steps, fewer when a step
    is shorter than 1e-6.
    """
    directions, norms, weights = _directions(module)
    mean = _unit(weights, directions)
    for _ in range(module.parameters["iterations"]):
        mean, length = _step(mean, directions, weights)
        if bool((length < 1e-6).item()):  # a handful of scalars: waiting for them costs less than the steps saved
            break
    return _back_to_length(mean, norms, weights)


def model_stock(module: Module) -> mx.array:
    """t · mean with t = T cos θ / (1 + (T − 1) cos θ), cos θ the mean cosine of all pairs (Jang et al., 2024).

    As mergekit's ``model_stock``, per module; weights are not used. Orthogonal updates give t near 0: such a merge is
    refused as collapsed, not silently dead.
    """
    products = gram(module.factors)
    count = len(module.factors)
    norms = mx.sqrt(mx.maximum(mx.diag(products), TINY))
    cosines = products / (norms[:, None] * norms[None, :])
    mean = (cosines.sum() - mx.diag(cosines).sum()) / (count * (count - 1))
    ratio = count * mean / (1 + (count - 1) * mean)
    module.notes["model_stock_t"] = ratio
    return mx.broadcast_to(ratio / count, (count,))


def two_adapters(pool: Pool, parameters: Mapping[str, Any]) -> None:
    """The survey of a method for exactly two adapters."""
    if len(pool.sources) != 2:
        raise RsgwmError(f"slerp merges exactly two adapters, found {len(pool.sources)}; use multislerp or karcher")


def _norms(module: Module) -> mx.array:
    return mx.maximum(mx.sqrt(mx.stack([cross(one, one) for one in module.factors])), TINY)


def _directions(module: Module) -> tuple[mx.array, mx.array, mx.array]:
    # A vector on the sphere is kept as its coefficients on the unit updates; their Gram matrix gives all products.
    products = gram(module.factors)
    norms = mx.sqrt(mx.maximum(mx.diag(products), TINY))
    weights = mx.array(module.weights)
    return products / (norms[:, None] * norms[None, :]), norms, weights / weights.sum()


def _unit(coefficients: mx.array, cosines: mx.array) -> mx.array:
    return coefficients / mx.sqrt(mx.maximum(coefficients @ cosines @ coefficients, TINY))


def _step(mean: mx.array, cosines: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """The weighted mean of the logarithms of all directions at ``mean``, and the exponential of it; and its length."""
    inner = mx.clip(cosines @ mean, -1.0, 1.0)
    theta = mx.arccos(inner)
    share = mx.where(theta < 1e-6, 1.0, theta / mx.maximum(mx.sin(theta), TINY)) * weights
    tangent = share - (share * inner).sum() * mean
    length = mx.sqrt(mx.maximum(tangent @ cosines @ tangent, 0.0))
    moved = mx.cos(length) * mean + mx.sin(length) * tangent / mx.maximum(length, TINY)
    return _unit(moved, cosines), length


def _back_to_length(mean: mx.array, norms: mx.array, weights: mx.array) -> mx.array:
    return mean / norms * (weights * norms).sum()
