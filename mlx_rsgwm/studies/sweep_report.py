"""What a merge sweep found: rankings with intervals, tests against the best, retention; table, Markdown and plot.

Several sweeps of the same candidates (other seeds of the same pool) are read as one: items are pooled, and an answer is
only ever compared with answers of its own sweep and task, since scores of different models have no common scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.evaluation.report.folder import show
from mlx_rsgwm.evaluation.report.svg import shortened
from mlx_rsgwm.evaluation.stats.intervals import share
from mlx_rsgwm.evaluation.stats.paired import holm, mcnemar
from mlx_rsgwm.evaluation.stats.stratified import (
    Estimate,
    item_counts,
    item_mean,
    item_ratio,
    mean_of,
    weighted_auroc,
)
from mlx_rsgwm.studies.merge_sweep import Measured, Outcome
from mlx_rsgwm.studies.sweep_meter import JUDGED_BY

FORMAT = "mlx-rsgwm/merge-sweep"
FORMAT_VERSION = 1
REPORT_FILE = "sweep.json"
MARKDOWN_FILE = "sweep.md"
PLOT_FILE = "sweep.png"
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


def summarise(sweeps: Sequence[Measured], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
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
    strata = [stratum for index, one in enumerate(sweeps) for stratum in _strata(index, one, rng, resamples)]
    names = [outcome.name for outcome in sweeps[0].outcomes]
    names = [name for name in names if all(any(o.name == name for o in other.outcomes) for other in sweeps)]
    columns = {name: [next(o for o in one.outcomes if o.name == name) for one in sweeps] for name in names}
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
        "about": [dict(one.about) for one in sweeps],
    }


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Beside the p of every merge that was compared with the best one: Holm's, over all of them."""
    found = [row["against_best"]["accuracy"] for row in rows]
    for one, corrected in zip(found, holm([one["p_value"] for one in found]), strict=True):
        one["p_value_holm"] = corrected


def _tasks(measured: Measured) -> list[str]:
    return list(dict.fromkeys(question.task for question in measured.questions))


def _strata(index: int, measured: Measured, rng: np.random.Generator, resamples: int) -> list[Stratum]:
    found = []
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
        found.append(Stratum(index, task, items, answers, owners, correct, counts))
    return found


