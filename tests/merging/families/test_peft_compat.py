"""PEFT's combination types against NumPy float64: prunings, elections, factor and product space, missing modules."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families import peft_compat
from mlx_rsgwm.merging.families.peft_compat import (
    MAJORITY_SIGN_METHODS,
    RULES,
    TYPES,
    bands,
    elected_mean,
    keep_masks,
    thresholds,
)
from mlx_rsgwm.merging.layer import Layer

ROWS, COLUMNS = 12, 9
FACTOR_TYPES = tuple(RULES)
DENSE_TYPES = tuple(name for name in TYPES if name.endswith("_svd"))
KEY = mx.random.key(11)


def make_module(seed=0, ranks=(4, 4, 4), scales=(2.0, 2.0, 0.5), weights=(0.2, 0.5, 1.5), parameters=None):
    rng = np.random.default_rng(seed)
    factors = tuple(
        Factors(
            mx.array(rng.standard_normal((ROWS, rank)).astype(np.float32)),
            mx.array((rng.standard_normal((rank, COLUMNS)) * scale).astype(np.float32)),
        )
        for rank, scale in zip(ranks, scales, strict=True)
    )
    return Layer("m", factors, tuple(scales), tuple(weights), KEY, parameters=parameters or {})


def parameters_of(kind, density, method="total"):
    taken = {} if kind in ("linear", "cat", "svd") else {"density": density}
    return {**taken, "majority_sign_method": method} if "ties" in kind else taken


def wide(array):
    return np.array(array).astype(np.float64)


# --- reference: one stack of all tasks, as the source describes it ------------------------------------------------


def reference_prune(values, how, density, mask):
    if how == "none" or density >= 1:
        return values
    if how == "random":
        return values * mask / density
    order = np.argsort(-np.abs(values), axis=None, kind="stable")
    kept = np.zeros(values.size)
    kept[order[: int(density * values.size)]] = 1
    return values * kept.reshape(values.shape)


def reference(kind, arrays, weights, masks, density, method):
    kind = kind.removesuffix("_svd")
    how = {"ties": "magnitude", "magnitude_prune": "magnitude", "dare_ties": "random", "dare_linear": "random"}.get(
        kind, "none"
    )
    pruned = np.stack([reference_prune(a, how, density, m) for a, m in zip(arrays, masks, strict=True)])
    weighted = pruned * np.reshape(weights, (-1, 1, 1))
    if "ties" not in kind:
        return weighted.sum(axis=0)
    votes = pruned.sum(axis=0) if method == "total" else np.sign(pruned).sum(axis=0)
    agree = np.sign(pruned) == np.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def drawn(count, shape, density, key):
    """The masks of one draw, (count, *shape)."""
    return wide(keep_masks(count, math.prod(shape), density, key)).reshape(count, *shape)


def reference_factors(kind, module, density, method):
    roots = [math.sqrt(abs(w * s)) for w, s in zip(module.weights, module.scales, strict=True)]
    signed = [root * (1 if w >= 0 else -1) for root, w in zip(roots, module.weights, strict=True)]
    first = module.factors[0]
    masks_a, masks_b = (
        drawn(len(module.factors), shape, density, key)
        for shape, key in zip((first.a.shape, first.b.shape), mx.random.split(module.key), strict=True)
    )
    a = reference(kind, [wide(f.a) for f in module.factors], signed, masks_a, density, method)
    raw = [wide(f.b) / scale for f, scale in zip(module.factors, module.scales, strict=True)]
    return a, reference(kind, raw, roots, masks_b, density, method)


def reference_dense(kind, module, density, method):
    dense = [wide(f.a) @ wide(f.b) for f in module.factors]
    spans = list(bands(module))
    keys = mx.random.split(module.key, len(spans))
    masks = [
        drawn(len(dense), (stop - start, COLUMNS), density, key) for (start, stop), key in zip(spans, keys, strict=True)
    ]
    return reference(kind, dense, module.weights, np.concatenate(masks, axis=1), density, method)


def close(found, expected):
    error = np.linalg.norm(wide(found) - expected) / np.linalg.norm(expected)
    assert error < 1e-5, f"relative error {error:.2e}"


# --- the types -----------------------------------------------------------------------------------------------------


def test_all_eleven_are_there():
    assert set(TYPES) == {
        *("svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd"),
        *("dare_linear_svd", "magnitude_prune", "magnitude_prune_svd"),
    }


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("method", MAJORITY_SIGN_METHODS)
@pytest.mark.parametrize("kind", FACTOR_TYPES)
@pytest.mark.parametrize("scales", [(2.0, 2.0, 0.5), (2.0, 2.0, 2.0)])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 1.5), (0.5, 0.5, 0.5)])
def test_factor_types(kind, method, density, scales, weights):
    module = make_module(scales=scales, weights=weights, parameters=parameters_of(kind, density, method))
    found = TYPES[kind](module)
    for array, expected in zip((found.a, found.b), reference_factors(kind, module, density, method), strict=True):
        close(array, expected)


@pytest.mark.parametrize("kind", FACTOR_TYPES)
def test_a_draw_elects_plus_in_lora_b_whatever_the_scale(kind):
    module = make_module(scales=(-2.0, -2.0, -2.0), parameters=parameters_of(kind, 0.5, "frequency"))
    close(TYPES[kind](module).b, reference_factors(kind, module, 0.5, "frequency")[1])


@pytest.mark.parametrize("kind", FACTOR_TYPES)
def test_negative_weights_turn_lora_a_and_no_election(kind):
    module = make_module(weights=(0.7, -0.4, 0.3), parameters=parameters_of(kind, 0.5))
    found = TYPES[kind](module)
    for array, expected in zip((found.a, found.b), reference_factors(kind, module, 0.5, "total"), strict=True):
        close(array, expected)
    alone = make_module(ranks=(4,), scales=(2.0,), weights=(-1.0,), parameters=parameters_of(kind, 1.0))
    close(TYPES[kind](alone).dense(), -wide(alone.factors[0].dense()))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("method", MAJORITY_SIGN_METHODS)
@pytest.mark.parametrize("kind", DENSE_TYPES)
def test_product_types_take_mixed_ranks(kind, method, density):
    module = make_module(ranks=(2, 5, 3), weights=(0.5, -0.3, 1.0), parameters=parameters_of(kind, density, method))
    found = TYPES[kind](module)
    assert found.shape == (ROWS, COLUMNS)
    close(found, reference_dense(kind, module, density, method))


@pytest.mark.parametrize("kind", DENSE_TYPES)
def test_product_types_by_bands_of_rows(monkeypatch, kind):
    """Five rows at a time; thresholds are still of the whole ΔW."""
    monkeypatch.setattr(peft_compat, "BAND_ENTRIES", 5 * 3 * COLUMNS)
    module = make_module(ranks=(2, 5, 3), parameters=parameters_of(kind, 0.4))
    assert list(bands(module)) == [(0, 5), (5, 10), (10, 12)]
    close(TYPES[kind](module), reference_dense(kind, module, 0.4, "total"))


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_stacked_types_are_the_exact_sum(kind):
    module = make_module(ranks=(2, 5, 3), weights=(0.5, -0.3, 0.0))
    found = TYPES[kind](module)
    assert found.rank == 10
    close(found.dense(), sum(w * wide(f.a) @ wide(f.b) for w, f in zip(module.weights, module.factors, strict=True)))
    close(found.a[:, :2], 0.5 * 2.0 * wide(module.factors[0].a))
    close(found.b[:2], wide(module.factors[0].b) / 2.0)


@pytest.mark.parametrize("kind", FACTOR_TYPES)
def test_factor_types_refuse_mixed_ranks(kind):
    with pytest.raises(RsgwmError, match=r"^m: the adapters have ranks 4, 2, 4, .*peft:cat"):
        TYPES[kind](make_module(ranks=(4, 2, 4), parameters=parameters_of(kind, 0.5)))


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_without_the_module_changes_nothing(kind):
    module = make_module(parameters=parameters_of(kind, 0.5))
    missing = Factors(mx.zeros((ROWS, 1)), mx.zeros((1, COLUMNS)))
    without = replace(module, factors=module.factors[:2], scales=module.scales[:2], weights=module.weights[:2])
    with_it = replace(module, factors=(*module.factors[:2], missing))
    if kind.startswith("dare") and kind.endswith("_svd"):  # masks are drawn for it too
        expected = reference_dense(kind, with_it, 0.5, "total")
    else:
        found = TYPES[kind](without)
        expected = wide(found.dense() if isinstance(found, Factors) else found)
    found = TYPES[kind](with_it)
    close(found.dense() if isinstance(found, Factors) else found, expected)


@pytest.mark.parametrize("kind", [name for name in TYPES if name.startswith("dare")])
def test_random_types_follow_the_key(kind):
    def merged(key):
        found = TYPES[kind](replace(make_module(parameters=parameters_of(kind, 0.5)), key=key))
        return found.dense() if isinstance(found, Factors) else found

    assert mx.array_equal(merged(KEY), merged(KEY)).item()
    assert not mx.array_equal(merged(KEY), merged(mx.random.key(12))).item()


# --- the steps -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.floats(0.001, 0.999), st.integers(0, 2**31))
def test_thresholds_keep_just_as_many_as_asked(size, density, seed):
    values = mx.random.permutation(mx.arange(1, size + 1), key=mx.random.key(seed)).astype(mx.float32) * -0.1
    deltas = mx.stack([values, 2 * values])
    assert (mx.abs(deltas) >= thresholds(mx.abs(deltas), density)).sum(axis=1).tolist() == [int(density * size)] * 2


def test_thresholds_are_of_each_delta():
    deltas = mx.array([[0.1, -5.0, 3.0, 0.0, -0.2, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0, -6.0]])
    assert thresholds(mx.abs(deltas), 0.5).tolist() == [[3], [4]]
    assert thresholds(mx.abs(deltas), 0.1).tolist() == [[math.inf], [math.inf]]


@pytest.mark.parametrize("density", [0.5, 0.25, 0.3, 1e-5])  # from 1, 8, 16 and 32 random bits each
def test_random_pruning_keeps_its_share(density):
    kept = keep_masks(5, 999_999, density, KEY)
    assert kept.shape == (5, 999_999)
    shares = np.array(kept).mean(axis=1)
    assert np.abs(shares - density).max() < 4 * math.sqrt(density * (1 - density) / 1e6)
    assert len(set(shares)) > 1


def test_a_draw_elects_plus():
    deltas = mx.array([[2.0, 0.0, -1.0], [-2.0, 0.0, -3.0]])
    assert elected_mean(deltas, mx.array([1.0, 1.0]), "total").tolist() == [2, 0, -2]


def test_total_and_frequency_elect_differently():
    deltas = mx.array([[5.0], [-1.0], [-2.0]])
    for method, expected in (("total", 5.0), ("frequency", -1.5)):
        assert elected_mean(deltas, mx.ones(3), method).item() == expected


def test_the_mean_divides_by_the_number_of_adapters():
    assert elected_mean(mx.array([[3.0], [5.0]]), mx.array([0.1, 0.3]), "total").item() == pytest.approx(0.9)
