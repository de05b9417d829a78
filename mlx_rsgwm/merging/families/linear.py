"""Methods whose result is a combination Σ c_t ΔW_t: all that differs is how the coefficients come about.

The coefficients follow from the (T, T) inner products of the updates alone, so nothing dense is ever formed and the
result is exact up to the output rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.linalg.lowrank import Factors, cross, inner_products, stack
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.merging.weights import CANCELLING, shares

Coefficients = Callable[[Layer], mx.array]

# Updates whose squared norm is below this have no direction in float32: they count as missing.
SMALLEST_SQUARE = 1e-34
# A mean direction shorter than this, of directions of length 1, is mostly rounding.
SHORTEST_MEAN = 1e-2
# Below this mean cosine updates oppose one another; between it and 0 they are orthogonal but for chance.
DISAGREEING = -0.1
# Below this cosine two directions are opposite: no great circle between them is shorter than the others.
OPPOSITE = -0.9995


def combination(coefficients: Coefficients) -> Callable[[Layer], Factors]:
    """The method Σ_t c_t ΔW_t with these (T,) coefficients, as stacked factors of rank Σ r_t."""

    def method(layer: Layer) -> Factors:
        chosen = coefficients(layer)
        layer.notes["coefficients"] = chosen
        return stack(layer.factors, chosen)

    return method


def linear(layer: Layer) -> Factors:
    """Weighted mean of the products, or with ``space`` factor of the factors.

    Mean factors are not the mean of the products: for adapters that do not share their initialisation the difference
    is large.
    """
    if layer.parameters["space"] == "product":
        return combination(weighted_mean)(layer)
    means = weighted_mean(layer)
    a, b = (
        sum((getattr(update, leaf) * means[index] for index, update in enumerate(layer.factors)), mx.array(0.0))
        for leaf in ("a", "b")
    )
    return Factors(a, b)


def weighted_mean(layer: Layer) -> mx.array:
    """c_t = w_t / Σ w: the mean of the products, which PEFT's factor-space ``linear`` is not."""
    return shares(layer.weights)


def scaled_weights(layer: Layer) -> mx.array:
    """c_t = λ w_t: task arithmetic (Ilharco et al., 2023); ``lambda`` scales the sum."""
    return layer.parameters["lambda"] * mx.array(layer.weights)


def survey_norms(pool: Pool, parameters: Mapping[str, Any]) -> mx.array:
    """‖·‖_F of every adapter over all its modules, (T,).

    Raises:
        RsgwmError: an adapter changes nothing, so that it cannot be brought to the others' norm.
    """
    squares = mx.zeros((len(pool.sources),))
    for _, factors in pool.updates():
        squares = squares + mx.stack([cross(update, update) for update in factors])
        mx.eval(squares)
    values: Any = squares.tolist()
    raise_problems(
        "the pool cannot be brought to one norm",
        [f"{source.label} changes nothing" for source, square in zip(pool.sources, values, strict=True) if square == 0],
    )
    return mx.sqrt(squares)


def norm_equalised(layer: Layer) -> mx.array:
    """Unequal adapters made equal, by one of two definitions.

    ``definition`` global: c_t ∝ w_t / F_t with F_t the adapter's norm over all modules, Σ c = 1 (Study 16: for two,
    F_b / (F_a + F_b)); geometric: every module's update is scaled to the module's geometric-mean norm, then averaged.
    Updates that are zero take no part in the geometric mean.
    """
    if layer.parameters["definition"] == "global":
        weights = mx.array(layer.weights)
        inverse = weights / layer.survey
        total = inverse.sum()
        layer.objections["the weights cancel once they are divided by the adapters' norms"] = (
            mx.abs(total) <= CANCELLING * mx.abs(inverse).sum()
        )
        return inverse / total
    norms, present = _norms(mx.stack([cross(update, update) for update in layer.factors]))
    logarithm = mx.log(norms).mean() * (len(layer.factors) / mx.maximum(present.sum(), 1))  # of a missing one it is 0
    return shares(layer.weights) * mx.exp(logarithm) / norms * present


def slerp(layer: Layer) -> mx.array:
    """Spherical interpolation of two updates by the angle between them (mergekit ``slerp``; Shoemake, 1985).

    t = w_2 / (w_1 + w_2); c = (sin((1−t)θ), sin(tθ)) / sin θ. Nearly parallel updates (|cos θ| > .9995) are
    interpolated linearly, as mergekit does; nearly opposite ones have no arc between them, and are refused.
    """
    products = inner_products(layer.factors)
    norms, _ = _norms(mx.diag(products))
    cosine = mx.clip(products[0, 1] / (norms[0] * norms[1]), -1.0, 1.0)
    layer.objections["the two updates are opposite, and no arc leads from one to the other"] = cosine < OPPOSITE
    t = shares(layer.weights)[1]
    theta = mx.arccos(cosine)
    ends = mx.stack([mx.sin((1 - t) * theta), mx.sin(t * theta)]) / mx.maximum(mx.sin(theta), 1e-30)
    return mx.where(mx.abs(cosine) > 0.9995, mx.stack([1 - t, t]), ends)


