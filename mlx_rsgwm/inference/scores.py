"""From what the verifier says of a draft to one number in [0, 1]: the scores, their combination, their calibration.

A :class:`Scorer` is all that the loop needs: it says what to ask the verifier for and turns the answer into the score
that is compared with the threshold. A :class:`Curve` says what the score means, the probability of being right; it
rises, so it changes no decision. Everything fitted is a handful of numbers that JSON holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.inference.draft import Signals

FEATURES = ("yesno_logit", "mean_logprob", "min_logprob", "tokens")
CURVE_METHODS = ("temperature", "platt", "isotonic")
# For each score: does it need the yes/no verdict, does it need the log-probabilities of the draft's tokens?
NEEDS = {"yesno": (True, False), "mean_logprob": (False, True), "combined": (True, True)}
SCORES = tuple(NEEDS)

FLOOR_NATS = -30.0  # log-probabilities below this tell no more
EDGE = 1e-6  # scores are kept this far from 0 and 1 before their logit is taken
SLOWEST = 1e-3  # smallest slope of a calibration: a better draft never gets a lower score


def logit(probability: Sequence[float] | np.ndarray) -> np.ndarray:
    """log(p / (1 − p)) elementwise, float64, finite at 0 and 1."""
    clipped = np.clip(np.asarray(probability, dtype=np.float64), EDGE, 1 - EDGE)
    log_odds: np.ndarray = np.log(clipped) - np.log1p(-clipped)
    return log_odds


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e⁻ˣ) elementwise, float64."""
    probabilities: np.ndarray = 0.5 * (1 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))
    return probabilities


def features(signals: Sequence[Signals]) -> np.ndarray:
    """What the combined score weighs: (drafts, ``FEATURES``) float64."""
    rows = []
    for signal in signals:
        if signal.yesno is None or signal.mean is None or signal.minimum is None:
            raise ValueError("the combined score needs the verdict and the log-probabilities of a draft")
        rows.append([signal.yesno, max(signal.mean, FLOOR_NATS), max(signal.minimum, FLOOR_NATS), signal.tokens])
    matrix = np.array(rows, dtype=np.float64).reshape(-1, len(FEATURES))
    matrix[:, 0] = logit(matrix[:, 0])
    return matrix


def pool_features(score: str, signals: Sequence[Signals]) -> np.ndarray:
    """What the learned rule of a pool weighs for a score: (drafts, n) float64, adapter by adapter.

    The verdict's log-odds for ``yesno``, the mean log-probability for ``mean_logprob``; for ``combined`` all
    ``FEATURES`` of each, with the number of tokens at the end, once.
    """
    by_adapter = [list(said) for said in zip(*(signal.each for signal in signals), strict=True)]
    if score == "combined":
        matrices = [features(said) for said in by_adapter]
        return np.concatenate([*(matrix[:, :3] for matrix in matrices), matrices[0][:, 3:]], axis=1)
    if score == "yesno":
        values: Any = [[signal.yesno for signal in said] for said in by_adapter]
        return logit(np.array(values, dtype=np.float64)).T
    values = [[signal.mean for signal in said] for said in by_adapter]
    return np.maximum(np.array(values, dtype=np.float64), FLOOR_NATS).T


def learned_count(score: str, adapters: int) -> int:
    """How many :func:`pool_features` there are."""
    return 3 * adapters + 1 if score == "combined" else adapters


@dataclass(frozen=True)
class Logistic:
    """A logistic model on standardised features."""

    means: tuple[float, ...]
    scales: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float

    width: ClassVar[int] = 0  # how many there must be; 0 where that is not known beforehand

    def __post_init__(self) -> None:
        problems = []
        count = self.width or len(self.means)
        for name in ("means", "scales", "coefficients"):
            values = getattr(self, name)
            if len(values) != count:
                problems.append(f"{name} must have {count} numbers, found {len(values)}")
            if not all(map(math.isfinite, values)):
                problems.append(f"{name} must be finite, found {values}")
        if not all(scale > 0 for scale in self.scales):
            problems.append(f"scales must be above 0, found {self.scales}")
        if not math.isfinite(self.intercept):
            problems.append(f"intercept must be finite, found {self.intercept}")
        raise_problems("combined score", problems)

    def of(self, matrix: np.ndarray) -> np.ndarray:
        """Of features (drafts, n): (drafts,) float64 in (0, 1)."""
        standard = (matrix - np.array(self.means)) / np.array(self.scales)
        return sigmoid(standard @ np.array(self.coefficients) + self.intercept)


