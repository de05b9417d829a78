"""Role-Specific Gradient-Weighted Merging, in factor space and in product space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rsgwm.linalg.lowrank import Factors, cross
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.merging.steps.masks import Histogram, MaskedMean, mean_entry, mean_of, quantile, ranks

# A norm is evaluated whenever so many entries of factors have come in.
NORM_ENTRIES = 1 << 20


@dataclass(frozen=True)
class ImportanceSurvey:
    """What one pass over every adapter's importance found.

    ``divisors``: what each adapter's importance is divided by: its mean over all entries, that times the norm of the
    adapter's update, or 1. ``thresholds``: T mappings from a leaf (lora_a, lora_b, or product) to the quantile of a
    scope wider than a module, else empty.
    """

    divisors: tuple[mx.array, ...]
    thresholds: tuple[Mapping[str, mx.array], ...]


def survey_importance(pool: Pool, parameters: Mapping[str, Any]) -> ImportanceSurvey:
    """One pass over the importances, adapter by adapter, for what the modules cannot know by themselves."""
    product = parameters["space"] == "product"
    wide = parameters["scope"] in ("factor", "global")
    mean, norm = parameters["normalise"] in ("mean", "norm"), parameters["normalise"] == "norm"
    if not wide and not mean:
        return ImportanceSurvey((mx.array(1.0),) * len(pool.sources), ({},) * len(pool.sources))
    divisors, thresholds = [], []
    pool.require_signal(parameters["signal"])
    for index, source in enumerate(pool.sources):
        if product:
            found_mean, pooled = _survey_products(pool, index, parameters, wide)
        else:
            # Sorted, so that a sum does not depend on the order in a file.
            arrays = dict(sorted(source.importance(parameters["signal"]).items()))
            found_mean = mean_entry(arrays.values())
            pooled = _pooled_thresholds(arrays, parameters) if wide else {}
        mx.eval(found_mean, pooled)
        divisors.append(found_mean * (update_norm(pool, index) if norm else 1) if mean else mx.array(1.0))
        thresholds.append(pooled)
    return ImportanceSurvey(tuple(divisors), tuple(thresholds))


def update_norm(pool: Pool, index: int) -> mx.array:
    """‖ΔW‖_F of one adapter over all its modules, never 0: a float32 scalar."""
    square, entries = mx.array(0.0), 0
    for _, (factors,) in Pool((pool.sources[index],), ()).updates():
        square = square + cross(factors, factors)
        entries += factors.a.size + factors.b.size
        if entries > NORM_ENTRIES:
            mx.eval(square)
            entries = 0
    return mx.maximum(mx.sqrt(square), 1e-30)


def _pooled_thresholds(arrays: Mapping[str, mx.array], parameters: Mapping[str, Any]) -> dict[str, mx.array]:
    def pooled(suffix: str) -> mx.array:
        chosen = [array.reshape(-1) for name, array in arrays.items() if name.endswith(suffix)]
        return quantile(mx.concatenate(chosen), parameters["tau"])

    if parameters["scope"] == "global":
        threshold = pooled("")
        return {"lora_a": threshold, "lora_b": threshold}
    return {leaf: pooled(leaf) for leaf in ("lora_a", "lora_b")}


def _survey_products(
    pool: Pool, index: int, parameters: Mapping[str, Any], wide: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    total, count, histogram = mx.array(0.0), 0, Histogram()
    for importance in _product_importances(pool, index, parameters["signal"]):
        total, count = total + importance.sum(), count + importance.size
        if wide:
            histogram.add(importance)
        mx.eval(total)
    mean = mean_of(total, count)
    if not wide:
        return mean, {}
    again = _product_importances(pool, index, parameters["signal"])
    return mean, {"product": histogram.quantile(again, parameters["tau"])}


def _product_importances(pool: Pool, index: int, signal: str) -> Iterator[mx.array]:
    """S of every module of one adapter, in turn."""
    alone = Pool((pool.sources[index],), ())
    for (_, (factors,)), (pair,) in zip(alone.updates(), alone.importances(signal), strict=True):
        yield product_importance(factors, pair, alone.sources[0].spec.scale)


def product_importance(factors: Factors, importance: tuple[mx.array, mx.array], scale: float) -> mx.array:
    """S = √((s_A²)(B²) + (A²)(s_B²)), (in, out): what the factors' moments say of ΔW's entries."""
    s_a, s_b = importance
    b = factors.b / scale
    return mx.sqrt(mx.square(s_a) @ mx.square(b) + mx.square(factors.a) @ mx.square(s_b))


def rsgwm(layer: Layer) -> Factors | mx.array:
    """θ_ref + Σ_t w_t s_t m_t (θ_t − θ_ref) / (Σ_t w_t s_t m_t + ε) for every entry of A and B, or of ΔW.

    Parameters: ``space`` factor | product; ``tau`` and ``scope`` of the quantile mask (tensor: every array by itself;
    factor: all lora_a of the adapter together, and all lora_b; module: A and B of a module; global: everything; in
    product space tensor is module and factor is global); ``normalise`` mean | norm | none | rank, how importances of
    different tasks come to one scale: norm divides by the mean and by the norm of the adapter's update, so that no
    adapter wins an entry by being large; ``reference`` init | zero, in factor space: with init an entry of A that every
    mask drops falls back to the shared initialisation, which keeps the product alive; ``epsilon``.
    ``weights`` multiply the importances.
    """
    if layer.parameters["space"] == "product":
        return _product(layer)
    return _factors(layer)


def _factors(layer: Layer) -> Factors:
    parameters = layer.parameters
    origin = mx.array(0.0) if parameters["reference"] == "zero" else layer.initial_a
    assert origin is not None
    a, b = MaskedMean(), MaskedMean()
    for index, (factors, importance) in enumerate(zip(layer.factors, layer.importances, strict=True)):
        thresholds = _thresholds(layer, index, importance)
        deltas = (factors.a - origin, factors.b)
        for leaf, delta, s, threshold in zip((a, b), deltas, importance, thresholds, strict=True):
            leaf.add(delta, _weight(layer, index, s), s >= threshold)
    for name, leaf in {"a": a, "b": b}.items():
        layer.notes.update({f"kept_{name}": leaf.shares(), f"overlap_{name}": leaf.overlap()})
    return Factors(origin + a.mean(parameters["epsilon"]), b.mean(parameters["epsilon"]))


def _thresholds(layer: Layer, index: int, importance: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """The quantiles for adapter ``index``'s masks of A and of B."""
    scope, tau = layer.parameters["scope"], layer.parameters["tau"]
    s_a, s_b = importance
    if scope == "tensor":
        return quantile(s_a, tau), quantile(s_b, tau)
    if scope == "module":
        both = quantile(mx.concatenate([s_a.reshape(-1), s_b.reshape(-1)]), tau)
        return both, both
    pool_survey: ImportanceSurvey = layer.survey
    return pool_survey.thresholds[index]["lora_a"], pool_survey.thresholds[index]["lora_b"]


def _weight(layer: Layer, index: int, importance: mx.array) -> mx.array:
    pool_survey: ImportanceSurvey = layer.survey
    if layer.parameters["normalise"] == "rank":
        return layer.weights[index] * ranks(importance)
    return importance * (layer.weights[index] / pool_survey.divisors[index])


def _product(layer: Layer) -> mx.array:
    merged = MaskedMean()
    for index, (factors, pair) in enumerate(zip(layer.factors, layer.importances, strict=True)):
        s = product_importance(factors, pair, layer.scales[index])
        wide = layer.survey.thresholds[index].get("product")
        mask = s >= (quantile(s, layer.parameters["tau"]) if wide is None else wide)
        merged.add(factors.dense(), _weight(layer, index, s), mask)
        del s, mask  # they are as large as the update
    layer.notes.update(kept=merged.shares(), overlap=merged.overlap())
    return merged.mean(layer.parameters["epsilon"])