def multislerp(layer: Layer) -> mx.array:
    """Spherical mean of several updates in the tangent space at their weighted mean (mergekit ``karcher``'s).

    mergekit's own ``multislerp`` leaves out θ / sin θ, so that its tangent vectors cancel and it returns the start.

    Directions are taken to the tangent space at the normalised weighted mean direction, averaged there, and taken
    back; the length is the weighted mean of the lengths.
    """
    sphere = _sphere(layer)
    return sphere.at_mean_length(_step(sphere.start, sphere)[0])


def karcher(layer: Layer) -> mx.array:
    """Riemannian (Karcher) mean of the updates' directions on the sphere, at their weighted mean length.

    The fixed point of :func:`multislerp`'s step (mergekit ``karcher``): at most ``iterations`` steps, fewer when a step
    is shorter than 1e-6.
    """
    sphere = _sphere(layer)
    mean = sphere.start
    for _ in range(layer.parameters["iterations"]):
        mean, length = _step(mean, sphere)
        if bool((length < 1e-6).item()):  # a handful of scalars: waiting for them costs less than the steps saved
            break
    return sphere.at_mean_length(mean)


def model_stock(layer: Layer) -> mx.array:
    """t · mean with t = T cos θ / (1 + (T − 1) cos θ), cos θ the mean cosine of all pairs (Jang et al., 2024).

    As mergekit's ``model_stock``, per module; weights are not used. Orthogonal updates give t near 0: such a merge is
    refused as collapsed, not silently dead. Updates that oppose one another (mean cosine below -0.1) give a negative t,
    without bound as their mean vanishes: refused too, where mergekit turns the mean round.
    """
    products = inner_products(layer.factors)
    count = len(layer.factors)
    norms, _ = _norms(mx.diag(products))
    cosines = products / (norms[:, None] * norms[None, :])
    mean = (cosines.sum() - mx.diag(cosines).sum()) / (count * (count - 1))
    ratio = count * mean / (1 + (count - 1) * mean)
    layer.notes["model_stock_t"] = ratio
    layer.objections["the updates oppose one another, and the paper's ratio is for those that agree"] = (
        mean < DISAGREEING
    )
    return mx.broadcast_to(ratio / count, (count,))


def two_adapters(pool: Pool, parameters: Mapping[str, Any]) -> None:
    """The survey of a method for exactly two adapters."""
    if len(pool.sources) != 2:
        raise RsgwmError(f"slerp merges exactly two adapters, found {len(pool.sources)}; use multislerp or karcher")


def _norms(squares: mx.array) -> tuple[mx.array, mx.array]:
    """Norms (T,), 1 where an update has no direction, and which have one (bool), of their squares."""
    present = squares > SMALLEST_SQUARE
    return mx.sqrt(mx.where(present, squares, 1.0)), present


@dataclass(frozen=True)
class Sphere:
    """Directions of T updates. A point is kept as its coefficients on them, (T,); ``cosines`` (T, T) give all products.

    ``norms`` of the updates, 1 for one without a direction; ``present`` says which have one. ``weights`` sum to 1.
    """

    cosines: mx.array
    norms: mx.array
    present: mx.array
    weights: mx.array

    @property
    def start(self) -> mx.array:
        """Coefficients (T,) of the direction of the weighted mean."""
        return _unit(self.weights, self.cosines)

    def at_mean_length(self, point: mx.array) -> mx.array:
        """The update's coefficients (T,) of a direction, at the weighted mean of the norms."""
        return point / self.norms * (self.weights * self.norms * self.present).sum() * self.present


def _sphere(layer: Layer) -> Sphere:
    products = inner_products(layer.factors)
    norms, present = _norms(mx.diag(products))
    sphere = Sphere(products / (norms[:, None] * norms[None, :]), norms, present, shares(layer.weights))
    # An adapter that has no update here has no say in whether the others cancel.
    strength = mx.abs(sphere.weights) * present
    short = sphere.weights @ sphere.cosines @ sphere.weights < mx.square(SHORTEST_MEAN * strength.sum())
    layer.objections["the updates cancel, and their mean has no direction"] = short & mx.any(present)
    opposite = (sphere.cosines @ sphere.start < OPPOSITE) & (strength > 0)
    layer.objections["an update is opposite to the mean of all, and no arc leads to it"] = mx.any(opposite)
    return sphere


def _unit(coefficients: mx.array, cosines: mx.array) -> mx.array:
    return coefficients / mx.sqrt(mx.maximum(coefficients @ cosines @ coefficients, 1e-30))


def _step(mean: mx.array, sphere: Sphere) -> tuple[mx.array, mx.array]:
    """The weighted mean of the logarithms of all directions at ``mean``, and the exponential of it; and its length."""
    cosines, weights = sphere.cosines, sphere.weights
    inner = mx.clip(cosines @ mean, -1.0, 1.0)
    theta = mx.arccos(inner)
    share = mx.where(theta < 1e-6, 1.0, theta / mx.maximum(mx.sin(theta), 1e-30)) * weights
    tangent = share - (share * inner).sum() * mean
    length = mx.sqrt(mx.maximum(tangent @ cosines @ tangent, 0.0))
    moved = mx.cos(length) * mean + mx.sin(length) * tangent / mx.maximum(length, 1e-30)
    return _unit(moved, cosines), length
