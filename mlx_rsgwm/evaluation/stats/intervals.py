"""Estimates that carry their error: Wilson intervals for shares, a bootstrap over items for everything else."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mlx_rsgwm.core.scoring import area_under_roc
from mlx_rsgwm.evaluation.stats.bootstrap import blocks_of, gatherer, percentile_interval, resampled

RESAMPLES = 1000


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


@lru_cache(maxsize=4096)  # a threshold sweep asks for the same few counts again and again
def wilson(successes: int, n: int) -> Rate | None:
    """Share of ``successes`` among ``n`` with Wilson's 95 % interval; None when there was nothing to count."""
    from scipy.stats import binomtest

    if n == 0:
        return None
    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(successes / n, max(0.0, float(interval.low)), min(1.0, float(interval.high)), n)


def share(successes: int, n: int) -> Rate:
    """:func:`wilson` where there is something to count."""
    rate = wilson(successes, n)
    assert rate is not None
    return rate


def bootstrapped(
    statistic: Callable[[np.ndarray], float | None],
    groups: Sequence[Hashable],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Rate | None:
    """A statistic in [0, 1] of observations given by their positions (n,), with a 95 % percentile bootstrap interval.

    ``groups`` (one key per observation) are resampled whole: the drafts of one question are not independent. A
    resample on which the statistic is None is left out. A statistic without spread has a point for an interval however
    few the items are: read it with ``n``. None where the statistic is None on the whole sample.
    """
    estimate = statistic(np.arange(len(groups))) if len(groups) else None
    if estimate is None:
        return None
    blocks = blocks_of(groups)
    if len(blocks) < 2:
        return Rate(estimate, 0.0, 1.0, len(groups))

    members = gatherer(blocks)

    def of(drawn: np.ndarray) -> float:
        value = statistic(members(drawn))
        return float("nan") if value is None else value

    drawn = resampled(of, len(blocks), seed, resamples)
    low, high = percentile_interval(drawn) if len(drawn) else (0.0, 1.0)
    return Rate(estimate, max(0.0, min(low, estimate)), min(1.0, max(high, estimate)), len(groups))


def auroc(
    scores: Sequence[float],
    labels: Sequence[bool],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Rate | None:
    """Probability that a positive scores above a negative, ties counting half; None when a class is missing.

    The interval is :func:`bootstrapped` over ``groups``.

    Raises:
        ValueError: lengths that differ, or a score that is not finite.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if values.shape != positive.shape or (groups is not None and len(groups) != len(values)):
        raise ValueError(f"scores {values.shape}, labels {positive.shape} and groups must have one length")
    if not np.all(np.isfinite(values)):
        raise ValueError("scores must be finite")
    return bootstrapped(
        lambda rows: area_under_roc(values[rows], positive[rows]),
        range(len(values)) if groups is None else groups,
        seed=seed,
        resamples=resamples,
    )
