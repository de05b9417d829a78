"""The risk bound: its arithmetic, and that it holds as often as it says."""

from contextlib import suppress

import numpy as np
import pytest
from scipy.stats import binom

from mlx_rsgwm.core.errors import CheckFailed, RsgwmError
from mlx_rsgwm.inference.risk_control import Items, RiskBound, Target, accepts_needed, risk_bound, sequence, upper_bound


def drawn(rng, count, attempts=3, separation=2.0):
    """Items of very different difficulty, so that drafts of one item depend on each other."""
    easy = rng.beta(0.7, 0.7, count)[:, None]
    correct = rng.random((count, attempts)) < easy
    scores = 1 / (1 + np.exp(-(rng.standard_normal((count, attempts)) + separation * (correct - 0.5))))
    return Items(scores, correct)


def test_the_bound_is_clopper_pearson():
    for wrong, accepted in ((0, 45), (3, 80), (10, 40)):
        bound = upper_bound(wrong, accepted, 0.9)
        assert binom.cdf(wrong, accepted, bound) == pytest.approx(0.1)
    assert upper_bound(5, 5, 0.9) == 1
    assert upper_bound(0, 0, 0.9) == 1


@pytest.mark.parametrize(("far", "confidence", "needed"), [(0.05, 0.9, 45), (0.05, 0.95, 59), (0.2, 0.9, 11)])
def test_how_many_right_answers_a_bound_takes(far, confidence, needed):
    assert accepts_needed(far, confidence) == needed
    assert upper_bound(0, needed, confidence) <= far < upper_bound(0, needed - 1, confidence)


def test_items_are_counted_as_the_loop_accepts_them():
    scores = np.array([[0.2, 0.9, 0.95], [0.7, 0.1, 0.99], [0.1, 0.2, 0.3]])
    correct = np.array([[True, False, True], [True, False, False], [True, True, True]])
    items = Items(scores, correct)
    assert items.counts(0.8) == (2, 2)  # the second draft of the first item, the third of the second one
    assert items.counts(0.6) == (2, 1)
    assert items.counts(0.0) == (3, 0)
    assert items.counts(1.0) == (0, 0)
    with pytest.raises(ValueError, match="must be"):
        Items(scores, correct[:2])


def test_thresholds_start_safe_and_only_loosen():
    found = sequence(drawn(np.random.default_rng(1), 300), Target(0.1))
    assert found == sorted(found, reverse=True)
    assert len(found) > 5


def test_the_bound_holds():
    """Over 250 draws of 160 items a bound may fail on at most δ of them; and it must not be empty words."""
    rng = np.random.default_rng(7)
    truth = drawn(rng, 100_000)
    target = Target(0.2, 0.8)
    broken = bounded = 0
    for _ in range(250):
        try:
            found = risk_bound(drawn(rng, 80), drawn(rng, 80), target)
        except CheckFailed:
            continue
        bounded += 1
        accepted, wrong = truth.counts(found.threshold)
        broken += wrong / accepted > target.far
        assert found.bound <= target.far
        assert found.attempts == 3
    assert bounded > 100
    # 250 · δ = 50 expected at the most, with a standard deviation of 6
    assert broken <= 68


def test_choosing_and_testing_on_the_same_items_would_break_it():
    """Scores without information and half of the drafts wrong: whatever bound is below a half fails."""
    rng = np.random.default_rng(8)
    target, rounds, naive, bounded = Target(0.45, 0.8), 80, 0, 0
    for _ in range(rounds):
        items = drawn(rng, 80, separation=0.0)
        naive += any(upper_bound(*items.counts(t)[::-1], 0.8) <= 0.45 for t in np.unique(items.scores))
        with suppress(CheckFailed):
            risk_bound(drawn(rng, 40, separation=0.0), drawn(rng, 40, separation=0.0), target)
            bounded += 1
    assert naive > 0.3 * rounds
    assert bounded <= 0.2 * rounds


def test_too_few_items_are_told_how_many_it_takes():
    perfect = Items(np.full((20, 3), 0.9), np.ones((20, 3), dtype=bool))
    with pytest.raises(CheckFailed, match=r"0 of 20 accepted items were wrong.*takes 45 accepted ones.*about 90 cal"):
        risk_bound(perfect, perfect, Target(0.05))
    hopeless = Items(np.full((400, 1), 0.9), np.arange(400)[:, None] % 2 == 0)
    with pytest.raises(CheckFailed, match="not good enough"):
        risk_bound(hopeless, hopeless, Target(0.05))
    nothing = Items(np.zeros((0, 0)), np.zeros((0, 0), dtype=bool))
    with pytest.raises(CheckFailed, match="0 of 0"):
        risk_bound(nothing, nothing, Target(0.05))


def test_nonsense_is_refused():
    for far, confidence in ((0, 0.9), (1, 0.9), (0.1, 1.0)):
        with pytest.raises(RsgwmError, match="must be in"):
            Target(far, confidence)
    with pytest.raises(RsgwmError, match="does not hold"):
        RiskBound(0.5, 0.05, 0.9, 3, 100, 50, 5, 0.18)
    with pytest.raises(RsgwmError, match="cannot be"):
        RiskBound(0.5, 0.5, 0.9, 3, 100, 50, 60, 0.4)
