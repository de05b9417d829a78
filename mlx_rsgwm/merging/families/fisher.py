"""Fisher-weighted merging (Matena and Raffel, 2022): every entry is averaged with how much its loss depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.rsgwm import product_importance
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.pool import Pool

TINY = 1e-30


@dataclass(frozen=True)
class FisherNorms:
    """Over all modules of each adapter: ``norms``, the L2 norm of its Fisher weights, and their root mean square."""

    norms: mx.array
    roots: mx.array


def survey_fisher(pool: Pool, parameters: Mapping[str, Any]) -> FisherNorms:
    """One pass over the importances, adapter by adapter; both results (T,) float32.

    Raises:
        RsgwmError: an adapter without the importance of ``parameters["signal"]``.
    """
    pool.require_signal(parameters["signal"])
    norms, roots = [], []
    for source in pool.sources:
        alone = Pool((source,), ())
        # Fourth powers of importances leave float32's range: all is in units of the greatest.
        unit = mx.maximum(mx.stack([mx.max(s) for s in source.importance(parameters["signal"]).values()]).max(), TINY)
        total, count = mx.array(0.0), 0
        for (_, (factors,)), (pair,) in zip(alone.updates(), alone.importances(parameters["signal"]), strict=True):
            scaled = (pair[0] / unit, pair[1] / unit)
            for fisher in _fisher(factors, scaled, source.spec.scale, parameters["space"]):
                total, count = total + mx.square(fisher).sum(), count + fisher.size
            mx.eval(total)
        norms.append(mx.square(unit) * mx.sqrt(total))
        roots.append(norms[-1] / max(count, 1) ** 0.5)
    return FisherNorms(mx.stack(norms), mx.stack(roots))


class FisherMean:
    """Σ_t λ_t (F_t + floor_t) θ_t / Σ_t λ_t (F_t + floor_t) over T tasks, entry by entry.

    As fusion_bench's ``merging_with_fisher_weights``. Tasks are added one by one: numerator and denominator are the
    only state.
    """

    def __init__(self) -> None:
        self._numerator = self._denominator = mx.array(0.0)

    def add(self, value: mx.array, weight: mx.array) -> None:
        """One task's θ_t and λ_t (F_t + floor_t), of one shape."""
        self._numerator = self._numerator + weight * value
        self._denominator = self._denominator + weight
        mx.eval(self._numerator, self._denominator)

    def mean(self) -> mx.array:
        """The mean, of the tasks' shape; 0 where no task has a weight."""
        return self._numerator / mx.where(self._denominator == 0, 1.0, self._denominator)


def fisher(layer: Layer) -> Factors | mx.array:
    """Σ λ_t F_t θ_t / Σ λ_t F_t with F = s², the recorded importance squared (fusion_bench ``fisher_merging``).

    Parameters: ``space`` product (entries of ΔW; F from the factors' moments) | factor (entries of A and of
    B); ``normalise`` l2 | none: with l2 an adapter's weights are divided by their L2 norm over all its modules, so that
    none wins by a steeper loss; ``minimum`` is added to every F; ``floor`` relative | absolute: whether ``minimum``
    is in units of the adapter's root mean square F, or as it is. fusion_bench's is absolute 1e-6, made for gradients
    of whole models; an adapter's F is of that size itself (measured: 2e-8 for A, 1e-6 for B), and the result
    then little but the mean. ``weights`` are the λ.
    """
    parameters, pool_survey = layer.parameters, layer.survey
    assert isinstance(pool_survey, FisherNorms)
    count = len(layer.factors)
    minimum = parameters["minimum"]
    relative = parameters["floor"] == "relative"
    offset = TINY if relative else minimum
    normalisers = pool_survey.norms + offset if parameters["normalise"] == "l2" else mx.ones((count,))
    floors = minimum * pool_survey.roots if relative else mx.full((count,), minimum)

    means = [FisherMean()] if parameters["space"] == "product" else [FisherMean(), FisherMean()]
    for index, (factors, importance) in enumerate(zip(layer.factors, layer.importances, strict=True)):
        values = [factors.dense()] if parameters["space"] == "product" else [factors.a, factors.b]
        found_here = _fisher(factors, importance, layer.scales[index], parameters["space"])
        for mean, value, information in zip(means, values, found_here, strict=True):
            # Both are divided by the normaliser before they are added: F² of small importances is near float32's end.
            share = information / normalisers[index] + floors[index] / normalisers[index]
            mean.add(value, layer.weights[index] * share)
    if parameters["space"] == "product":
        return means[0].mean()
    return Factors(means[0].mean(), means[1].mean())


def _fisher(factors: Factors, importance: tuple[mx.array, mx.array], scale: float, space: str) -> tuple[mx.array, ...]:
    """F of ΔW, or of A and of B with its scale in it (whose gradient is that of B over the scale)."""
    if space == "product":
        return (mx.square(product_importance(factors, importance, scale)),)
    return mx.square(importance[0]), mx.square(importance[1] / scale)
