"""Fitting a calibration to held-out drafts: scores compared, combined, mapped to probabilities, a threshold chosen.

Drafts of one item depend on each other, so the item is the unit: what is said of a fit is always measured on items that
it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.core.scoring import area_under_roc, brier, calibration_error
from mlx_rsgwm.inference.calibration import Calibration, Reliability, best_threshold
from mlx_rsgwm.inference.draft import Signals
from mlx_rsgwm.inference.risk_control import REFUSED, Items, RiskBound, Target, risk_bound
from mlx_rsgwm.inference.scores import (
    CURVE_METHODS,
    SCORES,
    Curve,
    Scorer,
    fit_combination,
    fit_curve,
    fit_learned,
    out_of_fold,
)

# Fewer right or wrong drafts than this, or fewer items, and nothing is fitted.
LEAST_OF_A_CLASS, LEAST_ITEMS = 8, 5
RESAMPLES = 400  # behind the interval by which yesno is found to be at chance


@dataclass(frozen=True)
class Judged:
    """Drafts of some items in the order they were made: for each item what the verifier said and what gold says.

    ``refused``: which of them the loop does not accept whatever their score, by the check of that name (``check``);
    empty where there is none. They are fitted on like the others.
    """

    signals: Sequence[Sequence[Signals]]
    correct: Sequence[Sequence[bool]]
    refused: Sequence[Sequence[bool]] = ()
    check: str = "none"

    def __post_init__(self) -> None:
        counts = [[len(item) for item in part] for part in (self.signals, self.correct, self.refused or self.correct)]
        if counts[0] != counts[1] or counts[0] != counts[2]:
            raise ValueError("signals and labels must have the same drafts")

    def __len__(self) -> int:
        return len(self.signals)

    @property
    def flat(self) -> tuple[list[Signals], np.ndarray, np.ndarray]:
        """Signals of every draft, labels (drafts,) bool, and the item of every draft (drafts,) int."""
        signals = [signal for item in self.signals for signal in item]
        labels = np.array([flag for item in self.correct for flag in item], dtype=bool)
        return signals, labels, np.repeat(np.arange(len(self)), [len(item) for item in self.signals])

    @property
    def counts(self) -> tuple[int, int]:
        """How many drafts are right, and how many there are."""
        _, labels, _ = self.flat
        return int(labels.sum()), len(labels)

    @property
    def enough(self) -> bool:
        """Whether anything can be fitted to these."""
        right, count = self.counts
        return min(right, count - right) >= LEAST_OF_A_CLASS and len(self) >= LEAST_ITEMS

    def take(self, indices: Sequence[int] | np.ndarray) -> Judged:
        """These items, in this order."""
        refused = [self.refused[index] for index in indices] if self.refused else []
        return Judged([self.signals[i] for i in indices], [self.correct[i] for i in indices], refused, self.check)

    def scored(self, scorer: Scorer) -> Items:
        """Scores and labels as (items, K) arrays; every item has the same number of drafts."""
        signals, labels, _ = self.flat
        shape = (len(self), -1) if len(self) else (0, 0)
        scores = scorer.values(signals).reshape(shape)
        if self.refused:
            scores = np.where(np.array(self.refused, dtype=bool), REFUSED, scores)
        return Items(scores, labels.reshape(shape))


def halves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of ``count`` items, drawn by seed: one to fit on, one to test a threshold with.

    Positions, (count // 2,) and (count - count // 2,) int64, each ascending.
    """
    order = np.random.default_rng([seed, 1]).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def fit(
    drafts: Judged,
    perturbed: Judged | None = None,
    *,
    score: str = "auto",
    scores: Sequence[str] = SCORES,
    method: str = "auto",
    target: Target | None = None,
    made_for: Mapping[str, Any] | None = None,
    seed: int = DEFAULT_SEED,
    learned: bool = False,
) -> Calibration:
    """Compare the scores, fit what is to be fitted and choose a threshold.

    Args:
        drafts: the drafter's own drafts of held-out items.
        perturbed: gold and perturbed answers; they decide only where the drafts are all right or all wrong.
        score: one of ``SCORES``, or ``auto``: the greatest AUROC, on items not fitted on, among ``scores``; ``yesno``
            only where the interval of its AUROC lies above .5.
        scores: those to choose from.
        method: one of ``CURVE_METHODS``, ``none``, or ``auto``: the least log loss on items not fitted on.
        target: the false-accept rate to bound; half of the items is then kept apart to test thresholds with.
        made_for: see :class:`Calibration`.
        seed: of the folds and halves.
        learned: the verifier is a pool, and what its adapters say is weighed by a fit instead of a rule.

    Raises:
        RsgwmError: an unknown name, or a fit asked for by name with too few drafts.
        CheckFailed: no threshold holds the bound.
    """
    if score not in ("auto", *SCORES):
        raise RsgwmError(f"score must be auto or one of {', '.join(SCORES)}, found {score!r}")
    if method not in ("auto", "none", *CURVE_METHODS):
        raise RsgwmError(f"method must be auto, none or one of {', '.join(CURVE_METHODS)}, found {method!r}")
    fitted_on, testing = drafts, None
    if target is not None:
        first, second = halves(len(drafts), seed)
        fitted_on, testing = drafts.take(first), drafts.take(second)
    _check_enough(fitted_on, score, method, learned)
    fits = {name: _fit_score(name, fitted_on, method, seed, learned) for name in SCORES}
    fitted = {name: score_fit for name, score_fit in fits.items() if score_fit is not None}
    if not fitted or fitted.keys().isdisjoint(SCORES if score == "auto" else [score]):
        wanted = "the learned rule" if learned else f"score {score}"
        raise RsgwmError(f"{wanted} cannot be fitted: drafts of too few items are right, or wrong; give more items")
    auroc, easier = _areas(fits, fitted_on, perturbed or Judged((), ()))
    at_chance: tuple[str, ...] = ()
    if score == "auto":
        offered = {name: score_fit for name, score_fit in fitted.items() if name in scores}
        score, at_chance = _choose(offered, auroc, easier, fitted_on, seed)
    chosen = fitted[score]
    _, labels, _ = fitted_on.flat
    held: RiskBound | None = None
    if target is not None and testing is not None:
        held = risk_bound(fitted_on.scored(chosen.scorer), testing.scored(chosen.scorer), target)
        held = replace(held, check=drafts.check)
    right, count = drafts.counts
    return Calibration(
        score=score,
        threshold=best_threshold(chosen.unseen, labels) if held is None else held.threshold,
        combination=fitted["combined"].scorer.combination if "combined" in fitted else None,
        learned={name: fit.scorer.learned for name, fit in fitted.items() if fit.scorer.learned is not None},
        curves={name: score_fit.curve for name, score_fit in fitted.items() if score_fit.curve is not None},
        auroc=auroc,
        perturbed_auroc=easier,
        reliability={
            name: score_fit.reliability for name, score_fit in fitted.items() if score_fit.reliability is not None
        },
        items=len(drafts),
        drafts=count,
        correct=right,
        made_for=dict(made_for or {}),
        risk_bound=held,
        at_chance=at_chance,
    )


