"""How well scores tell right from wrong: ranking, distance from a probability, and what refusing the doubtful buys.

Point estimates of NumPy arrays, here because inference (calibration), audits and evaluation all need them; their
intervals and tests are in ``evaluation/stats``. SciPy ranks; scikit-learn has AUROC, average precision and Brier too,
but checks its input anew at each of a bootstrap's thousand calls, so that the tests compare with it instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BINS = 10

Values = Sequence[float] | np.ndarray
Labels = Sequence[bool] | np.ndarray


def area_under_roc(scores: Values, correct: Labels) -> float | None:
    """AUROC as Mann–Whitney U over the number of pairs, ties counted half; None when all or none are correct."""
    from scipy.stats import rankdata

    positive = np.asarray(correct, dtype=bool)
    count = int(positive.sum())
    pairs = count * (len(positive) - count)
    if not pairs:
        return None
    rank_sum = float(rankdata(scores)[positive].sum())
    return (rank_sum - count * (count + 1) / 2) / pairs


def brier(scores: Values, correct: Labels) -> float:
    """Mean squared distance of the score from 1 (right) or 0 (wrong)."""
    return float(((np.asarray(scores, dtype=np.float64) - np.asarray(correct)) ** 2).mean())


def bin_of(scores: Values, bins: int = BINS) -> np.ndarray:
    """The bin of every score in [0, 1], of ``bins`` of equal width; the last one holds 1 too. (n,) int64."""
    return np.minimum((np.asarray(scores, dtype=np.float64) * bins).astype(int), bins - 1)


def calibration_error(scores: Values, correct: Labels, bins: int = BINS) -> float:
    """Expected calibration error: |mean score − share of right| of every bin, weighted by its size."""
    gaps, place = np.asarray(scores, dtype=np.float64) - np.asarray(correct), bin_of(scores, bins)
    return float(sum(abs(gaps[place == b].sum()) for b in np.unique(place)) / len(gaps))


def average_precision(scores: np.ndarray, correct: np.ndarray) -> float | None:
    """Mean precision over the recall gained at each distinct score from the highest down; None without right ones.

    ``scores`` (n,) float, ``correct`` (n,) bool; scikit-learn's ``average_precision_score``.
    """
    total = int(correct.sum())
    if not total:
        return None
    accepted, right = _from_the_top(scores, correct)
    gained = np.diff(right, prepend=0) / total
    return float((right / accepted * gained).sum())


def risk_coverage(scores: np.ndarray, correct: np.ndarray) -> tuple[tuple[float, float], ...]:
    """(coverage, risk) at every distinct score, from the highest down; equal scores are accepted or left together."""
    accepted, right = _from_the_top(scores, correct)
    points = zip(accepted / len(scores), 1 - right / accepted, strict=True)
    return tuple((float(coverage), float(risk)) for coverage, risk in points)


def area_under_risk(scores: np.ndarray, correct: np.ndarray) -> float:
    """Mean risk over the coverages 1/n … 1, of ``scores`` (n,) float and ``correct`` (n,) bool; within equal scores the
    risk is that of the whole run."""
    accepted, right = _from_the_top(scores, correct)
    return float(((1 - right / accepted) * np.diff(accepted, prepend=0)).sum() / len(scores))


def least_area_under_risk(n: int, correct: int) -> float:
    """What :func:`area_under_risk` would be if every right one scored above every wrong one."""
    return sum(max(0, accepted - correct) / accepted for accepted in range(1, n + 1)) / n


def _from_the_top(scores: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At every distinct score, from the highest down: how many reach it, and how many of these are right."""
    order = np.argsort(-scores, kind="stable")
    run_ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    return run_ends + 1, np.cumsum(correct[order])[run_ends]
