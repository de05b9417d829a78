"""Tails of scores, and what they are in resamples: two arms are resampled together, by their items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_rsgwm.evaluation.tails.pareto import ParetoFits, fit

DEEPER = 5  # a tail of 1/20 beside one of 1/100


def tail_count(items: int, quantile: float) -> int:
    """How many of ``items`` scores are above the threshold at ``quantile``."""
    return round(items * (1 - quantile))


@dataclass(frozen=True)
class Tails:
    """The largest scores of B samples, (B, m) in falling order, of ``items`` scores each; their means (B,)."""

    largest: np.ndarray
    means: np.ndarray
    items: int

    def thresholds(self, quantile: float) -> np.ndarray:
        """(B,): the largest score that is not in the tail."""
        return self.largest[:, tail_count(self.items, quantile)]

    def excesses(self, quantile: float) -> np.ndarray:
        """What the tail's scores exceed the threshold by, (B, k)."""
        return self.largest[:, : tail_count(self.items, quantile)] - self.thresholds(quantile)[:, None]

    def fits(self, quantile: float) -> ParetoFits:
        """Generalised Pareto fits of the excesses."""
        return fit(self.excesses(quantile))

    def expected(self, quantile: float) -> np.ndarray:
        """(B,): the mean of the scores in the tail (conditional value at risk, expected shortfall)."""
        means: np.ndarray = self.largest[:, : max(tail_count(self.items, quantile), 1)].mean(axis=1)
        return means

    def depth(self, quantile: float) -> np.ndarray:
        """(B,): by how much a tail a fifth as heavy is farther from the mean than this one.

        Neither a shift nor a scale of the scores changes it: it is what mean and expected tail do not say.
        """
        deeper = 1 - (1 - quantile) / DEEPER
        ratio: np.ndarray = (self.expected(deeper) - self.means) / (self.expected(quantile) - self.means)
        return ratio


def tails_of(samples: np.ndarray, lowest_quantile: float) -> Tails:
    """Of samples (B, n), their tails down to ``lowest_quantile``."""
    items = samples.shape[1]
    count = tail_count(items, lowest_quantile) + 1
    largest = np.partition(samples, items - count, axis=1)[:, items - count :]
    return Tails(np.sort(largest, axis=1)[:, ::-1], samples.mean(axis=1), items)


def resampled_tails(arms: Sequence[np.ndarray], lowest_quantile: float, seed: int, resamples: int) -> list[Tails]:
    """Of every arm (n,) the tails of ``resamples`` bootstrap samples; the same items in all arms of one length."""
    return [_resampled(scores, lowest_quantile, seed, resamples) for scores in arms]


def _resampled(scores: np.ndarray, lowest_quantile: float, seed: int, resamples: int) -> Tails:
    random = np.random.default_rng([seed, len(scores)])  # so the items drawn are the same for the same length
    parts = [
        tails_of(scores[random.integers(0, len(scores), len(scores))][None], lowest_quantile) for _ in range(resamples)
    ]
    largest, means = (np.concatenate([getattr(part, name) for part in parts]) for name in ("largest", "means"))
    return Tails(largest, means, len(scores))
