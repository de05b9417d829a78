"""Stratified estimates: every resample against the plain statistic of the items it drew."""

import numpy as np
import pytest

from mlx_rsgwm.core.scoring import area_under_roc
from mlx_rsgwm.evaluation.stats.stratified import (
    Estimate,
    item_counts,
    item_mean,
    item_ratio,
    stratified_mean,
    weighted_auroc,
)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def drawn_items(counts):
    return np.repeat(np.arange(len(counts)), counts)


def test_every_resample_is_the_statistic_of_its_items(rng):
    counts, above, below = item_counts(rng, 12, 20), rng.random(12), rng.random(12) + 1
    mean, ratio = item_mean(above, counts), item_ratio(above, below, counts)
    assert counts.shape == (20, 12)
    assert (counts.sum(axis=1) == 12).all()
    assert (mean.value, ratio.value) == (above.mean(), above.sum() / below.sum())
    for place, row in enumerate(counts):
        items = drawn_items(row)
        assert mean.resamples[place] == pytest.approx(above[items].mean(), abs=1e-12)
        assert ratio.resamples[place] == pytest.approx(above[items].sum() / below[items].sum(), abs=1e-12)


def test_weighted_auroc_is_that_of_the_repeated_answers(rng):
    owners = np.repeat(np.arange(10), 3)
    scores, correct = rng.integers(0, 5, 30) / 4, rng.random(30) < 0.5
    counts = item_counts(rng, 10, 25)
    estimate = weighted_auroc(scores, correct, owners, counts)
    assert estimate.value == pytest.approx(area_under_roc(scores, correct), abs=1e-12)
    for place, row in enumerate(counts):
        answers = np.repeat(np.arange(30), row[owners])
        assert estimate.resamples[place] == pytest.approx(area_under_roc(scores[answers], correct[answers]), abs=1e-12)
    assert np.isnan(weighted_auroc(scores, np.ones(30, dtype=bool), owners, counts).value)


def test_a_stratum_that_says_nothing_is_left_out_of_the_mean():
    known = Estimate(0.5, np.array([0.4, np.nan, 0.6]))
    other = Estimate(0.7, np.array([0.6, 0.8, np.nan]))
    mean = stratified_mean([known, Estimate(float("nan"), np.array([])), other])
    assert mean.value == pytest.approx(0.6)
    assert mean.resamples == pytest.approx([0.5, 0.8, 0.6])
    assert np.isnan(stratified_mean([]).value)


def test_differences_are_paired():
    first = Estimate(0.5, np.array([0.1, 0.9, 0.5]))
    second = Estimate(0.6, first.resamples + 0.1)
    gap = second.minus(first)
    assert (gap["difference"], gap["low"], gap["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert gap["tied"] is False
    assert first.minus(first)["tied"] is True
    assert Estimate(float("nan"), np.array([])).minus(first)["tied"] is None
    assert second.over(second).to_dict(3) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
