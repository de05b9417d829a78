"""What a verifier adds to a calculator: selection among drafts that state no false equation.

A draft that states a false equation is found by a parser for nothing; what a verifier is worth shows on those that
calculate rightly and are wrong all the same. Beside it stands the control: the first draft that a calculator passes,
chosen without a verifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.data.arithmetic import false_equations
from mlx_rsgwm.evaluation.metrics import score_names
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.evaluation.stats.intervals import Rate, share, wilson
from mlx_rsgwm.evaluation.stats.paired import Difference, mean_difference

Passes = Callable[[ItemRecord, DraftRecord], bool]


def calculates_rightly(record: ItemRecord, draft: DraftRecord) -> bool:
    """Whether a draft states no false equation."""
    return not false_equations(draft.text, record.question)


@dataclass(frozen=True)
class DraftPick:
    """A rule that picks one draft of each item: how often it is right, and by how much more than the control."""

    accuracy: Rate
    over_control: Difference | None = None


@dataclass(frozen=True)
class CalculatorSlice:
    """Drafts that a calculator passes, and what is made of them. Items without one answer with their first draft.

    ``passing_wrong``: the share of the wrong drafts that state no false equation (those without an answer among them);
    ``passing_right`` that of the right ones. ``control`` is the first passing draft, ``any`` whether a right one is
    among them, ``best`` the best-scored by each score that all of them have.
    """

    passing_wrong: Rate | None
    passing_right: Rate | None
    control: DraftPick
    any: DraftPick
    best: Mapping[str, DraftPick]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rates = {"passing_wrong": self.passing_wrong, "passing_right": self.passing_right}
        return {
            **{name: None if rate is None else rate.to_dict() for name, rate in rates.items()},
            "control": _plain(self.control),
            "any": _plain(self.any),
            "best": {name: _plain(selection) for name, selection in self.best.items()},
        }


def _plain(selection: DraftPick) -> dict[str, Any]:
    gap = selection.over_control
    return {"accuracy": selection.accuracy.to_dict(), "over_control": None if gap is None else gap.to_dict()}


def calculator_slice(
    records: Sequence[ItemRecord], k: int | None = None, seed: int = 0, passes: Passes = calculates_rightly
) -> CalculatorSlice:
    """Selection among the first ``k`` drafts of every item (None: all recorded ones) that a calculator passes.

    Args:
        records: one per item.
        seed: of the intervals of differences, which resample items.
        passes: whether a draft calculates rightly.
    """
    drafts = [record.drafts[:k] for record in records]
    passing = [[d for d in of if passes(record, d)] for record, of in zip(records, drafts, strict=True)]
    candidates = [few or list(of[:1]) for few, of in zip(passing, drafts, strict=True)]
    counts = {
        label: (
            sum(draft.correct == label for few in passing for draft in few),
            sum(draft.correct == label for of in drafts for draft in of),
        )
        for label in (False, True)
    }
    first = np.asarray([few[0].correct for few in candidates], dtype=np.float64)

    def selected(picked: Sequence[bool]) -> DraftPick:
        gap = mean_difference(first, np.asarray(picked, dtype=np.float64), seed=seed)
        return DraftPick(share(sum(picked), len(picked)), gap)

    return CalculatorSlice(
        passing_wrong=wilson(*counts[False]),
        passing_right=wilson(*counts[True]),
        control=DraftPick(share(int(first.sum()), len(first))),
        any=selected([any(draft.correct for draft in few) for few in candidates]),
        best={
            name: selected([max(few, key=lambda draft: draft.scores[name]).correct for few in candidates])
            for name in score_names(records)
            if all(name in draft.scores for few in candidates for draft in few)
        },
    )