def _check_enough(drafts: Judged, score: str, method: str, learned: bool) -> None:
    """Refuse a fit that is asked for by name on too few drafts."""
    if drafts.enough or not (learned or score == "combined" or method in CURVE_METHODS):
        return
    right, count = drafts.counts
    wanted = "the learned rule" if learned else "the combined score" if score == "combined" else method
    raise RsgwmError(
        f"fitting {wanted} takes {LEAST_OF_A_CLASS} right and as "
        f"many wrong drafts of at least {LEAST_ITEMS} items, found {right} right and {count - right} wrong of "
        f"{len(drafts)} items; give more items"
    )


Areas = dict[str, float | None]  # AUROC by score; None where it cannot be told


def _areas(fits: Mapping[str, _Fitted | None], drafts: Judged, perturbed: Judged) -> tuple[Areas, Areas]:
    """AUROC of every score on ``drafts`` that it was not fitted on, and on gold and perturbed answers."""
    _, labels, _ = drafts.flat
    pairs, truth, _ = perturbed.flat
    auroc = {name: area_under_roc(score_fit.unseen, labels) if score_fit else None for name, score_fit in fits.items()}
    easier = {
        name: area_under_roc(score_fit.scorer.values(pairs), truth) if score_fit else None
        for name, score_fit in fits.items()
    }
    return auroc, easier


