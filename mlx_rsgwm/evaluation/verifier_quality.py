"""How good a verifier's score is: ranking, calibration, and what refusing the doubtful answers would buy.

``mean_logprob`` is no probability of being right; Brier score and calibration error say how far it is from one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.evaluation.metrics import score_names, scored_drafts
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.evaluation.stats.intervals import Rate, auroc, bootstrapped, wilson

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Scores in [low, high): how many, their mean, and the share of right answers among them."""

    low: float
    high: float
    n: int
    mean_score: float
    correct: Rate


@dataclass(frozen=True)
class Quality:
    """One score on one set of drafts.

    ``risk_coverage`` is a list of (coverage, risk): the share of drafts with the highest scores, and the share of wrong
    ones among them. ``aurc`` is the area under it, ``aurc_best`` that of a perfect ranking, and the risk at coverage 1
    is that of a random one.
    """

    n: int
    correct: int
    auroc: Rate | None
    average_precision: Rate | None
    brier: Rate | None
    ece: Rate | None
    bins: tuple[Bin, ...]
    risk_coverage: tuple[tuple[float, float], ...]
    aurc: Rate | None
    aurc_best: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def average_precision(scores: np.ndarray, correct: np.ndarray) -> float | None:
    """Mean precision over the recall gained at each distinct score from the highest down; None without right drafts."""
    total = int(correct.sum())
    if not total:
        return None
    kept, right, at_end = _from_the_top(scores, correct)
    precision = right / kept
    gained = np.diff(right[at_end], prepend=0) / total
    return float((precision[at_end] * gained).sum())


def _from_the_top(scores: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts kept and right counts, by falling score, and where a run of equal scores ends."""
    order = np.argsort(-scores, kind="stable")
    kept = np.arange(1, len(scores) + 1)
    at_end = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    return kept, np.cumsum(correct[order]), at_end


def brier(scores: np.ndarray, correct: np.ndarray) -> float:
    """Mean squared distance of the score from 1 (right) or 0 (wrong)."""
    return float(((scores - correct) ** 2).mean())


def calibration_error(scores: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean |share right − mean score| over ``bins`` of equal width, by their size."""
    index = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = [abs(correct[index == b].mean() - scores[index == b].mean()) * (index == b).mean() for b in np.unique(index)]
    return float(sum(gaps))


def reliability(scores: np.ndarray, correct: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """The filled bins behind :func:`calibration_error`."""
    index = np.minimum((scores * bins).astype(int), bins - 1)
    found = []
    for b in np.unique(index):
        members = index == b
        rate = wilson(int(correct[members].sum()), int(members.sum()))
        assert rate is not None
        found.append(Bin(float(b / bins), float((b + 1) / bins), rate.n, float(scores[members].mean()), rate))
    return tuple(found)


def risk_coverage(scores: np.ndarray, correct: np.ndarray) -> tuple[tuple[float, float], ...]:
    """(coverage, risk) at every distinct score, from the highest down; equal scores are kept or left out together."""
    kept, right, at_end = _from_the_top(scores, correct)
    risk = 1 - right / kept
    return tuple((float(kept[i] / len(scores)), float(risk[i])) for i in at_end)


def area_under_risk(scores: np.ndarray, correct: np.ndarray) -> float:
    """Mean risk over the coverages 1/n … 1; within equal scores the risk is that of the whole run."""
    kept, right, at_end = _from_the_top(scores, correct)
    risk = (1 - right / kept)[at_end]
    return float((risk * np.diff(kept[at_end], prepend=0)).sum() / len(scores))


def least_area_under_risk(n: int, correct: int) -> float:
    """What :func:`area_under_risk` would be if every right draft scored above every wrong one."""
    return sum(max(0, kept - correct) / kept for kept in range(1, n + 1)) / n


def quality(scores: Sequence[float], correct: Sequence[bool], groups: Sequence[str], seed: int = 0) -> Quality:
    """Every measure of one score; intervals resample ``groups`` (items) whole.

    Raises:
        ValueError: scores outside [0, 1], which are no verifier's.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=bool)
    if len(values) and not (np.all(np.isfinite(values)) and values.min() >= 0 and values.max() <= 1):
        raise ValueError("verifier scores must lie in [0, 1]")
    if not len(values):
        return Quality(0, 0, None, None, None, None, (), (), None, None)

    def rate(statistic: Any) -> Rate | None:
        return bootstrapped(lambda rows: statistic(values[rows], labels[rows]), groups, seed=seed, resamples=400)

    return Quality(
        n=len(values),
        correct=int(labels.sum()),
        auroc=auroc(scores, correct, groups=groups, seed=seed),
        average_precision=rate(average_precision),
        brier=rate(brier),
        ece=rate(calibration_error),
        bins=reliability(values, labels),
        risk_coverage=risk_coverage(values, labels),
        aurc=rate(area_under_risk),
        aurc_best=least_area_under_risk(len(labels), int(labels.sum())),
    )


def verifier_quality(records: Sequence[ItemRecord], seed: int = 0) -> dict[str, dict[str, Quality]]:
    """For every score: its quality on ``all`` recorded drafts and on the ``first`` ones. Without an answer a draft is
    not right."""
    return {
        name: {
            label: quality(*scored_drafts(records, name, count), seed=seed)
            for label, count in (("all", None), ("first", 1))
        }
        for name in score_names(records)
    }
