"""Strategies of the mergeability study on outcomes made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mlx_rsgwm.bench.mergeability import decisions
from mlx_rsgwm.probe.features import Examples

PAIRS = (("a", "b"), ("a", "c"), ("b", "c"))


def fitted(measured, predicted):
    """What of a fit the strategies look at."""
    sets = (*PAIRS, ("a", "b", "c"))  # which is no pair
    y = np.array([*measured, 0.0])
    examples = Examples(("x",), np.zeros((4, 1)), y, sets, tuple(map(frozenset, sets)))
    guess = np.array([*predicted, 0.0])
    return SimpleNamespace(examples=examples, validation=SimpleNamespace(predicted=guess, measured=y))


def test_strategies_by_hand():
    told = decisions(
        {
            "linear": fitted([0.97, 0.90, 0.50], [0.97, 0.90, 0.50]),
            "norm_equalised": fitted([0.97, 0.94, 0.60], [0.97, 0.94, 0.60]),
        }
    )
    assert told["always linear"] == pytest.approx(
        {"sets": 3, "retention": 2.37 / 3, "worst": 0.5, "adapters_resident": 1, "cost": (0 + 0.05 + 0.45) / 3,
         "regret": (0.05 - 0.02 + 0.45 - 0.10) / 3}
    )  # fmt: skip
    assert told["always route"] == pytest.approx(
        {"sets": 3, "retention": 1, "worst": 1, "adapters_resident": 2, "cost": 0.10, "regret": (0.10 + 0.08) / 3}
    )
    # Forecasts are exact, so what is decided is the oracle's: merge, reweight, route.
    assert told["decided"] == told["oracle"]
    assert told["oracle"] == pytest.approx(
        {"sets": 3, "retention": (0.97 + 0.94 + 1) / 3, "worst": 0.94, "adapters_resident": 4 / 3,
         "cost": (0 + 0.02 + 0.10) / 3, "regret": 0}
    )  # fmt: skip


def test_a_wrong_forecast_is_paid_for():
    told = decisions({"linear": fitted([0.97, 0.50, 0.97], [0.97, 0.97, 0.97])})
    # One of four forecasts is .47 too high, so that merging is expected to lose .45 / 4, more than routing costs.
    assert told["decided"]["adapters_resident"] == 2
    assert told["decided"]["regret"] == pytest.approx((0.10 + 0 + 0.10) / 3)


def test_larger_sets_are_told_apart_from_pairs():
    told = decisions({"linear": fitted([0.97, 0.90, 0.50], [0.97, 0.90, 0.50])}, larger=True)
    assert (told["always linear"]["sets"], told["always linear"]["retention"]) == (1, 0.0)
    assert told["always route"]["adapters_resident"] == 3
