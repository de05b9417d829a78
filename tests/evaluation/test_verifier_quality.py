"""All measures of one verifier score together: bins by hand, a perfect and a useless score."""

import numpy as np
import pytest

from mlx_rsgwm.evaluation.verifier_quality import quality, reliability


def test_bins_by_hand():
    scores = np.array([0.05, 0.05, 0.95, 0.95, 1.0])
    correct = np.array([False, True, True, True, False])
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
