"""Ranking, calibration and risk–coverage, against scikit-learn and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rsgwm.evaluation.verifier_quality import (
    area_under_risk,
    average_precision,
    brier,
    calibration_error,
    quality,
    reliability,
    risk_coverage,
)

ROWS = st.lists(st.tuples(st.integers(0, 10).map(lambda value: value / 10), st.booleans()), min_size=1, max_size=40)


def columns(rows):
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_average_precision_and_brier_are_scikit_learns(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, correct = columns(rows)
    if correct.any():
        assert average_precision(scores, correct) == pytest.approx(metrics.average_precision_score(correct, scores))
    else:
        assert average_precision(scores, correct) is None
    assert brier(scores, correct) == pytest.approx(np.mean((scores - correct) ** 2))


def brute_area(scores, correct):
    """Mean risk over all n coverages; among equal scores over every order."""
    risks = []
    for value in sorted(set(scores), reverse=True):
        kept = scores >= value
        risks += [1 - correct[kept].mean()] * int((scores == value).sum())
    return float(np.mean(risks))


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_risk_and_coverage(rows):
    scores, correct = columns(rows)
    points = risk_coverage(scores, correct)
    assert points[-1] == pytest.approx((1.0, 1 - correct.mean()))
    for (one, _), (other, _) in itertools.pairwise(points):
        assert one < other
    assert area_under_risk(scores, correct) == pytest.approx(brute_area(scores, correct))


def test_calibration_error_by_hand():
    scores = np.array([0.05, 0.05, 0.95, 0.95, 1.0])
    correct = np.array([False, True, True, True, False])
    # two bins: |0.5 - 0.05| * 2/5 and |2/3 - 0.9667| * 3/5
    assert calibration_error(scores, correct) == pytest.approx(0.45 * 0.4 + abs(2 / 3 - 2.9 / 3) * 0.6)
    first, last = reliability(scores, correct)
    assert (first.low, first.n, first.correct.value) == (0.0, 2, 0.5)
    assert (last.high, last.n) == (1.0, 3)


def test_a_perfect_and_a_useless_score():
    correct = [True, False] * 30
    perfect = quality([float(flag) for flag in correct], correct, [str(i) for i in range(60)])
    assert perfect.auroc.value == perfect.average_precision.value == 1.0
    assert perfect.brier.value == perfect.ece.value == 0.0
    assert perfect.aurc_best == pytest.approx(sum((i - 30) / i for i in range(31, 61)) / 60)
    ranked = quality([0.9 - i / 100 if i % 2 == 0 else 0.2 - i / 1000 for i in range(60)], correct, list("x" * 60))
    assert ranked.aurc.value == pytest.approx(ranked.aurc_best)
    useless = quality([0.5] * 60, correct, [str(i) for i in range(60)])
    assert useless.auroc.value == 0.5
    assert useless.aurc.value == pytest.approx(0.5)
    assert useless.ece.value == pytest.approx(0.0)
    assert quality([], [], []).n == 0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        quality([1.2], [True], ["a"])
