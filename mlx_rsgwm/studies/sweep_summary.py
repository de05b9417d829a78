"""What a merge sweep found, as one JSON object: rankings with intervals, tests against the best, retention.

Several sweeps of the same candidates (other seeds of the same pool) are read as one: items are pooled, and an answer is
only ever compared with answers of its own sweep and task, since scores of different models have no common scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.stats.intervals import share
from mlx_rsgwm.evaluation.stats.paired import holm, mcnemar
from mlx_rsgwm.evaluation.stats.stratified import (
    Estimate,
    item_counts,
    item_mean,
    item_ratio,
    stratified_mean,
    weighted_auroc,
)
from mlx_rsgwm.studies.merge_sweep import Measured, Outcome
from mlx_rsgwm.studies.sweep_meter import JUDGED_BY

FORMAT = "mlx-rsgwm/merge-sweep"
FORMAT_VERSION = 1
RESAMPLES = 2000
# Which of the labelled answers an AUROC is over: all of them, the reference's own drafts, gold against perturbed gold.
SUBSETS: Mapping[str, tuple[str, ...]] = {
    "all": ("gold", "perturbed", "draft"),
    "drafts": ("draft",),
    "perturbed": ("gold", "perturbed"),
}
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Stratum:
    """One task of one sweep. ``items`` index the sweep's questions; ``answers`` its labelled answers by subset.

    ``owners``: for every answer of a subset the position of its question in ``items``. ``counts``: (resamples, items),
    how often each item was drawn: the same for every candidate, so that differences are paired.
    """

    sweep: int
    task: str
    items: np.ndarray
    answers: Mapping[str, np.ndarray]
    owners: Mapping[str, np.ndarray]
    correct: Mapping[str, np.ndarray]
    counts: np.ndarray


def summarise_sweeps(sweeps: Sequence[Measured], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """One JSON object with everything that is shown.

    Accuracies have Wilson intervals; NLL, AUROC, differences and retention 95 % percentile bootstraps over items,
    within task and sweep. AUROC is the mean of the tasks' own. A candidate is tied with the best merge when the exact
    McNemar test on the same items does not tell them apart at 5 % (AUROC: when the interval of the paired difference
    holds 0).

    Raises:
        RsgwmError: no sweep, or sweeps of different tasks.
    """
    if not sweeps:
        raise RsgwmError("no merge sweep to summarise")
    tasks = _tasks(sweeps[0])
    if any(_tasks(other) != tasks for other in sweeps):
        raise RsgwmError("the sweeps differ in tasks; summarise each by itself")
    rng = np.random.default_rng(seed)
    strata = [stratum for index, sweep in enumerate(sweeps) for stratum in _strata(index, sweep, rng, resamples)]
    names = [outcome.name for outcome in sweeps[0].outcomes]
    names = [name for name in names if all(any(o.name == name for o in other.outcomes) for other in sweeps)]
    columns = {name: [next(o for o in sweep.outcomes if o.name == name) for sweep in sweeps] for name in names}
    refused = {
        name: [outcome.refused for outcome in column if outcome.refused]
        for name, column in columns.items()
        if any(outcome.refused for outcome in column)
    }
    measured = {name: column for name, column in columns.items() if name not in refused}
    merges = [name for name, column in measured.items() if column[0].kind == "merge"]
    table = _Table(sweeps, strata, measured)
    best = _best(table, merges)
    rows = [table.row(name, best) for name in measured]
    _correct([row for row in rows if row["kind"] == "merge" and row["name"] != best["accuracy"]])
    rows.sort(key=lambda row: (-row["accuracy"]["macro"], row["nll"]["value"]))
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sweeps": len(sweeps),
        "tasks": {task: sum(len(s.items) for s in strata if s.task == task) for task in tasks},
        "answers": {name: sum(len(s.answers[name]) for s in strata) for name in SUBSETS},
        "best": best,
        "rows": rows,
        "refused": {name: {"sweeps": len(reasons), "reason": reasons[0]} for name, reasons in refused.items()},
        "about": [dict(sweep.about) for sweep in sweeps],
    }


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Beside the p of every merge that was compared with the best one: Holm's, over all of them."""
    comparisons = [row["against_best"]["accuracy"] for row in rows]
    for comparison, corrected in zip(
        comparisons, holm([comparison["p_value"] for comparison in comparisons]), strict=True
    ):
        comparison["p_value_holm"] = corrected