@dataclass(frozen=True)
class Combination(Logistic):
    """A logistic model on the standardised :func:`features`."""

    width: ClassVar[int] = len(FEATURES)

    def values(self, signals: Sequence[Signals]) -> np.ndarray:
        """(drafts,) float64 in (0, 1)."""
        return self.of(features(signals))


def fit_combination(signals: Sequence[Signals], correct: Sequence[bool] | np.ndarray) -> Combination:
    """The combined score of what one verifier says, from drafts with labels (drafts,); see :func:`_fit_logistic`."""
    return Combination(**_fit_logistic(features(signals), correct))


def fit_learned(score: str, signals: Sequence[Signals], correct: Sequence[bool] | np.ndarray) -> Logistic:
    """A score of what the adapters of a pool say, from drafts with labels (drafts,); see :func:`_fit_logistic`."""
    return Logistic(**_fit_logistic(pool_features(score, signals), correct))


def _fit_logistic(matrix: np.ndarray, correct: Sequence[bool] | np.ndarray) -> dict[str, Any]:
    """Fit the logistic model, regularised (L2, C = 1 on standardised features); both classes must be there."""
    from sklearn.linear_model import LogisticRegression

    means, scales = matrix.mean(axis=0), matrix.std(axis=0)
    scales[scales < 1e-9] = 1.0
    model = LogisticRegression(C=1.0, max_iter=1000)
    model.fit((matrix - means) / scales, np.asarray(correct, dtype=bool))
    return {
        "means": tuple(means.tolist()),
        "scales": tuple(scales.tolist()),
        "coefficients": tuple(model.coef_[0].tolist()),
        "intercept": float(model.intercept_[0]),
    }


@dataclass(frozen=True)
class Curve:
    """A strictly rising map from a raw score to the probability that the draft is right.

    ``temperature`` and ``platt``: sigmoid(slope · logit(raw) + intercept), the former without an intercept.
    ``isotonic``: straight lines between ``points`` (raw, probability). Since it rises, no order of drafts changes.
    """

    method: str
    slope: float = 1.0
    intercept: float = 0.0
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.method not in CURVE_METHODS:
            problems.append(f"method must be one of {', '.join(CURVE_METHODS)}, found {self.method!r}")
        if not 0 < self.slope < float("inf") or not math.isfinite(self.intercept):
            problems.append(f"slope must be above 0 and intercept finite, found {self.slope} and {self.intercept}")
        if (self.method == "isotonic") != bool(self.points):
            problems.append("isotonic, and only that, needs points")
        if any(len(point) != 2 or not all(0 <= value <= 1 for value in point) for point in self.points):
            problems.append("points must be pairs of numbers in [0, 1]")
        elif any(a >= c or b >= d for (a, b), (c, d) in pairwise(self.points)):
            problems.append("points must rise")
        raise_problems("calibration curve", problems)

    def probabilities(self, raw: Sequence[float] | np.ndarray) -> np.ndarray:
        """(drafts,) float64 in [0, 1]."""
        if self.method == "isotonic":
            x, y = zip(*self.points, strict=True)
            return np.interp(np.asarray(raw, dtype=np.float64), x, y)
        return sigmoid(self.slope * logit(raw) + self.intercept)


def fit_curve(method: str, raw: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray) -> Curve:
    """Fit one of ``CURVE_METHODS`` to raw scores (drafts,) and labels (drafts,); both classes must be there."""
    x, labels = np.asarray(raw, dtype=np.float64), np.asarray(correct, dtype=bool)
    if method == "isotonic":
        return _fit_isotonic(x, labels)
    if method == "temperature":
        return Curve(method, max(_fit_line(logit(x), labels, intercept=False)[0], SLOWEST))
    slope, intercept = _fit_line(logit(x), labels, intercept=True)
    if slope < SLOWEST:
        # The score does not separate: everything gets about the share of right drafts.
        slope = SLOWEST
        intercept = float(logit([labels.mean()])[0] - slope * logit(x).mean())
    return Curve(method, slope, intercept)


