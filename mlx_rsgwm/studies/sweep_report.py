"""A merge sweep's tables and picture, drawn from what ``sweep_summary`` made of it, and its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.tables import Section, markdown_page, shortened, show, text_page
from mlx_rsgwm.evaluation.report.figures import COLORS, Size, legend_below, spread_of, write_figure
from mlx_rsgwm.studies.merge_sweep import Measured
from mlx_rsgwm.studies.sweep_meter import JUDGED_BY
from mlx_rsgwm.studies.sweep_summary import summarise_sweeps

REPORT_FILE = "sweep.json"
MARKDOWN_FILE = "sweep.md"
PLOT_FILE = "sweep.png"
NOT_A_MERGE = "0.5"  # grey


def _sections(summary: Mapping[str, Any]) -> list[Section]:
    """Titles and tables (first row is the head) shared by the terminal and the Markdown."""
    tasks, rows = list(summary["tasks"]), summary["rows"]
    n = sum(summary["tasks"].values())
    drafting = [["", f"draft accuracy (n = {n})", "to the best", "p", "p (Holm)", "draft NLL", *tasks]]
    judging = [["", *(f"AUROC {score} ({subset})" for score in JUDGED_BY for subset in ("all", "drafts"))]]
    for row in rows:
        against = row["against_best"]["accuracy"]
        drafting.append(
            [
                _label(row),
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
                _label(row),
                *(
                    show(row["auroc"][score][subset]) + _mark(row, score, subset)
                    for score in JUDGED_BY
                    for subset in ("all", "drafts")
                ),
            ]
        )
    parts: list[Section] = [("Drafting", drafting), ("Judging", judging)]
    for reference in rows[0]["retention"] if rows else ():
        title = (
            "Retention against each family's own adapter" if reference == "own" else f"Retention against {reference}"
        )
        merges = [row for row in rows if row["kind"] == "merge"]
        head = ["", *rows[0]["retention"][reference]]
        parts.append(
            (title, [head, *([_label(row), *map(show, row["retention"][reference].values())] for row in merges)])
        )
    if summary["refused"]:
        body = [[name, f"{r['sweeps']} of {summary['sweeps']}", r["reason"]] for name, r in summary["refused"].items()]
        parts.append(("Refused", [["", "sweeps", "why"], *body]))
    return parts


def _label(row: Mapping[str, Any]) -> str:
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
    return text_page(_sections(summary), _notes(summary))


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    return markdown_page("Merge sweep", _sections(summary), _notes(summary))


def write_sweep(folder: Path, sweeps: Sequence[Measured], seed: int = 0) -> dict[str, Any]:
    """Write sweep.md, sweep.png and, last, sweep.json, and return what that holds."""
    summary = summarise_sweeps(sweeps, seed)
    make_folder(folder)
    files.write_text(folder / MARKDOWN_FILE, render_markdown(summary))
    plot_sweep(summary, folder / PLOT_FILE)
    files.write_json(folder / REPORT_FILE, summary)
    return summary


def plot_sweep(summary: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Draft accuracy with intervals, sorted, and the AUROC of both scores beside it; PNG or SVG."""
    size: Size = (11, 1.7 + 0.27 * len(summary["rows"]))
    write_figure(path, partial(_draw, summary=summary, title=title), size)


def _draw(figure: Any, summary: Mapping[str, Any], title: str) -> None:
    rows = summary["rows"][::-1]
    drafting, judging = figure.subplots(1, 2, sharey=True)
    colors = [COLORS[0] if row["kind"] == "merge" else NOT_A_MERGE for row in rows]
    _points(drafting, [row["accuracy"] for row in rows], range(len(rows)), colors, "o")
    for score, color, marker, shift in zip(JUDGED_BY, COLORS[1:3], "s^", (0.12, -0.12), strict=True):
        known = [place for place, row in enumerate(rows) if row["auroc"][score]["all"]]
        rates = [rows[place]["auroc"][score]["all"] for place in known]
        shades = [color if rows[place]["kind"] == "merge" else NOT_A_MERGE for place in known]
        _points(judging, rates, [place + shift for place in known], shades, marker)
        judging.plot([], [], marker, color=color, label=score)
    drafting.set_yticks(range(len(rows)), [shortened(_label(row), 60) for row in rows])
    drafting.set(xlabel=f"draft accuracy, greedy, n = {sum(summary['tasks'].values())}", title=title or "Drafting")
    judging.set(xlabel=f"AUROC on {summary['answers']['all']} labelled answers", title="Judging")
    judging.axvline(0.5, color="0.8", linewidth=1)
    for axes in (drafting, judging):
        axes.grid(axis="x", color="0.9")
    legend_below(figure, judging)


def _points(
    axes: Any, rates: Sequence[Mapping[str, Any]], places: Sequence[float], colors: Sequence[str], marker: str
) -> None:
    for rate, place, color in zip(rates, places, colors, strict=True):
        axes.errorbar(
            [rate["value"]], [place], xerr=spread_of([rate]), fmt=marker, color=color, markersize=4, linewidth=1
        )
