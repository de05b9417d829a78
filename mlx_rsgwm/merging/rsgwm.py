"""Role-Specific Gradient-Weighted Merging, in factor space and in product space (SPEC 6 and 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rsgwm.merging.lowrank import cross
from mlx_rsgwm.merging.masks import Histogram, masked_weighted_mean, mean_of, overlap, quantile, ranks
from mlx_rsgwm.merging.module import Factors, Module
from mlx_rsgwm.merging.pool import Pool

# A norm is evaluated whenever so many entries of factors have come in.
NORM_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Survey:
    """What one pass over every adapter's importance found.

    ``divisors``: what each adapter's importance is divided by: its mean over all entries, that times the norm of the
    adapter's update, or 1. ``thresholds``: T mappings from a leaf (lora_a, lora_b, or product) to the quantile of a
    scope wider than a module, else empty.
    """

    divisors: tuple[mx.array, ...]
    thresholds: tuple[Mapping[str, mx.array], ...]


def survey(pool: Pool, parameters: Mapping[str, Any]) -> Survey:
    """One pass over the importances, adapter by adapter, for what the modules cannot know by themselves."""
    product = parameters["space"] == "product"
    wide = parameters["scope"] in ("factor", "global")
    mean, norm = parameters["normalise"] in ("mean", "norm"), parameters["normalise"] == "norm"
    if not wide and not mean:
        return Survey((mx.array(1.0),) * len(pool.sources), ({},) * len(pool.sources))
    divisors, thresholds = [], []
    pool.require_signal(parameters["signal"])
    for index, source in enumerate(pool.sources):
        if product:
            found_mean, found = _survey_products(pool, index, parameters, wide)
        else:
            # Sorted, so that a sum does not depend on the order in a file.
            arrays = dict(sorted(source.importance(parameters["signal"]).items()))
            found_mean = mean_of(arrays.values())
            found = _pooled_thresholds(arrays, parameters) if wide else {}
        mx.eval(found_mean, found)
        divisors.append(found_mean * (update_norm(pool, index) if norm else 1) if mean else mx.array(1.0))
        thresholds.append(found)
    return Survey(tuple(divisors), tuple(thresholds))


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
    alone = Pool((pool.sources[index],), ())
    total, count, histogram = mx.array(0.0), 0, Histogram.empty()
    for (_, (factors,)), (pair,) in zip(alone.updates(), alone.importances(parameters["signal"]), strict=True):
        importance = product_importance(factors, pair, alone.sources[0].spec.scale)
        total, count = total + importance.sum(), count + importance.size
        if wide:
            histogram = histogram.add(importance)
        mx.eval(total, histogram.counts)
    mean = mx.maximum(total / max(count, 1), 1e-30)
    return mean, {"product": histogram.quantile(parameters["tau"])} if wide else {}


def product_importance(factors: Factors, importance: tuple[mx.array, mx.array], scale: float) -> mx.array:
    """S = √((s_A²)(B²) + (A²)(s_B²)), (in, out): what the factors' moments say of ΔW's entries (SPEC 6.13)."""
    s_a, s_b = importance
    b = factors.b / scale
    return mx.sqrt(mx.square(s_a) @ mx.square(b) + mx.square(factors.a) @ mx.square(s_b))


def rsgwm(module: Module) -> Factors | mx.array:
    """θ_ref + Σ_t w_t s_t m_t (θ_t − θ_ref) / (Σ_t w_t s_t m_t + ε) for every entry of A and B, or of ΔW.

    Parameters: ``space`` factor | product; ``tau`` and ``scope`` of the quantile mask (tensor: every array by itself;
    factor: all lora_a of the adapter together, and all lora_b; module: A and B of a module; global: everything; in
    product space tensor is module and factor is global); ``normalise`` mean | norm | none | rank, how importances of
    different tasks come to one scale: norm divides by the mean and by the norm of the adapter's update, so that no
    adapter wins an entry by being large; ``reference`` init | zero, in factor space: with init an entry of A that every
    mask drops falls back to the shared initialisation, which keeps the product alive (SPEC 6.14); ``epsilon``.
    ``weights`` multiply the importances.
    """
    if module.parameters["space"] == "product":
        return _product(module)
    return _factors(module)


def _factors(module: Module) -> Factors:
    parameters, count = module.parameters, len(module.factors)
    origin = mx.array(0.0) if parameters["reference"] == "zero" else module.initial_a
    assert origin is not None
    thresholds = [_thresholds(module, index) for index in range(count)]

    def merged(leaf: str, position: int, delta: Callable[[int], mx.array]) -> mx.array:
        importances = [pair[position] for pair in module.importances]
        masks = [s >= thresholds[index][leaf] for index, s in enumerate(importances)]
        module.notes[f"kept_{leaf[-1]}"] = mx.stack([mask.mean() for mask in masks])
        module.notes[f"overlap_{leaf[-1]}"] = overlap(masks)
        terms = ((delta(index), _weight(module, index, importances[index]), masks[index]) for index in range(count))
        return masked_weighted_mean(terms, parameters["epsilon"])

    a = origin + merged("lora_a", 0, lambda index: module.factors[index].a - origin)
    return Factors(a, merged("lora_b", 1, lambda index: module.factors[index].b))


def _thresholds(module: Module, index: int) -> Mapping[str, mx.array]:
    scope, tau = module.parameters["scope"], module.parameters["tau"]
    s_a, s_b = module.importances[index]
    if scope == "tensor":
        return {"lora_a": quantile(s_a, tau), "lora_b": quantile(s_b, tau)}
    if scope == "module":
        both = quantile(mx.concatenate([s_a.reshape(-1), s_b.reshape(-1)]), tau)
        return {"lora_a": both, "lora_b": both}
    found: Mapping[str, mx.array] = module.survey.thresholds[index]
    return found


def _weight(module: Module, index: int, importance: mx.array) -> mx.array:
    found: Survey = module.survey
    if module.parameters["normalise"] == "rank":
        return module.weights[index] * ranks(importance)
    return module.weights[index] * importance / found.divisors[index]


def _product(module: Module) -> mx.array:
    kept = []

    def terms() -> Iterator[tuple[mx.array, mx.array, mx.array]]:
        for index, factors in enumerate(module.factors):
            s = product_importance(factors, module.importances[index], module.scales[index])
            wide = module.survey.thresholds[index].get("product")
            mask = s >= (quantile(s, module.parameters["tau"]) if wide is None else wide)
            kept.append(mask.mean())
            yield factors.dense(), _weight(module, index, s), mask

    merged = masked_weighted_mean(terms(), module.parameters["epsilon"])
    module.notes["kept"] = mx.stack(kept)
    return merged
