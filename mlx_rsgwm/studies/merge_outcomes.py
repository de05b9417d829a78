"""Every pair of a pool, and some larger sets, merged by every method asked for, and measured on each member's own task.

One row a merge is kept as soon as it is measured (:mod:`~mlx_rsgwm.probe.outcomes` reads them); of several processes
each takes every size-th merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.audit.eligibility import STANDARD_ERRORS, token_weighted
from mlx_rsgwm.core import files
from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.core.resume import Journal
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.evaluation.judging import judge
from mlx_rsgwm.inference.open import template_of
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.pool import PoolAdapter
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.probe.inputs import task_of
from mlx_rsgwm.probe.measure import identity
from mlx_rsgwm.probe.outcomes import (
    ANSWERS,
    BASE,
    NLL,
    OUTCOMES,
    SINGLE,
    TOKENS,
    VERSION,
    OutcomeRow,
    Outcomes,
    Scores,
)
from mlx_rsgwm.studies.sweep_meter import Meter
from mlx_rsgwm.studies.sweep_variants import Variant
from mlx_rsgwm.training.losses import row_scores

SLOT = "measured"
BATCH = 8


@dataclass(frozen=True)
class TaskData:
    """What an adapter is measured on: ``name`` of the data, ``rows`` it was not trained on, and questions to answer."""

    name: str
    rows: Sequence[TokenRow]
    questions: Sequence[Question] = ()


@dataclass(frozen=True)
class Unit:
    """What is measured at a time: a merge of ``members`` (positions) by ``variant``, an adapter alone, or the base."""

    members: tuple[int, ...]
    method: str
    variant: Variant | None = None


def units_of(count: int, variants: Sequence[Variant], sets: Sequence[tuple[int, ...]]) -> list[Unit]:
    """Base and adapter alone of every task, then every pair and the ``sets`` by every variant."""
    alone = [Unit((place,), method) for place in range(count) for method in (BASE, SINGLE)]
    groups = [*combinations(range(count), 2), *sets]
    return alone + [Unit(tuple(group), variant.label, variant) for group in groups for variant in variants]


class OutcomeStudy:
    """The outcomes of one pool in one file."""

    def __init__(
        self,
        base: Base,
        adapters: Sequence[Adapter],
        data: Sequence[TaskData],
        path: Path,
        seed: int = DEFAULT_SEED,
        progress: Progress = SILENT,
        processes: Processes = ALONE,
        replace_other: bool = False,
    ) -> None:
        """``data``: of each adapter. A file of other adapters or data is refused, unless ``replace_other``."""
        self.adapters, self.data, self.seed = list(adapters), list(data), seed
        self.progress, self.processes = progress, processes
        self.slots = AdapterSlots(base)
        sources = [PoolAdapter.of(adapter) for adapter in adapters]
        self.labels = [source.label for source in sources]
        if double := sorted({label for label in self.labels if self.labels.count(label) > 1}):
            raise RsgwmError(f"adapters need names of their own, two are called {double[0]}")
        self._per_row: dict[tuple[int, str], dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        self.rows: dict[tuple[frozenset[str], str], OutcomeRow] = {}
        self.about = self._about(base, [identity(source) for source in sources])
        self.journal = Journal(path, self.about, self._take, replace_other, processes.rank)

    def execute(self, units: Sequence[Unit]) -> Outcomes:
        """Measure the units that are not in the file yet; a merge that its own rules refuse is an outcome, too."""
        with self.progress.task("probe outcomes", len(units)) as advance:
            for number, unit in enumerate(units):
                # By its place among all: what is left over may look different to a process that starts later.
                mine = number % self.processes.size == self.processes.rank
                if mine and self._key(unit) not in self.rows:
                    row = self._measure(unit)
                    self.journal.append([row.to_dict()])
                    self.rows[self._key(unit)] = row
                advance(1, unit.method)
        self.processes.wait()
        self.journal.read_others()
        return Outcomes(self.about, self.rows)

    def _about(self, base: Base, hashes: Sequence[str]) -> dict[str, Any]:
        rows = [[each.tokens for each in data.rows] for data in self.data]
        asked = [[[each.question, each.gold] for each in data.questions] for data in self.data]
        return {
            "kind": OUTCOMES,
            "version": VERSION,
            "made_by": versions()["mlx-rsgwm"],
            "base": base.fingerprint,
            "adapters": dict(zip(self.labels, hashes, strict=True)),
            "tasks": {label: task_of(adapter) for label, adapter in zip(self.labels, self.adapters, strict=True)},
            "data": {label: data.name for label, data in zip(self.labels, self.data, strict=True)},
            "rows": {label: len(data.rows) for label, data in zip(self.labels, self.data, strict=True)},
            "questions": {label: len(data.questions) for label, data in zip(self.labels, self.data, strict=True)},
            "data_sha256": files.sha256_json([rows, asked]),
            "seed": self.seed,
        }

    def _take(self, row: Any, _: str) -> None:
        parsed = OutcomeRow.from_dict(row)
        self.rows[frozenset(parsed.members), parsed.method] = parsed

    def _key(self, unit: Unit) -> tuple[frozenset[str], str]:
        return frozenset(self.labels[place] for place in unit.members), unit.method

    def _measure(self, unit: Unit) -> OutcomeRow:
        names = tuple(self.labels[place] for place in unit.members)
        if unit.variant is None:
            place = unit.members[0]
            scores = self._alone(place) if unit.method == SINGLE else self._scores(place, None)
            return OutcomeRow(names, unit.method, {names[0]: scores})
        options = MergeOptions(unit.variant.method, "draft", unit.variant.parameters, seed=self.seed)
        try:
            merged = merge([self.adapters[place] for place in unit.members], options)
        except RsgwmError as error:
            return OutcomeRow(names, unit.method, {}, str(error))
        self.slots.load(SLOT, merged)
        return OutcomeRow(names, unit.method, {self.labels[place]: self._scores(place, SLOT) for place in unit.members})

    def _alone(self, place: int) -> Scores:
        """An adapter's own scores, with twice the standard errors of its differences from the base."""
        base = self._each(place, BASE)
        single = self._each(place, SINGLE)
        margins = {}
        for utility, sign in ((NLL, -1), (TOKENS, 1), (ANSWERS, 1)):
            if utility in single:
                differences = sign * (single[utility][0] - base[utility][0])
                margins[utility] = STANDARD_ERRORS * token_weighted(differences, single[utility][1], self.seed)[3]
        return _total(single, margins)

    def _scores(self, place: int, slot: str | None) -> Scores:
        return _total(self._each(place, BASE) if slot is None else self._values(place, slot))

    def _each(self, place: int, method: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By row, of the base or an adapter alone; kept, since a difference needs both."""
        if (place, method) not in self._per_row:
            if method == SINGLE:
                self.slots.load(SLOT, self.adapters[place])
            self._per_row[place, method] = self._values(place, SLOT if method == SINGLE else None)
        return self._per_row[place, method]

    def _values(self, place: int, slot: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By utility the sums and counts of every row: nats or likeliest tokens of tokens, right ones of questions."""
        data = self.data[place]
        with self.slots.using(slot):
            nats, right, tokens = row_scores(self.slots.model, data.rows, BATCH)
        values = {NLL: (nats, tokens), TOKENS: (right, tokens)}
        if data.questions:
            values[ANSWERS] = (self._answers(place, slot), np.ones(len(data.questions), np.int64))
        return values

    def _answers(self, place: int, slot: str | None) -> np.ndarray:
        """Whether the greedy draft of each question is right, (questions,) int64."""
        data = self.data[place]
        meter = Meter(self.slots, data.questions, template_of([self.adapters[place]]), 0, 4 * BATCH)
        drafts, _ = meter.drafts(slot)
        return np.array(
            [
                judge(question, replace(draft, text=meter.tokenizer.decode(list(draft.tokens))), {}).correct
                for question, draft in zip(data.questions, drafts, strict=True)
            ],
            np.int64,
        )


def _total(values: Mapping[str, tuple[np.ndarray, np.ndarray]], margins: Mapping[str, float] | None = None) -> Scores:
    correct, items = values.get(ANSWERS, (np.zeros(0), np.zeros(0)))
    return Scores(
        float(values[NLL][0].sum()),
        int(values[TOKENS][0].sum()),
        int(values[NLL][1].sum()),
        int(correct.sum()),
        int(items.sum()),
        margins,
    )


def summary_rows(outcomes: Outcomes, utility: str) -> Iterator[list[str]]:
    """A table of the methods: merges made, mean and least R and R̃ of a member, over pairs and larger sets together."""
    yield ["method", "merges", "refused", "mean R", "worst R", "mean floored", "worst floored"]
    retentions = outcomes.retentions(utility)
    for method in outcomes.methods:
        of_method = [each for each in retentions if each.method == method]
        refused = sum(bool(row.refused) for row in outcomes.rows.values() if row.method == method)
        columns = (
            [value for each in of_method for value in each.shares.values()],
            [value for each in of_method for value in each.floored.values()],
        )
        told = [f"{each:.3f}" for values in columns for each in ((np.mean(values), min(values)) if values else ())]
        yield [method, str(len(of_method)), str(refused), *told, *["–"] * (4 - len(told))]
