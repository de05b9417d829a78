"""The elementwise methods against slow NumPy float64 references: masks, rescaling, elections, SCE, the table's rows."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.task_vectors import FAMILY, check, merge_task_vectors, sce
from mlx_rsgwm.merging.layer import DenseUpdates, Layer
from mlx_rsgwm.merging.steps import sign_election
from mlx_rsgwm.merging.steps.elementwise import elementwise
from mlx_rsgwm.merging.steps.sign_election import elected_sum, weighted_sum
from mlx_rsgwm.merging.steps.sparsify import (
    breadcrumbs_mask,
    drawn,
    keep_count,
    keep_probabilities,
    magnitude_mask,
    sparsified,
)

ROWS, COLUMNS = 11, 7
KEY = mx.random.key(5)
WEIGHTS = (0.4, 1.0, 0.7)
ROW_NAMES = [name for name in FAMILY if name != "sce"]


def random_deltas(count=3, seed=0, shape=(ROWS, COLUMNS), size=1.0):
    rng = np.random.default_rng(seed)
    return [mx.array((rng.standard_normal(shape) * size).astype(np.float32)) for _ in range(count)]


def low_rank_deltas(seed=0, ranks=(2, 5, 3), shape=(ROWS, COLUMNS)):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: mx.array(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    return DenseUpdates([Factors(draw(shape[0], rank), draw(rank, shape[1])) for rank in ranks])


def wide(array):
    return np.array(array).astype(np.float64)


# --- references: one entry at a time ---------------------------------------------------------------------------------


def reference_magnitude(delta, density):
    count = max(1, int(density * delta.size))
    mask = np.zeros(delta.size, dtype=bool)
    mask[np.argsort(-np.abs(delta).reshape(-1))[:count]] = True
    return mask.reshape(delta.shape)


def reference_breadcrumbs(delta, density, gamma):
    count, top = max(1, int(density * delta.size)), int(gamma * delta.size)
    ascending = list(np.argsort(np.abs(delta).reshape(-1)))
    while top and len(ascending) > count:
        ascending.pop()
        top -= 1
    mask = np.zeros(delta.size, dtype=bool)
    mask[ascending[-count:]] = True
    return mask.reshape(delta.shape)


def reference_probabilities(delta, density, epsilon):
    found = np.zeros(delta.shape)
    for column in range(delta.shape[1]):
        for row in range(delta.shape[0]):
            below = sum(abs(other) < abs(delta[row, column]) for other in delta[:, column])
            found[row, column] = density - epsilon + 2 * epsilon * below / (delta.shape[0] - 1)
    return found


def reference_sparsified(delta, mask, rescale, probability):
    kept = np.where(mask, delta, 0.0)
    if rescale == "density":
        return kept / probability
    if rescale == "l1" and np.abs(kept).sum():
        return kept * np.abs(delta).sum() / np.abs(kept).sum()
    return kept


def reference_consensus(updates, weights, election, normalise):
    merged = np.zeros(updates[0].shape)
    for place in np.ndindex(*merged.shape):
        shares = [weight * update[place] for weight, update in zip(weights, updates, strict=True)]
        chosen = list(range(len(shares)))
        if election != "none":
            count, total = sum(np.sign(shares)), sum(shares)
            winner = np.sign(count if election == "count" and count else total)
            chosen = [index for index in chosen if shares[index] and np.sign(shares[index]) == winner]
        divisor = 1.0
        if normalise == "weights" and chosen:
            divisor = sum(weights[index] if election == "none" else abs(weights[index]) for index in chosen)
        merged[place] = sum(shares[index] for index in chosen) / divisor
    return merged


def reference_sce(deltas, weights, select_topk):
    stacked = np.stack(deltas)
    variance = stacked.var(axis=0)
    if select_topk < 1:
        count = max(1, int((variance > 0).sum() * select_topk))
        stacked = stacked * (variance >= np.sort(variance.reshape(-1))[-count])
    energies = [weight * np.mean(delta**2) for weight, delta in zip(weights, stacked, strict=True)]
    merged = np.zeros(variance.shape)
    for place in np.ndindex(*merged.shape):
        values = [delta[place] for delta in stacked]
        winner = np.sign(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        agreeing = [index for index, value in enumerate(values) if value and np.sign(value) == winner]
        if agreeing:
            total = sum(energies[index] for index in agreeing)
            merged[place] = sum(energies[index] * values[index] for index in agreeing) / total
    return merged


# --- which entries are kept ------------------------------------------------------------------------------------------


@given(density=st.floats(0.001, 1.0), size=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_magnitude_keeps_the_largest_and_never_none(density, size, seed):
    delta = random_deltas(1, seed, (size, 3))[0]
    mask = np.array(magnitude_mask(delta, density))
    assert mask.sum() == keep_count(3 * size, density) >= 1
    assert (mask == reference_magnitude(wide(delta), density)).all()


def test_magnitude_keeps_all_that_equal_the_threshold():
    delta = mx.array([[3.0, -2.0], [2.0, 2.0]])
    assert magnitude_mask(delta, 0.5).tolist() == [[True, True], [True, True]]
    assert magnitude_mask(delta, 0.25).tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("gamma", [0.0, 0.005, 0.01, 0.2, 0.95])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_breadcrumbs_keep_the_middle(density, gamma):
    delta = random_deltas(1, 3, (13, 10))[0]
    mask = np.array(breadcrumbs_mask(delta, density, gamma))
    assert mask.sum() == max(1, int(130 * density))
    assert (mask == reference_breadcrumbs(wide(delta), density, gamma)).all()


def test_breadcrumbs_without_an_outlier_to_drop_are_magnitude_pruning():
    delta = random_deltas(1, 4)[0]
    assert mx.array_equal(breadcrumbs_mask(delta, 0.5, 0.01), magnitude_mask(delta, 0.5))


def test_della_probabilities_rank_the_inputs_of_one_output():
    delta = random_deltas(1, 6)[0]
    found = wide(keep_probabilities(delta, 0.5, 0.15))
    assert np.allclose(found, reference_probabilities(wide(delta), 0.5, 0.15), atol=1e-6)
    assert np.allclose(found.min(axis=0), 0.35)
    assert np.allclose(found.max(axis=0), 0.65)


def test_della_knows_a_row_of_one():
    assert np.allclose(np.array(keep_probabilities(mx.array([[1.0, 0.0, -3.0]]), 0.4, 0.1)), 0.4)


@pytest.mark.parametrize("probability", [0.5, 0.3, 0.1, 0.9, 0.005, 1e-4, 0.99999])
def test_draws_have_their_probability(probability):
    draws = np.array(drawn(probability, (4, 250_001), KEY)).astype(float)
    deviation = np.sqrt(probability * (1 - probability) / draws.size)
    assert abs(draws.mean() - probability) < 4 * deviation + 1e-4 * probability
    assert not np.array_equal(draws[0], draws[1])


def test_draws_do_not_lean_on_their_neighbours():
    draws = np.array(drawn(0.3, (1_000_003,), KEY)).astype(float) - 0.3
    for lag in (1, 2, 3, 4, 8, 64):
        assert abs(np.mean(draws[lag:] * draws[:-lag])) < 4 * 0.21 / 1000
    assert mx.array_equal(drawn(0.3, (7,), KEY), drawn(0.3, (7,), KEY))
    assert not mx.array_equal(drawn(0.3, (1000,), KEY), drawn(0.3, (1000,), mx.random.split(KEY)[0]))


@pytest.mark.parametrize("how", ["magnitude", "bernoulli", "della", "breadcrumbs"])
def test_full_density_keeps_everything(how):
    delta = random_deltas(1)[0]
    kept = sparsified(delta, how, KEY, density=1.0, epsilon=0.15, gamma=0.1, rescale="l1")
    assert mx.array_equal(kept, delta)


@pytest.mark.parametrize("how", ["bernoulli", "della"])
def test_divided_by_its_probability_the_expectation_is_the_update(how):
    delta = random_deltas(1, 8)[0]
    draws = np.stack(
        [
            np.array(sparsified(delta, how, key, density=0.3, epsilon=0.2, rescale="density"))
            for key in mx.random.split(KEY, 600)
        ]
    )
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - np.array(delta)) < 5 * error).all()
    assert np.abs(draws.mean(axis=0) - np.array(delta)).max() > 0


@pytest.mark.parametrize("how", ["magnitude", "bernoulli", "della", "breadcrumbs"])
def test_l1_brings_the_magnitudes_back(how):
    delta = random_deltas(1, 9)[0]
    kept = np.array(sparsified(delta, how, KEY, density=0.4, epsilon=0.1, gamma=0.1, rescale="l1"))
    assert 0 < (kept != 0).sum() < kept.size
    assert np.abs(kept).sum() == pytest.approx(np.abs(np.array(delta)).sum(), rel=1e-5)


def test_nothing_kept_stays_nothing():
    delta = random_deltas(1)[0]
    kept = sparsified(delta, "bernoulli", KEY, density=0.5, rescale="l1", mask=mx.zeros(delta.shape))
    assert not mx.any(kept).item()
    assert not mx.any(mx.isnan(sparsified(0 * delta, "bernoulli", KEY, density=0.5, rescale="l1"))).item()


# --- sums and elections ----------------------------------------------------------------------------------------------


def test_the_larger_magnitude_wins_whatever_its_sign():
    strong, weak = mx.array([[3.0, -3.0]]), mx.array([[-1.0, 1.0]])
    assert elected_sum([strong, weak], [1.0, 1.0]).tolist() == [[3.0, -3.0]]
    assert elected_sum([weak, strong], [1.0, 1.0]).tolist() == [[3.0, -3.0]]


def test_weights_vote():
    strong, weak = mx.array([[3.0]]), mx.array([[-1.0]])
    assert elected_sum([strong, weak], [1.0, 4.0]).item() == pytest.approx(-1.0)
    assert elected_sum([strong, weak], [1.0, 4.0], normalise="none").item() == pytest.approx(-4.0)
    assert elected_sum([strong, weak], [1.0, 4.0], ballots=[1.0, 1.0]).item() == pytest.approx(3.0)


def test_a_majority_wins_by_count_and_a_draw_goes_to_the_magnitude():
    deltas = [mx.array([[-5.0, -5.0]]), mx.array([[1.0, 2.0]]), mx.array([[1.0, 0.0]])]
    assert elected_sum(deltas, [1.0] * 3, "sum").tolist() == [[-5.0, -5.0]]
    assert elected_sum(deltas, [1.0] * 3, "count").tolist() == [[1.0, -5.0]]


def test_an_even_draw_elects_nobody():
    opposed = [mx.array([[2.0]]), mx.array([[-2.0]])]
    assert elected_sum(opposed, [1.0, 1.0], "sum").item() == 0
    assert elected_sum(opposed, [1.0, 1.0], "count").item() == 0


def test_a_negative_weight_turns_an_update_round():
    deltas = [mx.array([[3.0, 3.0]]), mx.array([[-1.0, 1.0]])]
    assert elected_sum(deltas, [1.0, -1.0]).tolist() == [[2.0, 3.0]]


def test_weights_that_sum_to_zero_have_no_mean():
    with pytest.raises(RsgwmError, match="weights sum to zero"):
        weighted_sum(random_deltas(2), [1.0, -1.0])
    assert weighted_sum([mx.array([3.0]), mx.array([1.0])], [1.0, -1.0], "none").item() == 2.0


entries = st.lists(st.floats(-4, 4, width=32).map(lambda x: round(x, 2)), min_size=4, max_size=4)


@given(values=st.lists(entries, min_size=2, max_size=5), election=st.sampled_from(sign_election.ELECTIONS))
@settings(max_examples=80, deadline=None)
def test_turning_every_sign_turns_the_result(values, election):
    updates = [mx.array([row]) for row in values]
    weights = [1.0 + 0.5 * index for index in range(len(values))]
    turned = elected_sum([-update for update in updates], weights, election)
    assert mx.array_equal(turned, -elected_sum(updates, weights, election))


@given(seed=st.integers(0, 99), factor=st.floats(0.01, 100), name=st.sampled_from(["ties", "breadcrumbs_ties", "sce"]))
@settings(max_examples=30, deadline=None)
def test_order_and_scale_do_not_matter(seed, factor, name):
    deltas = random_deltas(3, seed)
    merged = np.array(FAMILY[name].merge(deltas, WEIGHTS, KEY))
    assert np.allclose(np.array(FAMILY[name].merge(deltas[::-1], WEIGHTS[::-1], KEY)), merged, atol=1e-5)
    scaled = np.array(FAMILY[name].merge([delta * factor for delta in deltas], WEIGHTS, KEY))
    assert np.allclose(scaled, merged * factor, rtol=1e-4, atol=1e-5 * factor)


# --- the rows --------------------------------------------------------------------------------------------------------


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


# --- SCE -------------------------------------------------------------------------------------------------------------


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


# --- as methods of a module ------------------------------------------------------------------------------------------


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


# --- cost ------------------------------------------------------------------------------------------------------------


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