def _fit_line(x: np.ndarray, labels: np.ndarray, intercept: bool) -> tuple[float, float]:
    """Slope and intercept by Platt's method: labels softened by one draft of each class, so that none is infinite."""
    from sklearn.linear_model import LogisticRegression

    right, wrong = int(labels.sum()), int((~labels).sum())
    soft = np.where(labels, (right + 1) / (right + 2), 1 / (wrong + 2))
    model = LogisticRegression(C=1e4, fit_intercept=intercept, max_iter=1000)
    # Each draft stands once as right and once as wrong, weighted by its softened label.
    model.fit(np.tile(x, 2)[:, None], np.repeat([1, 0], len(x)), sample_weight=np.concatenate([soft, 1 - soft]))
    return float(model.coef_[0, 0]), float(np.ravel(model.intercept_)[0]) if intercept else 0.0


def _fit_isotonic(x: np.ndarray, labels: np.ndarray) -> Curve:
    """Isotonic regression, drawn as a line through the middles of its steps, from (0, 0) to (1, 1).

    The steps themselves would give many drafts one score, and a threshold could not pass between them.
    """
    from sklearn.isotonic import IsotonicRegression

    least = 1 / (len(x) + 2)
    steps = IsotonicRegression(y_min=least, y_max=1 - least).fit_transform(x, labels.astype(np.float64))
    middles = [(float(x[steps == value].mean()), float(value)) for value in np.unique(steps)]
    return Curve("isotonic", points=((0.0, 0.0), *((a, b) for a, b in middles if 0 < a < 1), (1.0, 1.0)))


@dataclass(frozen=True)
class Scorer:
    """One score: its name, and the combination if it is ``combined``; ``learned`` is the rule of a pool for it."""

    name: str
    combination: Combination | None = None
    learned: Logistic | None = None

    def __post_init__(self) -> None:
        if self.name not in SCORES:
            raise RsgwmError(f"score must be one of {', '.join(SCORES)}, found {self.name!r}")
        if self.learned is None and (self.name == "combined") != (self.combination is not None):
            raise RsgwmError(
                "the combined score has to be fitted first; calibrate the verifier with: rsgwm calibrate"
                if self.combination is None
                else f"score {self.name} has no use for a combination"
            )

    @property
    def needs(self) -> tuple[bool, bool]:
        """Whether the verifier has to be asked for yes or no, and for the log-probabilities of the draft's tokens."""
        return NEEDS[self.name]

    def values(self, signals: Sequence[Signals]) -> np.ndarray:
        """The scores that are compared with the threshold, (drafts,) float64 in [0, 1]."""
        if self.learned is not None:
            return self.learned.of(pool_features(self.name, signals)) if signals else np.zeros(0)
        if self.combination is not None:
            return self.combination.values(signals)
        values: list[Any] = [getattr(signal, self.name) for signal in signals]
        return np.array(values, dtype=np.float64)

    def value(self, signals: Signals) -> float:
        """The score of one draft."""
        return float(self.values([signals])[0])


Fit = Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]


def out_of_fold(items: Sequence[int] | np.ndarray, labels: np.ndarray, seed: int, fit: Fit) -> np.ndarray | None:
    """Predictions for every draft by what was fitted on other items, (drafts,) float64.

    ``fit(indices)`` returns a predictor of indices. Items fall into five folds by a seeded shuffle, so that drafts of
    one item are always together. None when some fold's complement has only one class, or there is only one item.
    """
    keys = np.unique(np.asarray(items))
    count = min(5, len(keys))
    if count < 2:
        return None
    fold_of = {int(key): place % count for place, key in enumerate(np.random.default_rng(seed).permutation(keys))}
    folds = np.array([fold_of[int(item)] for item in items])
    predictions = np.zeros(len(folds))
    for fold in range(count):
        inside, outside = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if labels[outside].all() or not labels[outside].any():
            return None
        predictions[inside] = fit(outside)(inside)
    return predictions
