"""The elementwise methods against slow NumPy float64 references: the table's rows, SCE, both spaces, their memory."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.task_vectors import FAMILY, check, merge_task_vectors, sce
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.steps import sign_election
from mlx_rsgwm.merging.steps.elementwise import elementwise
from mlx_rsgwm.merging.steps.sparsify import (
    drawn,
)
from tests.merging.elementwise_references import (
    COLUMNS,
    KEY,
    ROWS,
    WEIGHTS,
    low_rank_deltas,
    random_deltas,
    reference_breadcrumbs,
    reference_consensus,
    reference_magnitude,
    reference_probabilities,
    reference_sce,
    reference_sparsified,
    wide,
)

ROW_NAMES = [name for name in FAMILY if name != "sce"]


@given(seed=st.integers(0, 99), factor=st.floats(0.01, 100), name=st.sampled_from(["ties", "breadcrumbs_ties", "sce"]))
@settings(max_examples=30, deadline=None)
def test_order_and_scale_do_not_matter(seed, factor, name):
    deltas = random_deltas(3, seed)
    merged = np.array(FAMILY[name].merge(deltas, WEIGHTS, KEY))
    assert np.allclose(np.array(FAMILY[name].merge(deltas[::-1], WEIGHTS[::-1], KEY)), merged, atol=1e-5)
    scaled = np.array(FAMILY[name].merge([delta * factor for delta in deltas], WEIGHTS, KEY))
    assert np.allclose(scaled, merged * factor, rtol=1e-4, atol=1e-5 * factor)


def reference_row(name, deltas, weights, parameters):
    """What a row should give, its random masks being those that the split key draws."""
    arrays = [wide(delta) for delta in deltas]
    density = parameters["density"]
    kept = []
    for array, key in zip(arrays, mx.random.split(KEY, len(arrays)), strict=True):
        probability = density
        if name.startswith(("ties", "fusion_bench", "magnitude")):
            mask = reference_magnitude(array, density)
        elif name.startswith("breadcrumbs"):
            mask = reference_breadcrumbs(array, density, parameters["gamma"])
        else:
            if name.startswith("della"):
                probability = reference_probabilities(array, density, parameters["epsilon"])
                mask = np.array(mx.random.bernoulli(mx.array(probability.astype(np.float32)), array.shape, key=key))
            else:
                mask = np.array(drawn(density, array.shape, key))
        kept.append(reference_sparsified(array, mask, parameters["rescale"], probability))
    return reference_consensus(kept, weights, parameters.get("election", "none"), parameters["normalise"])


def variants(name):
    row = FAMILY[name]
    own = {key: value for key, value in row.defaults.items() if key != "lambda"}
    changes = [{}, {"normalise": "none"}, {"rescale": "l1"}, {"density": 0.6}, {"density": 0.005, "epsilon": 0.001}]
    if "election" in own:
        changes += [{"election": "count"}, {"election": "count", "normalise": "none", "density": 0.3, "epsilon": 0.1}]
    return [{**own, **{key: value for key, value in change.items() if key in own}} for change in changes]


@pytest.mark.parametrize("name", ROW_NAMES)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS, (1.0, -0.5, 2.0)])
def test_rows_are_their_reference(name, weights):
    for deltas in (random_deltas(seed=21), low_rank_deltas(22)):
        for parameters in variants(name):
            found = wide(FAMILY[name].merge(deltas, weights, KEY, **parameters))
            expected = reference_row(name, deltas, weights, parameters)
            assert np.abs(found - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-3), parameters


def test_fusion_bench_reads_ties_as_a_scaled_sum():
    arrays = [wide(delta) for delta in random_deltas(4, 31)]
    trimmed = [
        array * (np.abs(array) >= np.sort(np.abs(array).reshape(-1))[-int(0.2 * array.size)]) for array in arrays
    ]
    signs = np.sign(sum(trimmed))
    expected = 0.3 * sum(np.where(np.sign(array) == signs, array, 0) for array in trimmed)
    row = FAMILY["fusion_bench:ties"]
    merged = row.defaults["lambda"] * wide(row.merge(random_deltas(4, 31), [1.0] * 4, KEY))
    assert np.abs(expected).max() > 0
    assert np.allclose(merged, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_rows_follow_their_key(name):
    merge = FAMILY[name].merge
    deltas = random_deltas(seed=2)
    first = merge(deltas, WEIGHTS, KEY)
    assert mx.array_equal(first, merge(deltas, WEIGHTS, KEY))
    assert not mx.array_equal(first, merge(deltas, WEIGHTS, mx.random.key(6)))


def test_adapters_draw_masks_of_their_own():
    same = random_deltas(1)[0]
    merged = np.array(merge_task_vectors([same] * 8, [1.0] * 8, KEY, sparsification="bernoulli", density=0.5))
    shares = merged / np.array(same)
    assert len(np.unique(shares.round(3))) > 4


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "ties"])
def test_given_masks_are_used(name):
    deltas = random_deltas(2, 3)
    masks = [mx.array(np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 3 == part) for part in range(2)]
    merged = np.array(FAMILY[name].merge(deltas, [1.0, 1.0], KEY, masks=masks))
    assert (merged[np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 3 == 2] == 0).all()
    assert ((merged != 0) == (np.array(masks[0]) | np.array(masks[1]))).all()


@pytest.mark.parametrize("name", list(FAMILY))
def test_identical_adapters_at_full_density_merge_to_themselves(name):
    delta = random_deltas(1, 12)[0]
    full = {"density": 1.0} if "density" in FAMILY[name].defaults else {"select_topk": 0.5}
    if "normalise" in FAMILY[name].defaults:
        full["normalise"] = "weights"
    merged = FAMILY[name].merge([delta] * 3, WEIGHTS, KEY, **full)
    assert np.allclose(np.array(merged), np.array(delta), rtol=1e-5)


@pytest.mark.parametrize("name", list(FAMILY))
def test_a_table_row_is_complete(name):
    row = FAMILY[name]
    assert row.defaults.keys() == row.parameters.keys()
    assert row.summary
    assert row.source
    for parameter, value in row.defaults.items():
        assert row.parameters[parameter].problem(parameter, value) is None
        assert row.parameters[parameter].problem(parameter, "no such value")
    assert check(row.defaults) == []
    own = {key: value for key, value in row.defaults.items() if key != "lambda"}
    deltas = random_deltas(seed=5)
    assert mx.array_equal(row.merge(deltas, WEIGHTS, KEY), row.merge(deltas, WEIGHTS, KEY, **own))


@pytest.mark.parametrize(("density", "epsilon", "good"), [(0.5, 0.5, False), (0.9, 0.15, False), (1, 0.4, True)])
def test_dellas_probabilities_must_be_probabilities(density, epsilon, good):
    assert (check({"density": density, "epsilon": epsilon}) == []) is good
    assert check({"density": density}) == []


@pytest.mark.parametrize("select_topk", [1.0, 0.5, 0.1, 0.001])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_sce_is_its_reference(select_topk, weights):
    for deltas in (random_deltas(seed=41), low_rank_deltas(42), random_deltas(seed=43, size=1e-4)):
        found = wide(sce(deltas, weights, select_topk=select_topk))
        expected = reference_sce([wide(delta) for delta in deltas], weights, select_topk)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_sce_weighs_by_energy_however_small_the_updates_are():
    deltas = [mx.full((4, 4), 3e-4), mx.full((4, 4), 1e-4)]
    assert sce(deltas, [1.0, 1.0])[0, 0].item() == pytest.approx((9 * 3e-4 + 1e-4) / 10, rel=1e-5)


def test_sce_selects_among_what_varies():
    deltas = [mx.array([[1.0, 2.0, 3.0, 5.0]]), mx.array([[1.0, 2.0, 1.0, 1.0]])]
    assert (np.array(sce(deltas, [1.0, 1.0], select_topk=0.5)) != 0).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("name", FAMILY)
def test_in_factor_space_the_factors_are_merged_apart(name):
    """A by the first half of the module's key, B by the second; lambda counts once, on B."""
    row = FAMILY[name]
    factors = tuple(map(Factors, random_deltas(3, 1, (ROWS, 4)), random_deltas(3, 2, (4, COLUMNS))))
    parameters = {**row.defaults, "lambda": 0.3, "space": "factor"}
    module = Layer("m", factors, (1.0,) * 3, WEIGHTS, KEY, parameters=parameters)
    found = elementwise(row.merge)(module)
    assert isinstance(found, Factors)
    own = {key: value for key, value in row.defaults.items() if key != "lambda"}
    key_a, key_b = mx.random.split(KEY)
    assert mx.array_equal(found.a, row.merge([one.a for one in factors], WEIGHTS, key_a, **own))
    assert mx.allclose(found.b, 0.3 * row.merge([one.b for one in factors], WEIGHTS, key_b, **own))