def _choose(
    offered: Mapping[str, _Fitted], auroc: Areas, easier: Areas, drafts: Judged, seed: int
) -> tuple[str, tuple[str, ...]]:
    """The score that tells right from wrong best, and those passed over because they are at chance."""
    judged = len(offered) > 1 and "yesno" in offered and auroc["yesno"] is not None
    at_chance = ("yesno",) if judged and _at_chance(offered["yesno"].unseen, drafts, seed) else ()
    names = [name for name in offered if name not in at_chance]
    return max(names, key=lambda name: _merit(auroc[name], easier[name])), at_chance


def _at_chance(scores: np.ndarray, drafts: Judged, seed: int) -> bool:
    """Whether the 95 % interval of the AUROC begins at or below .5; items are resampled with all their drafts."""
    _, labels, items = drafts.flat
    members = [np.flatnonzero(items == item) for item in range(len(drafts))]
    rng, areas = np.random.default_rng([seed, 2]), []
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[item] for item in rng.integers(len(members), size=len(members))])
        areas.append(area_under_roc(scores[rows], labels[rows]))
    known = [area for area in areas if area is not None]
    return bool(known) and float(np.quantile(known, 0.025)) <= 0.5


def _merit(auroc: float | None, easier: float | None) -> float:
    return next((value for value in (auroc, easier) if value is not None), 0.5)


@dataclass(frozen=True)
class _Fitted:
    """A scorer, the drafts' scores by a fit that had not seen their item, and what the scores mean."""

    scorer: Scorer
    unseen: np.ndarray
    curve: Curve | None = None
    reliability: Reliability | None = None


def _fit_score(name: str, drafts: Judged, method: str, seed: int, learned: bool) -> _Fitted | None:
    """One score; None for one that is to be fitted where there is too little to fit it."""
    signals, labels, items = drafts.flat
    if learned or name == "combined":

        def fit_scorer(some: list[Signals], right: np.ndarray) -> Scorer:
            return Scorer(name, learned=fit_learned(name, some, right)) if learned else _combined(some, right)

        unseen = _unseen(fit_scorer, signals, labels, items, seed) if drafts.enough else None
        if unseen is None:
            return None
        scorer, raw = fit_scorer(signals, labels), unseen
    else:
        scorer = Scorer(name)
        raw = scorer.values(signals)
    methods = [] if method == "none" or not drafts.enough else [*CURVE_METHODS] if method == "auto" else [method]
    tried = {candidate: _calibrated_unseen(candidate, raw, labels, items, seed) for candidate in methods}
    losses = {candidate: _log_loss(values, labels) for candidate, values in tried.items() if values is not None}
    if not losses:
        return _Fitted(scorer, raw)
    best = min(losses, key=lambda candidate: losses[candidate])
    calibrated = tried[best]
    assert calibrated is not None
    reliability = Reliability(
        ece_before=calibration_error(raw, labels),
        ece_after=calibration_error(calibrated, labels),
        brier_before=brier(raw, labels),
        brier_after=brier(calibrated, labels),
    )
    return _Fitted(scorer, raw, fit_curve(best, raw, labels), reliability)


def _combined(signals: list[Signals], labels: np.ndarray) -> Scorer:
    return Scorer("combined", fit_combination(signals, labels))


def _unseen(
    fit_scorer: Callable[[list[Signals], np.ndarray], Scorer],
    signals: list[Signals],
    labels: np.ndarray,
    items: np.ndarray,
    seed: int,
) -> np.ndarray | None:
    """The scores of drafts by a scorer that was fitted on other items."""

    def fitted(train: np.ndarray) -> Any:
        scorer = fit_scorer([signals[index] for index in train], labels[train])
        return lambda test: scorer.values([signals[index] for index in test])

    return out_of_fold(items, labels, seed, fitted)


def _calibrated_unseen(
    method: str, raw: np.ndarray, labels: np.ndarray, items: np.ndarray, seed: int
) -> np.ndarray | None:
    def fitted(train: np.ndarray) -> Any:
        curve = fit_curve(method, raw[train], labels[train])
        return lambda test: curve.probabilities(raw[test])

    return out_of_fold(items, labels, seed + 1, fitted)


def _log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    clipped = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return float(-np.where(labels, np.log(clipped), np.log(1 - clipped)).mean())
