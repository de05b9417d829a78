"""Means over strata (tasks, sweeps) with a bootstrap within each, for many candidates on the same items.

A stratum's resamples are drawn once, as how often each of its items came up, and serve every candidate: differences
are paired, and a statistic that is linear in the items costs one matrix product for all of its resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.evaluation.stats.bootstrap import percentile_interval


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap resamples, (resamples,) float64; NaN where a resample says nothing."""

    value: float
    resamples: np.ndarray

    def interval(self) -> tuple[float, float]:
        """The 95 % percentile interval, never without the estimate itself."""
        known = self.resamples[np.isfinite(self.resamples)]
        if not len(known):
            return self.value, self.value
        low, high = percentile_interval(known)
        return min(low, self.value), max(high, self.value)

    def to_dict(self, n: int) -> dict[str, Any]:
        """``{value, low, high, n}``."""
        low, high = self.interval()
        return {"value": self.value, "low": low, "high": high, "n": n}

    def minus(self, reference: Estimate) -> dict[str, Any]:
        """``{difference, low, high, tied}`` on the same resamples; tied where the interval holds 0."""
        if not np.isfinite(self.value):
            return {"difference": None, "low": None, "high": None, "tied": None}
        paired = Estimate(self.value - reference.value, self.resamples - reference.resamples)
        low, high = paired.interval()
        return {"difference": paired.value, "low": low, "high": high, "tied": low <= 0 <= high}

    def over(self, reference: Estimate) -> Estimate:
        """The ratio on the same resamples."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(self.value / reference.value, self.resamples / reference.resamples)


def item_counts(rng: np.random.Generator, items: int, resamples: int) -> np.ndarray:
    """How often each of a stratum's items is drawn in every resample: (resamples, items) int64."""
    return rng.multinomial(items, np.full(items, 1 / items), size=resamples)


def stratified_mean(strata: Sequence[Estimate]) -> Estimate:
    """The mean over the strata in which the statistic exists."""
    known = [stratum for stratum in strata if np.isfinite(stratum.value)]
    if not known:
        return Estimate(float("nan"), np.array([]))
    # A resample that leaves a stratum without one of the classes says nothing of that stratum.
    resamples = np.ma.masked_invalid(np.stack([stratum.resamples for stratum in known])).mean(axis=0)
    return Estimate(float(np.mean([stratum.value for stratum in known])), np.ma.filled(resamples, np.nan))


def item_mean(values: np.ndarray, counts: np.ndarray) -> Estimate:
    """Mean of (items,) values of one stratum."""
    return Estimate(float(values.mean()), counts @ values / len(values))


def item_ratio(above: np.ndarray, below: np.ndarray, counts: np.ndarray) -> Estimate:
    """Sum over sum of two (items,) columns of one stratum, such as nats per token."""
    return Estimate(float(above.sum() / below.sum()), (counts @ above) / (counts @ below))


def weighted_auroc(scores: np.ndarray, correct: np.ndarray, owners: np.ndarray, counts: np.ndarray) -> Estimate:
    """AUROC of answers (n,) within a stratum; a resample weighs every answer by how often its item was drawn.

    ``owners``: the position of each answer's item. The same figure as :func:`core.scoring.area_under_roc`, by counting
    pairs, since ranks cannot be weighted.
    """
    if not correct.any() or correct.all():
        return Estimate(float("nan"), np.array([]))
    right, wrong = scores[correct][:, None], scores[~correct][None, :]
    wins = (right > wrong) + 0.5 * (right == wrong)
    weights = counts[:, owners].astype(np.float64)
    positive, negative = weights[:, correct], weights[:, ~correct]
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = ((positive @ wins) * negative).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
    return Estimate(float(wins.mean()), drawn)
