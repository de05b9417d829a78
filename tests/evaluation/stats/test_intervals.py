"""Intervals against published figures and brute force."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rsgwm.evaluation.stats.intervals import Rate, auroc, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(72, 100, 0.63, 0.80), (84, 100, 0.76, 0.90), (16, 20, 0.58, 0.92)]
)
def test_wilson_matches_the_specification(successes, n, low, high):
    rate = wilson(successes, n)
    assert (round(rate.low, 2), round(rate.high, 2)) == (low, high)
    assert rate.value == successes / n
    assert rate.n == n


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_closed_form(n, data):
    k = data.draw(st.integers(0, n))
    z, p = 1.959963984540054, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    rate = wilson(k, n)
    assert rate.low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert rate.high == pytest.approx(min(1, centre + half), abs=1e-9)


def test_wilson_of_nothing_and_bad_rates():
    assert wilson(0, 0) is None
    with pytest.raises(ValueError, match="not a rate"):
        Rate(1.2, 0, 1, 5)
    assert str(Rate(0.5, 0.25, 0.75, 4)) == "0.500 [0.250, 0.750]"
    assert Rate(0.5, 0.25, 0.75, 4).to_dict() == {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_auroc_brute_force_with_ties(rows):
    positives = [score for score, label in rows if label]
    negatives = [score for score, label in rows if not label]
    found = auroc([score for score, _ in rows], [label for _, label in rows], resamples=20)
    if not positives or not negatives:
        assert found is None
        return
    wins = sum((p > q) + 0.5 * (p == q) for p, q in itertools.product(positives, negatives))
    assert found.value == pytest.approx(wins / (len(positives) * len(negatives)))
    assert found.low <= found.value <= found.high
    assert found.n == len(rows)


def test_auroc_interval_is_seeded_and_widens_with_groups():
    random_source = random.Random(0)
    labels = [random_source.random() < 0.5 for _ in range(60)]
    scores = [random_source.random() + 0.3 * label for label in labels]
    once = auroc(scores, labels, seed=3)
    assert once == auroc(scores, labels, seed=3)
    assert 0 < once.high - once.low < 0.4
    # Every observation four times over looks four times as sure, unless the copies are resampled together.
    copies = auroc(scores * 4, labels * 4, seed=3)
    grouped = auroc(scores * 4, labels * 4, groups=list(range(60)) * 4, seed=3)
    assert copies.high - copies.low < 0.7 * (grouped.high - grouped.low)
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.2)


def test_auroc_refuses_bad_input():
    assert auroc([], []) is None
    with pytest.raises(ValueError, match="finite"):
        auroc([float("nan"), 1.0], [True, False])
    with pytest.raises(ValueError, match="one length"):
        auroc([1.0], [True, False])
