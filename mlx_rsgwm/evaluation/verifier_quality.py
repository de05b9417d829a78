"""How good a verifier's score is: ranking, calibration, and what refusing the doubtful answers would buy.

``mean_logprob`` is no probability of being right; Brier score and calibration error say how far it is from one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.core.scoring import (
    BINS,
    area_under_risk,
    average_precision,
    bin_of,
    brier,
    calibration_error,
    least_area_under_risk,
    risk_coverage,
)
from mlx_rsgwm.evaluation.calculator import Passes, calculates_rightly
from mlx_rsgwm.evaluation.metrics import score_names, scored_drafts
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.evaluation.stats.intervals import Rate, auroc, bootstrapped, share


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


def reliability(scores: np.ndarray, correct: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """The filled bins behind :func:`calibration_error`, of ``scores`` (n,) in [0, 1] and ``correct`` (n,) bool."""
    place, filled = bin_of(scores, bins), []
    for b in np.unique(place):
        members = place == b
        rate = share(int(correct[members].sum()), int(members.sum()))
        filled.append(Bin(float(b / bins), float((b + 1) / bins), rate.n, float(scores[members].mean()), rate))
    return tuple(filled)


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


def verifier_quality(
    records: Sequence[ItemRecord], seed: int = 0, passes: Passes = calculates_rightly
) -> dict[str, dict[str, Quality]]:
    """For every score: its quality on ``all`` recorded drafts, on the ``first`` ones, and on those without a false
    equation (``passed``), where a calculator is blind. Without an answer a draft is not right."""
    subsets: dict[str, tuple[int | None, Passes | None]] = {
        "all": (None, None),
        "first": (1, None),
        "passed": (None, passes),
    }
    return {
        name: {label: quality(*scored_drafts(records, name, *subset), seed=seed) for label, subset in subsets.items()}
        for name in score_names(records)
    }
