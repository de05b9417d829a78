"""How well a model predicts sets of tasks that it has not seen: figures with intervals, a null and plain baselines.

One task is left out at a time, with every set that it is in. Intervals resample tasks, not sets, since the sets of a
task are not independent; the null gives adapters each other's outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.scoring import area_under_roc
from mlx_rsgwm.evaluation.stats.bootstrap import percentile_interval, resampled
from mlx_rsgwm.probe.features import Examples
from mlx_rsgwm.probe.models import Fit, fit_ridge

WORTH = 0.95  # retention from which a merge is worth it
BASELINES: Mapping[str, str] = {"norm ratio alone": "task_vector_norm_ratio", "cosine alone": "task_vector_cosine"}
RESAMPLES, PERMUTATIONS = 1000, 100

Figure = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Estimate:
    """A figure and the middle 95 % of it when tasks are resampled; not a number where there is none."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain JSON values; None for what is not a number."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Validation:
    """A model on left-out tasks. ``predicted`` and ``measured`` (n,), of sets in at least one fold.

    ``spearman``, ``r_squared``, ``auc`` of R ≥ .95; ``baselines``: their Spearman; ``above_best``: by how much the
    model's is above the best of them; ``null``: the share of permutations with as high a Spearman.
    """

    predicted: np.ndarray
    measured: np.ndarray
    spearman: Estimate
    r_squared: Estimate
    auc: Estimate
    baselines: Mapping[str, Estimate]
    above_best: Estimate
    null: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the predictions."""
        return {
            "sets": len(self.measured),
            "spearman": self.spearman.to_dict(),
            "r_squared": self.r_squared.to_dict(),
            "auc": self.auc.to_dict(),
            "baselines": {name: each.to_dict() for name, each in self.baselines.items()},
            "above_best_baseline": self.above_best.to_dict(),
            "permutation_p": self.null,
        }


def validate(
    examples: Examples, fit: Fit, seed: int = 0, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS
) -> Validation:
    """Leave one task out, with the baselines, the intervals and the null.

    Raises:
        RsgwmError: too few tasks for that.
    """
    predicted = left_out_predictions(examples, fit)
    others = {
        name: left_out_predictions(only(examples, feature), fit_ridge)
        for name, feature in BASELINES.items()
        if feature in examples.features
    }
    y, draw = examples.y, _task_draws(examples)

    def estimate(figure: Callable[[np.ndarray], float]) -> Estimate:
        drawn = resampled(lambda tasks: figure(draw(tasks)), len(task_names(examples)), seed, resamples)
        ends = percentile_interval(drawn) if len(drawn) else (np.nan, np.nan)
        return Estimate(figure(np.arange(len(y))), *ends)

    def of(figure: Figure, guess: np.ndarray) -> Estimate:
        return estimate(lambda chosen: figure(guess[chosen], y[chosen]))

    baselines = {name: of(spearman, guess) for name, guess in others.items()}
    best = max(others, key=lambda name: baselines[name].value, default=None)
    above = (
        estimate(lambda chosen: spearman(predicted[chosen], y[chosen]) - spearman(others[best][chosen], y[chosen]))
        if best is not None
        else Estimate(np.nan, np.nan, np.nan)
    )
    null = permutation_share(examples, fit, spearman(predicted, y), seed, permutations)
    figures = (of(spearman, predicted), of(r_squared, predicted), of(area, predicted))
    return Validation(predicted, y, *figures, baselines, above, null)


def left_out_predictions(examples: Examples, fit: Fit) -> np.ndarray:
    """(n,): each set's prediction, the mean over the folds that leave one of its tasks out.

    Raises:
        RsgwmError: fewer than three tasks, or a task that is in nearly every set.
    """
    total, times = np.zeros(len(examples.y)), np.zeros(len(examples.y))
    names = task_names(examples)
    for task in names:
        held_out = np.array([task in tasks for tasks in examples.tasks])
        if (~held_out).sum() < 3:
            raise RsgwmError(
                f"too few sets to leave a task out: {len(examples.y)} sets of {len(names)} tasks leave "
                f"{int((~held_out).sum())} without {task}, 3 are needed"
            )
        model = fit(examples.x[~held_out], examples.y[~held_out])
        total[held_out] += model.predict(examples.x[held_out])
        times[held_out] += 1
    return total / times


def permutation_share(examples: Examples, fit: Fit, reached: float, seed: int, permutations: int) -> float:
    """The share of permuted outcomes that are predicted with as high a Spearman as ``reached``, itself counted in.

    Adapters are given each other's places, and with them outcomes of sets; where such a set was not merged, the
    outcomes of sets of one size are shuffled.
    """
    rng = np.random.default_rng(seed)
    as_high = sum(
        spearman(left_out_predictions(permuted, fit), permuted.y) >= reached
        for permuted in (_permuted(examples, rng) for _ in range(permutations))
    )
    return (as_high + 1) / (permutations + 1)


def _permuted(examples: Examples, rng: np.random.Generator) -> Examples:
    names = sorted({name for members in examples.sets for name in members})
    places = dict(zip(names, rng.permutation(names).tolist(), strict=True))
    outcome = {frozenset(members): y for members, y in zip(examples.sets, examples.y, strict=True)}
    moved = [outcome.get(frozenset(places[name] for name in members)) for members in examples.sets]
    y = np.array([np.nan if value is None else value for value in moved])
    sizes = np.array([len(members) for members in examples.sets])
    for size in set(sizes[np.isnan(y)].tolist()):
        of_size = sizes == size
        y[of_size] = rng.permutation(examples.y[of_size])
    return Examples(examples.features, examples.x, y, examples.sets, examples.tasks)


def only(examples: Examples, feature: str) -> Examples:
    """The same sets with one feature."""
    return Examples((feature,), examples.column(feature)[:, None], examples.y, examples.sets, examples.tasks)


def task_names(examples: Examples) -> list[str]:
    """Every task, sorted."""
    return sorted({task for tasks in examples.tasks for task in tasks})


def _task_draws(examples: Examples) -> Callable[[np.ndarray], np.ndarray]:
    """From drawn tasks (t,) to positions of sets: each as often as the product of its tasks' numbers."""
    names = task_names(examples)
    isin = np.array([[name in tasks for name in names] for tasks in examples.tasks])

    def draw(tasks: np.ndarray) -> np.ndarray:
        times = np.bincount(tasks, minlength=len(names))
        return np.repeat(np.arange(len(isin)), np.where(isin, times, 1).prod(axis=1))

    return draw