class _Table:
    """The estimates of every measured candidate, computed once each."""

    def __init__(
        self, sweeps: Sequence[Measured], strata: Sequence[Stratum], columns: Mapping[str, Sequence[Outcome]]
    ) -> None:
        self.strata = strata
        self.columns = columns
        self.tasks = _tasks(sweeps[0])
        self.own = {outcome.task: name for name, column in columns.items() for outcome in column[:1] if outcome.task}
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
        own = {task: self.own[task] for task in self.tasks if task in self.own}
        return {**({"own": own} if own else {}), **{extra: dict.fromkeys(self.tasks, extra) for extra in self.extras}}

    def _shown_auroc(self, name: str, score: str, subset: str, count: int) -> dict[str, Any] | None:
        found = self.auroc[name, score, subset]
        return found.to_dict(count) if np.isfinite(found.value) else None

    def _against(self, name: str, best: Mapping[str, Any]) -> dict[str, Any]:
        paired = mcnemar(self._all_hits(best["accuracy"]), self._all_hits(name))
        found: dict[str, Any] = {
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
                found[f"auroc/{score}"] = self.auroc[name, score, "all"].minus(reference)
        return found

    def _retention(self, name: str, reference: str, task: str) -> dict[str, Any] | None:
        """Accuracy over that of ``reference`` on one task; None where that is 0."""
        own, of = self._mean(name, self._hits, task), self._mean(reference, self._hits, task)
        return None if not of.value else own.over(of).to_dict(sum(len(s.items) for s in self.strata if s.task == task))

    def _task_rate(self, name: str, task: str) -> dict[str, Any]:
        hits = self._all_hits(name, task)
        return share(sum(hits), len(hits)).to_dict()

    def _all_hits(self, name: str, task: str | None = None) -> list[bool]:
        column = self.columns[name]
        chosen = [s for s in self.strata if task in (None, s.task)]
        return [column[s.sweep].drafts[item][1] for s in chosen for item in s.items.tolist()]

    def _mean(self, name: str, statistic: Callable[[Stratum, Outcome], Estimate], task: str | None = None) -> Estimate:
        """The mean of a statistic over the strata in which it exists."""
        return mean_of([statistic(s, self.columns[name][s.sweep]) for s in self.strata if task in (None, s.task)])

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


def _sections(summary: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Titles and tables (first row is the head) shared by the terminal and the Markdown."""
    tasks, rows = list(summary["tasks"]), summary["rows"]
    n = sum(summary["tasks"].values())
    drafting = [["", f"draft accuracy (n = {n})", "to the best", "p", "p (Holm)", "draft NLL", *tasks]]
    judging = [["", *(f"AUROC {score} ({subset})" for score in JUDGED_BY for subset in ("all", "drafts"))]]
    for row in rows:
        against = row["against_best"]["accuracy"]
        drafting.append(
            [
                _label(row, summary),
                show(row["accuracy"]),
                "best" if row["name"] == summary["best"]["accuracy"] else f"{against['difference']:+.3f}",
                "" if row["name"] == summary["best"]["accuracy"] else f"{against['p_value']:.3f}",
                f"{against['p_value_holm']:.3f}" if "p_value_holm" in against else "",
                show(row["nll"]),
                *(f"{row['accuracy_by_task'][task]['value']:.2f}" for task in tasks),
            ]
        )
        judging.append(
            [
                _label(row, summary),
                *(
                    show(row["auroc"][score][subset]) + _mark(row, score, subset)
                    for score in JUDGED_BY
                    for subset in ("all", "drafts")
                ),
            ]
        )
    found = [("Drafting", drafting), ("Judging", judging)]
    for reference in rows[0]["retention"] if rows else ():
        title = (
            "Retention against each family's own adapter" if reference == "own" else f"Retention against {reference}"
        )
        kept = [row for row in rows if row["kind"] == "merge"]
        head = ["", *rows[0]["retention"][reference]]
        found.append(
            (title, [head, *([_label(row, summary), *map(show, row["retention"][reference].values())] for row in kept)])
        )
    if summary["refused"]:
        body = [[name, f"{r['sweeps']} of {summary['sweeps']}", r["reason"]] for name, r in summary["refused"].items()]
        found.append(("Refused", [["", "sweeps", "why"], *body]))
    return found


def _label(row: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    return row["name"] if row["kind"] == "merge" else f"({row['name']})"


def _mark(row: Mapping[str, Any], score: str, subset: str) -> str:
    against = row["against_best"].get(f"auroc/{score}")
    return " *" if subset == "all" and against and against["tied"] is False else ""


def _notes(summary: Mapping[str, Any]) -> list[str]:
    answers = summary["answers"]
    return [
        f"{sum(summary['tasks'].values())} items of {len(summary['tasks'])} tasks, {summary['sweeps']} sweep(s), "
        f"greedy drafts; {answers['all']} labelled answers, {answers['drafts']} of them drafts. Brackets are 95 % "
        "intervals: Wilson for accuracy, bootstrap over items for the rest. In parentheses: not merges.",
        "p: exact McNemar test against the best merge on the same items; Holm: corrected for the number of merges. "
        "* : AUROC below the best merge's, the interval of the paired difference without 0.",
    ]


def render_table(summary: Mapping[str, Any]) -> str:
    """The summary as plain text with aligned columns, for a terminal."""
    blocks = []
    for title, rows in _sections(summary):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        blocks.append("\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]]))
    return "\n\n".join([*blocks, "\n".join(_notes(summary))])


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    lines = ["# Merge sweep", "", *(f"{note}\n" for note in _notes(summary))]
    for title, rows in _sections(summary):
        body = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
        lines += [f"## {title}", "", body[0], "|" + "---|" * len(rows[0]), *body[1:], ""]
    return "\n".join(lines)


def write_sweep(folder: Path, sweeps: Sequence[Measured], seed: int = 0, progress: Progress = SILENT) -> dict[str, Any]:
    """Write sweep.md, sweep.png and, last, sweep.json, and return what that holds.

    Without matplotlib the plot is left out and ``progress`` is told.
    """
    summary = summarise(sweeps, seed)
    make_folder(folder)
    files.write_text(folder / MARKDOWN_FILE, render_markdown(summary))
    try:
        plot(summary, folder / PLOT_FILE)
    except ImportError:
        (folder / PLOT_FILE).unlink(missing_ok=True)
        progress.message("no plot: matplotlib is not installed (pip install 'mlx-rsgwm[plots]')")
    files.write_json(folder / REPORT_FILE, summary)
    return summary


def plot(summary: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Draft accuracy with intervals, sorted, and the AUROC of both scores beside it; a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = summary["rows"][::-1]
    figure = Figure(figsize=(11, 1.5 + 0.27 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    drafting, judging = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        merge = row["kind"] == "merge"
        _point(drafting, row["accuracy"], place, "C0" if merge else "0.5", "o")
        for score, colour, shift in zip(JUDGED_BY, ("C1", "C2"), (0.12, -0.12), strict=True):
            if row["auroc"][score]["all"]:
                _point(
                    judging,
                    row["auroc"][score]["all"],
                    place + shift,
                    colour if merge else "0.5",
                    "s" if shift > 0 else "^",
                )
    drafting.set_yticks(range(len(rows)), [shortened(_label(row, summary), 60) for row in rows], fontsize=8)
    drafting.set(xlabel=f"draft accuracy, greedy, n = {sum(summary['tasks'].values())}", title=title or "Drafting")
    judging.set(xlabel=f"AUROC on {summary['answers']['all']} labelled answers", title="Judging")
    judging.axvline(0.5, color="0.8", linewidth=1)
    for score, colour, marker in zip(JUDGED_BY, ("C1", "C2"), "s^", strict=True):
        judging.plot([], [], marker, color=colour, label=score)
    judging.legend(fontsize=8)
    for axes in (drafting, judging):
        axes.grid(axis="x", color="0.9")
    files.write_figure(path, figure)


def _point(axes: Any, rate: Mapping[str, Any], place: float, colour: str, marker: str) -> None:
    spread = [[rate["value"] - rate["low"]], [rate["high"] - rate["value"]]]
    axes.errorbar([rate["value"]], [place], xerr=spread, fmt=marker, color=colour, markersize=4, linewidth=1)
