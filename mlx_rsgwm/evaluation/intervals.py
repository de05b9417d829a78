"""Estimates that carry their error: Wilson intervals, the exact paired McNemar test, bootstrapped AUROC."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.pipeline.calibration import area_under_roc


@dataclass(frozen=True)
class Rate:
    """An estimate in [0, 1] with its 95 % interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.low <= self.high <= 1 or not 0 <= self.value <= 1:
            raise ValueError(f"not a rate: {self.value} [{self.low}, {self.high}] with n = {self.n}")

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, Any]:
        """``{value, low, high, n}``."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(successes: int, n: int) -> Rate | None:
    """Share of ``successes`` among ``n`` with Wilson's 95 % interval; None when there was nothing to count."""
    from scipy.stats import binomtest

    if n == 0:
        return None
    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(successes / n, max(0.0, float(interval.low)), min(1.0, float(interval.high)), n)


@dataclass(frozen=True)
class PairedTest:
    """Two systems on the same items: how often only one of them is right, and the exact two-sided p-value."""

    n: int
    only_first: int
    only_second: int
    difference: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "difference": self.difference,
            "p_value": self.p_value,
        }


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Exact McNemar test; ``difference`` is the accuracy of ``second`` minus that of ``first``.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    from scipy.stats import binomtest

    if len(first) != len(second) or not first:
        raise ValueError(f"paired results must have one length above 0, found {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return PairedTest(len(first), only_first, only_second, (only_second - only_first) / len(first), p_value)


def auroc(
    scores: Sequence[float],
    labels: Sequence[bool],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Rate | None:
    """Probability that a positive scores above a negative, ties counting half; None when a class is missing.

    The interval is the 95 % percentile bootstrap. ``groups`` (one key per score) are resampled whole: the drafts of
    one question are not independent. A resample without one of the classes is left out. A perfect separation has
    no spread to resample, so its interval is a point however few the items are: read it with ``n``.

    Raises:
        ValueError: lengths that differ, or a score that is not finite.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if values.shape != positive.shape or (groups is not None and len(groups) != len(values)):
        raise ValueError(f"scores {values.shape}, labels {positive.shape} and groups must have one length")
    if not np.all(np.isfinite(values)):
        raise ValueError("scores must be finite")
    estimate = area_under_roc(values, positive)
    if estimate is None:
        return None
    keys = list(range(len(values))) if groups is None else list(groups)
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    blocks = [np.asarray(block) for block in members.values()]
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        chosen = np.concatenate([blocks[i] for i in random.integers(len(blocks), size=len(blocks))])
        value = area_under_roc(values[chosen], positive[chosen])
        if value is not None:
            drawn.append(value)
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (0.0, 1.0)
    return Rate(estimate, min(float(low), estimate), max(float(high), estimate), len(values))
