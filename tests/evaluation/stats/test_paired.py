"""Paired tests and what n can show, against counting, published figures and simulation."""

import math
import random

import numpy as np
import pytest

from mlx_rsgwm.evaluation.stats.paired import (
    fewest_discordant,
    holm,
    mcnemar,
    mean_difference,
    paired_bootstrap,
    smallest_difference,
)


def test_mcnemar_by_counting():
    first = [True] * 3 + [False] * 9 + [True] * 5
    second = [False] * 3 + [True] * 9 + [True] * 5
    found = mcnemar(first, second)
    tail = sum(math.comb(12, i) for i in range(4)) / 2**12
    assert (found.only_first, found.only_second) == (3, 9)
    assert found.p_value == pytest.approx(2 * tail)
    assert found.difference == pytest.approx(6 / 17)
    assert mcnemar([True], [True]).p_value == 1.0
    with pytest.raises(ValueError, match="one length"):
        mcnemar([True], [])


# What statsmodels 0.14 printed for these counts of discordant items.
@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 6, 0.03125),
        (1, 9, 0.021484375),
        (5, 12, 0.143463134765625),
        (10, 10, 1.0),
        (86, 150, 3.7159361395713866e-05),
    ],
)
def test_mcnemar_by_a_table(only_first, only_second, p_value):
    first, second = [True] * only_first + [False] * only_second, [False] * only_first + [True] * only_second
    assert mcnemar(first, second).p_value == pytest.approx(p_value, rel=1e-12)


def test_mcnemar_is_two_sided_and_never_above_one():
    assert mcnemar([True, False], [False, True]).p_value == 1.0
    assert mcnemar([True, False] * 3, [True] * 6).p_value == pytest.approx(2 * 0.5**3)


def test_fewest_discordant_is_six():
    assert fewest_discordant() == 6
    assert mcnemar([False] * 6 + [True], [True] * 7).p_value < 0.05
    assert mcnemar([False] * 5 + [True], [True] * 6).p_value > 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_holm_by_a_table():
    """The fifteen p-values of Benjamini and Hochberg (1995), and what statsmodels 0.14 made of them."""
    found = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1.0,
    ]
    corrected = [0.0015, 0.0056, 0.0247, 0.114, 0.2211, 0.278, 0.278, 0.278, 0.3213, 1, 1, 1, 1, 1, 1]
    assert holm(found) == pytest.approx(corrected, abs=1e-12)
    assert holm(found[::-1]) == pytest.approx(corrected[::-1], abs=1e-12)


def test_paired_bootstrap_sees_both_systems_on_the_same_items():
    rng = random.Random(1)
    first = [rng.random() for _ in range(80)]
    second = [value + 0.1 for value in first]
    found = paired_bootstrap(first, second, lambda rows: sum(rows) / len(rows), resamples=200)
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low < 1e-9  # unpaired it would be about 0.18
    assert paired_bootstrap([1], [1], lambda rows: None) is None
    with pytest.raises(ValueError, match="one length"):
        paired_bootstrap([1], [], lambda rows: 0.0)


def test_mean_difference_takes_items_as_units():
    rng = np.random.default_rng(0)
    first = rng.random((60, 1))
    second = np.clip(first + 0.2 + 0.05 * rng.standard_normal((60, 1)), 0, 2)
    once = mean_difference(first, second)
    copied = mean_difference(np.repeat(first, 5, axis=1), np.repeat(second, 5, axis=1))
    assert copied.n == once.n == 60
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert once.p_value < 0.01
    same = mean_difference(first, first)
    assert (same.value, same.p_value) == (0.0, 1.0)


def test_no_difference_is_seldom_significant():
    rng = np.random.default_rng(3)
    small = 0
    for seed in range(20):
        rows = (rng.random((40, 2)) < 0.5).astype(float)
        small += mean_difference(rows[:, :1], rows[:, 1:], seed=seed).p_value < 0.05
    assert small <= 4


@pytest.mark.parametrize(("n", "share"), [(100, 0.2), (200, 0.3), (400, 0.1)])
def test_smallest_difference_has_the_power_it_claims(n, share):
    gap = smallest_difference(n, share)
    rng = np.random.default_rng(n)
    draws = rng.multinomial(n, [(share + gap) / 2, (share - gap) / 2, 1 - share], size=4000)
    chi = (draws[:, 0] - draws[:, 1]) ** 2 / np.maximum(draws[:, 0] + draws[:, 1], 1)
    assert 0.75 < (chi > 1.96**2).mean() < 0.86
    assert smallest_difference(4 * n, share) < gap


def test_smallest_difference_where_nothing_can_be_shown():
    assert smallest_difference(100, 0.0) is None
    assert smallest_difference(10, 0.1) is None
    assert math.isfinite(smallest_difference(1000, 0.05))
