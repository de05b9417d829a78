"""Ranking, calibration and risk–coverage, against scikit-learn, brute force and by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from mlx_rsgwm.core.scoring import (
    area_under_risk,
    area_under_roc,
    average_precision,
    brier,
    calibration_error,
    least_area_under_risk,
    risk_coverage,
)

ROWS = st.lists(st.tuples(st.integers(0, 10).map(lambda value: value / 10), st.booleans()), min_size=1, max_size=40)


def columns(rows):
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_what_scikit_learn_has_is_scikit_learns(rows):
    scores, correct = columns(rows)
    if correct.any() and not correct.all():
        assert area_under_roc(scores, correct) == pytest.approx(metrics.roc_auc_score(correct, scores), abs=1e-12)
    else:
        assert area_under_roc(scores, correct) is None
    if correct.any():
        expected = metrics.average_precision_score(correct, scores)
        assert average_precision(scores, correct) == pytest.approx(expected, abs=1e-12)
    else:
        assert average_precision(scores, correct) is None
    expected = metrics.brier_score_loss(correct, scores, pos_label=True)
    assert brier(scores, correct) == pytest.approx(expected, abs=1e-12)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_calibration_error_bin_by_bin(rows):
    bins = [[row for row in rows if min(int(row[0] * 10), 9) == b] for b in range(10)]
    expected = sum(
        len(b) / len(rows) * abs(sum(s for s, _ in b) / len(b) - sum(right for _, right in b) / len(b))
        for b in bins
        if b
    )
    assert calibration_error(*columns(rows)) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_by_hand():
    assert calibration_error([0.05, 0.05, 0.95, 0.95], [False, False, True, False]) == pytest.approx(
        (2 * 0.05 + 2 * 0.45) / 4
    )
    assert calibration_error([1.0, 0.0], [True, False]) == 0
    # two bins: |0.5 - 0.05| * 2/5 and |2/3 - 0.9667| * 3/5
    uneven = calibration_error([0.05, 0.05, 0.95, 0.95, 1.0], [False, True, True, True, False])
    assert uneven == pytest.approx(0.45 * 0.4 + abs(2 / 3 - 2.9 / 3) * 0.6)


def test_area_by_hand():
    assert area_under_roc([0.1, 0.9, 0.5, 0.8, 0.2, 0.7], [True, True, False, False, True, False]) == pytest.approx(
        1 / 3
    )


def brute_area(scores, correct):
    """Mean risk over all n coverages; among equal scores over every order."""
    risks = []
    for value in sorted(set(scores), reverse=True):
        reaching = scores >= value
        risks += [1 - correct[reaching].mean()] * int((scores == value).sum())
    return float(np.mean(risks))


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_risk_and_coverage(rows):
    scores, correct = columns(rows)
    points = risk_coverage(scores, correct)
    assert points[-1] == pytest.approx((1.0, 1 - correct.mean()))
    for (coverage, _), (wider, _) in itertools.pairwise(points):
        assert coverage < wider
    assert area_under_risk(scores, correct) == pytest.approx(brute_area(scores, correct))
    assert least_area_under_risk(len(rows), int(correct.sum())) <= area_under_risk(scores, correct) + 1e-12
