"""Which entries of an update are kept: masks, draws and rescaling, against slow references."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rsgwm.merging.steps.sparsify import (
    breadcrumbs_mask,
    drawn,
    keep_count,
    keep_probabilities,
    magnitude_mask,
    sparsified,
)
from tests.merging.elementwise_references import (
    KEY,
    random_deltas,
    reference_breadcrumbs,
    reference_magnitude,
    reference_probabilities,
    wide,
)


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
