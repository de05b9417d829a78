"""What a predictor sees of a set of adapters: means and extremes of its pairs' measures, and what only a set has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.probe.outcomes import Outcomes, Retention
from mlx_rsgwm.probe.table import PairRow, Table

FEWEST = 8  # sets to fit to, at least
SIZE, LARGEST_AMPLIFICATION = "set_size", "set_overamplification"
MEAN, LEAST, MOST = "", "|least", "|most"


@dataclass(frozen=True)
class Examples:
    """Sets of adapters with what became of them.

    ``x`` (n, d) float64 of the ``features``; ``y`` (n,) the retention; ``sets``: their members; ``tasks``: of each set
    the tasks of its members, by which folds are made.
    """

    features: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    sets: tuple[tuple[str, ...], ...]
    tasks: tuple[frozenset[str], ...]

    def take(self, chosen: np.ndarray) -> Examples:
        """Those at positions (or of a mask) (m,)."""
        places = np.arange(len(self.y))[chosen].tolist()
        return Examples(
            self.features,
            self.x[places],
            self.y[places],
            tuple(self.sets[place] for place in places),
            tuple(self.tasks[place] for place in places),
        )

    def column(self, feature: str) -> np.ndarray:
        """One feature (n,)."""
        return self.x[:, self.features.index(feature)]


def examples_of(
    table: Table, outcomes: Outcomes, method: str, utility: str, target: str = "mean", size: int | None = None
) -> Examples:
    """Every set that was merged by ``method`` and whose pairs the table has.

    Args:
        table: of the pairs.
        outcomes: of the merges.
        method: its name in the outcomes.
        utility: nll, tokens or answers.
        target: ``mean`` or ``worst`` retention of a set's members.
        size: sets of this many adapters alone; None for all.

    Raises:
        RsgwmError: a method that was not measured, a table of other adapters, fewer than eight sets.
    """
    if method not in outcomes.methods:
        raise RsgwmError(f"the outcomes have no method {method!r}; they have {', '.join(outcomes.methods) or 'none'}")
    known = outcomes.about["adapters"]
    other = [name for name in table.about["adapters"] if name not in known]
    if other:
        raise RsgwmError(f"the outcomes say nothing of {other[0]}, which is in the table; measure the same adapters")
    pairs, columns = table.by_pair(), table.columns
    merged = [each for each in outcomes.retentions(utility, size) if each.method == method]
    merged = [each for each in merged if all(frozenset(pair) in pairs for pair in combinations(each.members, 2))]
    if len(merged) < FEWEST:
        raise RsgwmError(f"too few sets to fit to: {len(merged)} merged by {method}, at least {FEWEST} are needed")
    rows = [set_features(each.members, pairs, columns) for each in merged]
    return Examples(
        tuple(rows[0]),
        np.array([list(row.values()) for row in rows]),
        np.array([_target(each, target) for each in merged]),
        tuple(each.members for each in merged),
        tuple(frozenset(outcomes.tasks[name] for name in each.members) for each in merged),
    )


def set_features(
    members: Sequence[str], pairs: Mapping[frozenset[str], PairRow], columns: Sequence[str]
) -> dict[str, float]:
    """Mean, least and most over the pairs of every column, how many adapters, and the over-amplification of their sum.

    Of a pair mean, least and most are one number; a fit to pairs alone leaves out what does not vary or repeats.
    """
    rows = [pairs[frozenset(pair)] for pair in combinations(members, 2)]
    values = np.array([[row.measures[name] for name in columns] for row in rows])
    features: dict[str, float] = {}
    for suffix, over in ((MEAN, values.mean(axis=0)), (LEAST, values.min(axis=0)), (MOST, values.max(axis=0))):
        features |= {f"{name}{suffix}": float(value) for name, value in zip(columns, over, strict=True)}
    return {**features, SIZE: float(len(members)), LARGEST_AMPLIFICATION: sum_amplification(rows, len(members))}


def sum_amplification(rows: Sequence[PairRow], members: int) -> float:
    """‖Σ ΔW‖ / √(Σ ‖ΔW‖²) of a set, from its pairs: each has ‖a − b‖ and ⟨a, b⟩, so ‖a‖² + ‖b‖², too."""
    dots = sum(row.measures["task_vector_dot"] for row in rows)
    squares = sum(row.measures["task_vector_l2"] ** 2 + 2 * row.measures["task_vector_dot"] for row in rows)
    squares /= members - 1  # every adapter is in as many pairs
    return sqrt(max(1 + 2 * dots / squares, 0.0)) if squares > 0 else 1.0


def _target(merged: Retention, target: str) -> float:
    return merged.mean if target == "mean" else merged.worst