@pytest.mark.parametrize("name", FAMILY)
def test_in_product_space_the_updates_are_merged(name):
    row = FAMILY[name]
    factors = tuple(low_rank_deltas().factors)
    parameters = {**row.defaults, "lambda": 0.3, "space": "product"}
    found = elementwise(row.merge)(Layer("m", factors, (1.0,) * 3, WEIGHTS, KEY, parameters=parameters))
    own = {key: value for key, value in row.defaults.items() if key != "lambda"}
    assert mx.allclose(found, 0.3 * row.merge([one.dense() for one in factors], WEIGHTS, KEY, **own), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("ties", {}), ("dare_ties", {}), ("della_linear", {}), ("sce", {}), ("sce", {"select_topk": 0.5})],
)
def test_memory_does_not_grow_with_the_pool(name, parameters, monkeypatch):
    monkeypatch.setattr(sign_election, "LAZY_ENTRIES", 0)

    def peak(count):
        updates = low_rank_deltas(1, (2,) * count, (256, 256))
        mx.eval([(one.a, one.b) for one in updates.factors])
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(FAMILY[name].merge(updates, [1.0] * count, KEY, **parameters))
        return mx.get_peak_memory() - before

    dense = 256 * 256 * 4
    assert peak(4) > 2 * dense
    assert peak(24) <= peak(4) + 4 * dense  # twenty more updates; what is freed when varies by one or two


def test_evaluation_by_steps_changes_nothing(monkeypatch):
    deltas = random_deltas(4, 15)
    lazily = [row.merge(deltas, [1.0, 2.0, 3.0, 4.0], KEY) for row in FAMILY.values()]
    monkeypatch.setattr(sign_election, "LAZY_ENTRIES", 0)
    stepwise = [row.merge(deltas, [1.0, 2.0, 3.0, 4.0], KEY) for row in FAMILY.values()]
    assert all(mx.array_equal(one, two) for one, two in zip(lazily, stepwise, strict=True))