def _tasks(measured: Measured) -> list[str]:
    return list(dict.fromkeys(question.task for question in measured.questions))


def _strata(index: int, measured: Measured, rng: np.random.Generator, resamples: int) -> list[Stratum]:
    strata = []
    for task in _tasks(measured):
        items = np.array([n for n, question in enumerate(measured.questions) if question.task == task])
        place = {item: position for position, item in enumerate(items.tolist())}
        answers, owners, correct = {}, {}, {}
        for name, kinds in SUBSETS.items():
            chosen = [n for n, a in enumerate(measured.answers) if a.question in place and a.kind in kinds]
            answers[name] = np.array(chosen, dtype=np.int64)
            owners[name] = np.array([place[measured.answers[n].question] for n in chosen], dtype=np.int64)
            correct[name] = np.array([measured.answers[n].correct for n in chosen], dtype=bool)
        counts = item_counts(rng, len(items), resamples)
        strata.append(Stratum(index, task, items, answers, owners, correct, counts))
    return strata


class _Table:
    """The estimates of every measured candidate, computed once each."""

    def __init__(
        self, sweeps: Sequence[Measured], strata: Sequence[Stratum], columns: Mapping[str, Sequence[Outcome]]
    ) -> None:
        self.strata = strata
        self.columns = columns
        self.tasks = _tasks(sweeps[0])
        self.task_adapters = {
            outcome.task: name for name, column in columns.items() for outcome in column[:1] if outcome.task
        }
        self.extras = [name for name, column in columns.items() if column[0].kind == "extra"]
        self.accuracy = {name: self._mean(name, self._hits) for name in columns}
        self.nll = {name: self._mean(name, self._loss) for name in columns}
        self.auroc = {
            (name, score, subset): self._mean(name, partial(_auroc, score=score, subset=subset))
            for name in columns
            for score in JUDGED_BY
            for subset in SUBSETS
        }

    def row(self, name: str, best: Mapping[str, Any]) -> dict[str, Any]:
        """Everything about one candidate."""
        kind, hits = self.columns[name][0].kind, self._all_hits(name)
        count = {subset: sum(len(s.answers[subset]) for s in self.strata) for subset in SUBSETS}
        return {
            "name": name,
            "kind": kind,
            "accuracy": {**share(sum(hits), len(hits)).to_dict(), "macro": self.accuracy[name].value},
            "accuracy_by_task": {task: self._task_rate(name, task) for task in self.tasks},
            "nll": self.nll[name].to_dict(len(hits)),
            "nll_by_task": {task: self._mean(name, self._loss, task).value for task in self.tasks},
            "auroc": {
                score: {subset: self._shown_auroc(name, score, subset, count[subset]) for subset in SUBSETS}
                for score in JUDGED_BY
            },
            "auroc_by_task": {
                score: {
                    task: _finite(self._mean(name, partial(_auroc, score=score, subset="all"), task).value)
                    for task in self.tasks
                }
                for score in JUDGED_BY
            },
            "retention": {
                reference: {task: self._retention(name, source, task) for task, source in sources.items()}
                for reference, sources in self._references().items()
            },
            "against_best": self._against(name, best),
            "diagnosis": [dict(outcome.diagnosis) for outcome in self.columns[name]],
        }

    def _references(self) -> dict[str, dict[str, str]]:
        own_adapters = {task: self.task_adapters[task] for task in self.tasks if task in self.task_adapters}
        return {
            **({"own": own_adapters} if own_adapters else {}),
            **{extra: dict.fromkeys(self.tasks, extra) for extra in self.extras},
        }

    def _shown_auroc(self, name: str, score: str, subset: str, count: int) -> dict[str, Any] | None:
        auroc = self.auroc[name, score, subset]
        return auroc.to_dict(count) if np.isfinite(auroc.value) else None

    def _against(self, name: str, best: Mapping[str, Any]) -> dict[str, Any]:
        paired = mcnemar(self._all_hits(best["accuracy"]), self._all_hits(name))
        differences: dict[str, Any] = {
            "accuracy": {
                **paired.to_dict(),
                **self.accuracy[name].minus(self.accuracy[best["accuracy"]]),
                "tied": paired.p_value >= SIGNIFICANT,
            },
            "nll": self.nll[name].minus(self.nll[best["nll"]]),
        }
        for score in JUDGED_BY:
            if best["auroc"][score] is not None:
                reference = self.auroc[best["auroc"][score], score, "all"]
                differences[f"auroc/{score}"] = self.auroc[name, score, "all"].minus(reference)
        return differences

    def _retention(self, name: str, reference: str, task: str) -> dict[str, Any] | None:
        """Accuracy over that of ``reference`` on one task; None where that is 0."""
        mean, of = self._mean(name, self._hits, task), self._mean(reference, self._hits, task)
        return None if not of.value else mean.over(of).to_dict(sum(len(s.items) for s in self.strata if s.task == task))

    def _task_rate(self, name: str, task: str) -> dict[str, Any]:
        hits = self._all_hits(name, task)
        return share(sum(hits), len(hits)).to_dict()

    def _all_hits(self, name: str, task: str | None = None) -> list[bool]:
        column = self.columns[name]
        chosen = [s for s in self.strata if task in (None, s.task)]
        return [column[s.sweep].drafts[item][1] for s in chosen for item in s.items.tolist()]

    def _mean(self, name: str, statistic: Callable[[Stratum, Outcome], Estimate], task: str | None = None) -> Estimate:
        """The mean of a statistic over the strata in which it exists."""
        return stratified_mean(
            [statistic(s, self.columns[name][s.sweep]) for s in self.strata if task in (None, s.task)]
        )

    @staticmethod
    def _hits(stratum: Stratum, outcome: Outcome) -> Estimate:
        right = np.array([outcome.drafts[item][1] for item in stratum.items.tolist()], dtype=np.float64)
        return item_mean(right, stratum.counts)

    @staticmethod
    def _loss(stratum: Stratum, outcome: Outcome) -> Estimate:
        nats, tokens = np.array([outcome.gold[item] for item in stratum.items.tolist()], dtype=np.float64).T
        return item_ratio(nats, tokens, stratum.counts)


def _auroc(stratum: Stratum, outcome: Outcome, score: str, subset: str) -> Estimate:
    values = np.asarray(outcome.scores[score], dtype=np.float64)[stratum.answers[subset]]
    return weighted_auroc(values, stratum.correct[subset], stratum.owners[subset], stratum.counts)


def _best(table: _Table, merges: Sequence[str]) -> dict[str, Any]:
    """The merge with the highest accuracy (lower NLL among equals), the lowest NLL, the highest AUROC by each score."""
    names = list(merges) or list(table.columns)
    auroc: dict[str, str | None] = {}
    for score in JUDGED_BY:
        values = {name: table.auroc[name, score, "all"].value for name in names}
        known = {name: value for name, value in values.items() if np.isfinite(value)}
        auroc[score] = max(known, key=known.__getitem__) if known else None
    return {
        "accuracy": max(names, key=lambda name: (table.accuracy[name].value, -table.nll[name].value)),
        "nll": min(names, key=lambda name: table.nll[name].value),
        "auroc": auroc,
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
