"""Combination and calibration of scores: what is fitted, that it keeps the order, that it says no to nonsense."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.inference.draft import Signals
from mlx_rsgwm.inference.scores import (
    CURVE_METHODS,
    FEATURES,
    Combination,
    Curve,
    Scorer,
    features,
    fit_combination,
    fit_curve,
    logit,
    out_of_fold,
    sigmoid,
)
from mlx_rsgwm.inference.verifier import EMPTY

COUNT = 4000


def labelled(slope, intercept):
    """Raw scores with labels drawn from sigmoid(slope · logit(raw) + intercept)."""
    rng = np.random.default_rng(5)
    raw = rng.uniform(0.02, 0.98, COUNT)
    chance = sigmoid(slope * logit(raw) + intercept)
    return raw, rng.random(COUNT) < chance, chance


def test_features_are_finite_at_the_edges():
    found = features([Signals(1.0, EMPTY, EMPTY, 0), Signals(0.0, 0.0, 0.0, 9)])
    assert found.shape == (2, len(FEATURES))
    assert np.isfinite(found).all()
    with pytest.raises(ValueError, match="needs the verdict"):
        features([Signals(None, -1.0, -1.0, 3)])


def test_the_combination_finds_the_weights_that_made_the_labels():
    rng = np.random.default_rng(5)
    signals = [
        Signals(float(y), float(m), float(m - d), int(n))
        for y, m, d, n in zip(rng.uniform(0.05, 0.95, COUNT), -rng.exponential(0.3, COUNT), rng.exponential(2, COUNT),
                              rng.integers(5, 40, COUNT), strict=True)
    ]  # fmt: skip
    found = features(signals)
    true = np.array([0.5, 3.0, 0.8, -0.02])
    labels = rng.random(COUNT) < sigmoid(found @ true + 1.5)
    fitted = fit_combination(signals, labels)
    assert np.array(fitted.coefficients) / np.array(fitted.scales) == pytest.approx(true, rel=0.25, abs=0.02)
    wrong, right = fitted.values([Signals(0.1, -2.0, -8.0, 20), Signals(0.9, -0.01, -0.1, 20)])
    assert wrong < 0.05
    assert right > 0.8


@pytest.mark.parametrize(("method", "slope", "intercept"), [("temperature", 0.4, 0.0), ("platt", 0.5, -1.0),
                                                            ("isotonic", 2.0, 1.0)])  # fmt: skip
def test_a_curve_finds_the_probabilities_that_made_the_labels(method, slope, intercept):
    raw, labels, chance = labelled(slope, intercept)
    curve = fit_curve(method, raw, labels)
    assert np.abs(curve.probabilities(raw) - chance).mean() < 0.03
    assert np.abs(raw - chance).mean() > 0.08
    if method == "platt":
        assert (curve.slope, curve.intercept) == (pytest.approx(slope, abs=0.1), pytest.approx(intercept, abs=0.1))


@pytest.mark.parametrize("method", CURVE_METHODS)
@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]])
def test_a_curve_never_reorders_drafts(method, labels):
    raw = np.array([0.1, 0.2, 0.4, 0.6, 0.9, 0.95])
    curve = fit_curve(method, raw, np.array(labels, dtype=bool))
    grid = np.linspace(0.001, 0.999, 200)
    found = curve.probabilities(grid)
    assert (np.diff(found) > 0).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_score_that_errs_backwards_is_calibrated_to_the_share_of_right_drafts():
    raw, labels, _ = labelled(-1.0, 0.5)
    found = fit_curve("platt", raw, labels).probabilities(raw)
    assert found.min() == pytest.approx(labels.mean(), abs=0.01)
    assert found.max() == pytest.approx(labels.mean(), abs=0.01)


def test_perfect_separation_stays_finite():
    curve = fit_curve("platt", [0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    assert 0.5 < curve.probabilities([0.9])[0] < 0.95
    assert np.isfinite([curve.slope, curve.intercept]).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_scores_and_probabilities_stay_in_the_unit_interval(values):
    scores = Scorer("yesno").values([Signals(value, None, None, 0) for value in values])
    assert scores.tolist() == values
    for curve in (Curve("platt", 3.0, -2.0), Curve("isotonic", points=((0.0, 0.0), (0.5, 0.9), (1.0, 1.0)))):
        assert all(0 <= value <= 1 for value in curve.probabilities(scores))


def test_a_scorer_says_what_it_needs():
    combination = Combination((0.0,) * 4, (1.0,) * 4, (1.0, 0.0, 0.0, 0.0), 0.0)
    needs = {one.name: one.needs for one in (Scorer("yesno"), Scorer("mean_logprob"), Scorer("combined", combination))}
    assert needs == {"yesno": (True, False), "mean_logprob": (False, True), "combined": (True, True)}
    assert Scorer("mean_logprob").value(Signals(None, -0.5, -2.0, 3)) == pytest.approx(np.exp(-0.5))
    assert Scorer("combined", combination).value(Signals(0.8, -0.5, -2.0, 3)) == pytest.approx(0.8)


def test_what_is_refused():
    with pytest.raises(RsgwmError, match="rsgwm calibrate"):
        Scorer("combined")
    with pytest.raises(RsgwmError, match="score must be one of"):
        Scorer("vibes")
    with pytest.raises(RsgwmError, match="scales must be above 0"):
        Combination((0.0,) * 4, (0.0,) * 4, (1.0,) * 4, 0.0)
    with pytest.raises(RsgwmError, match="4 numbers, found 2"):
        Combination((0.0,) * 2, (1.0,) * 4, (1.0,) * 4, 0.0)
    for values, message in (
        ({"method": "magic"}, "method must be"),
        ({"method": "platt", "slope": -1.0}, "slope must be above 0"),
        ({"method": "isotonic"}, "needs points"),
        ({"method": "isotonic", "points": ((0.5, 0.5), (0.4, 0.6))}, "points must rise"),
        ({"method": "isotonic", "points": ((0.5, 1.5),)}, "numbers in"),
    ):
        with pytest.raises(RsgwmError, match=message):
            Curve(**values)


def test_predictions_come_from_fits_that_have_not_seen_the_item():
    items = np.repeat(np.arange(10), 3)
    labels = np.tile([True, False, True], 10)
    seen = []

    def fit(train):
        known = set(items[train])

        def predict(test):
            seen.append(known & set(items[test]))
            return items[test].astype(float)

        return predict

    found = out_of_fold(items, labels, 0, fit)
    assert found.tolist() == items.tolist()
    assert seen == [set()] * 5
    assert out_of_fold(items, np.ones(30, dtype=bool), 0, fit) is None
    assert out_of_fold(np.zeros(3, dtype=int), labels[:3], 0, fit) is None
