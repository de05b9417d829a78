"""Gates on synthetic scorers: what passes, and which gate ends each of the others."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.tails.gates import FEWEST, Settings, judge_tail, judge_tails
from mlx_rsgwm.evaluation.tails.pareto import draw, needed
from mlx_rsgwm.evaluation.tails.resampling import resampled_tails, tails_of

SETTINGS = Settings(resamples=99)
ITEMS = round(needed(0.10) / 0.05) + 20
NAMES = ("A", "B")


@pytest.fixture
def random():
    return np.random.default_rng(1)


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def test_a_real_difference_passes_at_its_planned_number(random):
    heavy, light = (draw(shape, 1.0, (2, ITEMS), random) for shape in (0.2, 0.0))
    verdict = judge_tails(NAMES, (light[0], heavy[0]), SETTINGS, (light[1], heavy[1]))
    assert (verdict.verdict, [gate.passed for gate in verdict.gates]) == ("PASS", [True] * 5)
    assert verdict.differences[0].value == pytest.approx(0.2, abs=0.08)
    json.dumps(verdict.to_dict())


def test_without_a_second_scorer_it_is_not_decided(random):
    heavy, light = (draw(shape, 1.0, (ITEMS,), random) for shape in (0.2, 0.0))
    verdict = judge_tails(NAMES, (light, heavy), SETTINGS)
    assert (verdict.verdict, verdict.gate) == ("INCONCLUSIVE", 5)
    assert "--second" in verdict.reason


def test_an_effect_that_another_scorer_does_not_see_is_rejected(random):
    heavy, *light = (draw(shape, 1.0, (ITEMS,), random) for shape in (0.25, 0.0, 0.0, 0.0))
    verdict = judge_tails(NAMES, (light[0], heavy), SETTINGS, (light[1], light[2]))
    assert (verdict.verdict, verdict.gate) == ("REJECT", 5)


def test_equal_arms_are_equivalent(random):
    first, second = draw(0.1, 1.0, (2, 2 * ITEMS), random)
    assert judge_tails(NAMES, (first, second), SETTINGS).verdict == "EQUIVALENT"


def test_saturated_scores_fail_at_the_first_gates_and_their_logits_do_not(random):
    raw = random.normal(0, 4, (2, ITEMS))
    verdict = judge_tails(NAMES, sigmoid(raw), SETTINGS)
    assert verdict.verdict == "REJECT"
    assert verdict.gate in (1, 2)
    assert judge_tail("A", raw[0], SETTINGS).gate not in (1, 2)


def test_scores_with_a_cap_or_few_values_are_named(random):
    capped = np.minimum(random.exponential(size=ITEMS), 4.0)
    assert "cap" in judge_tail("A", capped, SETTINGS).reason
    rounded = np.round(random.exponential(size=ITEMS), 1)
    assert "differ from each other" in judge_tail("A", rounded, SETTINGS).reason


def test_a_difference_seen_at_two_thousand_and_gone_at_thirty_thousand(random):
    """Of many small pilots some show a difference in ξ of .2; gate 1 says that they are too small to tell."""
    arms = draw(0.1, 1.0, (2, 31_500), random)
    pilots = []
    for start in range(0, 31_500, 4500):
        pilot = arms[:, start : start + 4500]
        shapes = [tails_of(arm[None], 0.95).fits(0.95).shapes[0] for arm in pilot]
        pilots.append((abs(shapes[1] - shapes[0]), pilot))
    largest, pilot = max(pilots, key=lambda pair: pair[0])
    assert largest > 0.1
    verdict = judge_tails(NAMES, pilot, SETTINGS)
    assert (verdict.verdict, verdict.gate) == ("REJECT", 1)
    assert "1570" in verdict.reason
    assert judge_tails(NAMES, arms, SETTINGS).verdict in ("EQUIVALENT", "INCONCLUSIVE")


def test_what_one_threshold_alone_shows_is_rejected_as_unstable():
    """Two arms of one distribution, of a seed with which they differ by .114 in ξ where the tail is said to begin."""
    first, second = draw(0.1, 1.0, (2, ITEMS), np.random.default_rng(217))
    shapes = [tails_of(arm[None], 0.95).fits(0.95).shapes[0] for arm in (first, second)]
    assert abs(shapes[1] - shapes[0]) > SETTINGS.effect
    verdict = judge_tails(NAMES, (first, second), SETTINGS)
    assert (verdict.verdict, verdict.gate) == ("REJECT", 3)
    assert "2 of 5 thresholds" in verdict.reason
    assert verdict.gates[3].passed  # the effect, at that threshold


def test_a_bump_below_the_top_is_no_tail(random):
    light, bumped = random.exponential(size=(2, ITEMS))
    order = np.argsort(bumped)
    tail = order[-round(0.05 * ITEMS) : -round(0.02 * ITEMS)]
    bumped[tail] = bumped[tail].min() + 0.25 * (bumped[tail] - bumped[tail].min())
    verdict = judge_tails(NAMES, (light, bumped), SETTINGS)
    assert (verdict.verdict, verdict.gate) == ("REJECT", 2)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (np.ones(9000), "constant"),
        (np.r_[np.arange(9000.0), np.nan], "not finite"),
        (np.arange(3000.0), "4000 scores"),
    ],
)
def test_what_cannot_be_judged_is_said(scores, words):
    with pytest.raises(RsgwmError, match=words):
        judge_tail("A", scores, SETTINGS)


def test_resamples_take_the_same_items_in_both_arms(random):
    scores = random.normal(size=500)
    first, second = resampled_tails((scores, scores + 1.0), 0.9, 0, 20)
    np.testing.assert_allclose(second.largest, first.largest + 1.0)
    assert len(np.unique(first.means)) == 20


def test_depth_is_what_shift_and_scale_leave(random):
    scores = random.exponential(size=(1, 2000))
    tails, moved = (tails_of(values, 0.9) for values in (scores, 3.0 * scores - 7.0))
    np.testing.assert_allclose(tails.depth(0.95), moved.depth(0.95))
    top = np.sort(scores[0])[::-1]
    expected = (top[:20].mean() - scores.mean()) / (top[:100].mean() - scores.mean())
    assert tails.depth(0.95)[0] == pytest.approx(expected)


@pytest.mark.slow
def test_equal_arms_pass_as_different_in_at_most_a_twentieth(random):
    items = round(max(needed(0.3), FEWEST) / 0.05) + 20
    settings = Settings(effect=0.3, resamples=199)
    passed = sum(
        judge_tails(NAMES, draw(0.1, 1.0, (2, items), random), settings, draw(0.1, 1.0, (2, items), random)).verdict
        == "PASS"
        for _ in range(400)
    )
    assert passed <= 20