def spearman(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Rank correlation of two (n,); not a number where either does not vary."""
    if len(measured) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return float("nan")
    first, second = (ranks - ranks.mean() for ranks in map(_ranks, (predicted, measured)))
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of (n,), ties at their mean; SciPy's takes ten times as long, which a bootstrap notices."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def r_squared(predicted: np.ndarray, measured: np.ndarray) -> float:
    """1 − Σ(y − ŷ)²/Σ(y − ȳ)² of two (n,): 0 is what the mean of these would do, and below it worse."""
    if not len(measured) or np.ptp(measured) == 0:  # the mean of equal numbers may differ from them by rounding
        return float("nan")
    return float(1 - np.square(measured - predicted).sum() / np.square(measured - measured.mean()).sum())


def area(predicted: np.ndarray, measured: np.ndarray, worth: float = WORTH) -> float:
    """How often a set worth merging (measured at least ``worth``) is predicted above one that is not, of two (n,)."""
    auc = area_under_roc(predicted, measured >= worth)
    return float("nan") if auc is None else auc


def lower_margin(predicted: np.ndarray, measured: np.ndarray, coverage: float = 0.8) -> float:
    """What is taken off a prediction so that at least ``coverage`` of new sets lie above it: split conformal's quantile
    ⌈(n + 1) coverage⌉ of predicted − measured, (n,) on left-out tasks; infinite where n is too small."""
    residuals: Sequence[float] = sorted((predicted - measured).tolist())
    place = int(np.ceil((len(residuals) + 1) * coverage))
    return float(residuals[place - 1]) if place <= len(residuals) else float("inf")
