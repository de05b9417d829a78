"""The report's six panels: right answers, reliability, risk and coverage, threshold sweep, attempts, latency.

Each is a function of (figure, summary). ``plot.png`` puts all of them on one figure; the page embeds each as an SVG, so
that they stand below each other on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.tables import shortened
from mlx_rsgwm.evaluation.report.figures import Size, inline_svg, legend_below, spread_of, write_figure

SWEPT = {"accuracy": "accuracy", "accept_rate": "accept rate", "false_accept_rate": "false accepts"}
MODES = (("drafter", "before checking"), ("draft_verify", "after checking"))
OPENING = "Right answers"  # the chart that the page opens with
ROWS, COLUMNS = 2, 3
SHARES = (-0.02, 1.02)  # so that a marker at 0 or 1 is not cut
PANEL: Size = (4.4, 3.5)
MOST_FAMILIES = 8  # that fit in a panel's height; more make it higher


def families(figure: Any, summary: Mapping[str, Any]) -> None:
    """Shares right, of all questions and by task, with intervals; bars lie, so that long names never meet."""
    axes, rows = figure.subplots(), _right_answers(summary)
    tasks = list(rows)
    for shift, (mode, label) in enumerate(MODES):
        rates = [rows[task][mode] for task in tasks]
        places = [index + (shift - 0.5) * 0.4 for index in range(len(tasks))]
        values = [rate["value"] for rate in rates]
        axes.barh(places, values, 0.4, xerr=spread_of(rates), error_kw={"linewidth": 1}, capsize=2, label=label)
    axes.set_yticks(range(len(tasks)), [shortened(task, 24) for task in tasks])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share right, with 95 % intervals", title=OPENING)
    legend_below(figure, axes)


def _right_answers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy by mode: of all questions, and of each task where there are several."""
    everything = {mode: summary[mode]["accuracy"] for mode, _ in MODES}
    return {"all questions": everything, **(summary["by_task"] if len(summary["by_task"]) > 1 else {})}


def draw_reliability(figure: Any, summary: Mapping[str, Any]) -> None:
    """Share of right drafts over the mean score of each bin."""
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color="grey", linestyle=":")
    for name, labels in summary["verifier"].items():
        bins = labels["all"]["bins"]
        if bins:
            shares = [row["correct"] for row in bins]
            places, values = [row["mean_score"] for row in bins], [share["value"] for share in shares]
            axes.errorbar(places, values, yerr=spread_of(shares), fmt="o-", markersize=4, capsize=2, label=name)
    axes.set(xlim=SHARES, ylim=SHARES, xlabel="score", ylabel="share right", title="Reliability, all drafts")
    legend_below(figure, axes, 3)


def risk_and_coverage(figure: Any, summary: Mapping[str, Any]) -> None:
    """Share of wrong ones among the drafts with the highest scores: the first draft of each item, and all of them."""
    axes = figure.subplots()
    for name, labels in summary["verifier"].items():
        color = None
        for which, line, label in (("first", "-", name), ("all", ":", None)):
            points = labels[which]["risk_coverage"]
            if points:
                color = axes.plot(*zip(*points, strict=True), line, color=color, label=label)[0].get_color()
    axes.set(xlim=SHARES, ylim=SHARES, xlabel="coverage (dotted: all drafts, else first ones)", ylabel="risk")
    axes.set_title("Risk and coverage")
    legend_below(figure, axes, 3)


def threshold_sweep(figure: Any, summary: Mapping[str, Any]) -> None:
    """What other thresholds would have given, from the recorded drafts."""
    axes, points = figure.subplots(), summary["sweep"].get(summary["score"], {})
    for name, label in SWEPT.items():
        shown = [(float(at), row[name]["value"]) for at, row in points.items() if row[name] is not None]
        if shown:
            axes.plot(*zip(*shown, strict=True), marker=".", label=label)
    if 0 <= summary["threshold"] <= 1:
        axes.axvline(summary["threshold"], color="grey", linestyle=":", label="threshold used")
    axes.set(xlim=SHARES, ylim=SHARES, xlabel=f"threshold on {summary['score']}", ylabel="rate")
    axes.set_title("Threshold sweep")
    legend_below(figure, axes)


def draw_attempts(figure: Any, summary: Mapping[str, Any]) -> None:
    """How many items took how many drafts."""
    axes, counts = figure.subplots(), summary["attempts"]
    axes.bar(range(len(counts)), list(counts.values()), 0.6)
    axes.set_xticks(range(len(counts)), list(counts))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="attempts", ylabel="items", title="Attempts")


def latency(figure: Any, summary: Mapping[str, Any]) -> None:
    """Times of the items that were run one by one, both modes in the same bins."""
    axes, times = figure.subplots(), summary["latency_ms"]
    shown = [(times[mode], label) for mode, label in MODES if times[mode]]
    if shown:
        values, labels = zip(*shown, strict=True)
        axes.hist(values, bins=8, label=labels)
        axes.yaxis.get_major_locator().set_params(integer=True)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    axes.set(xlabel="ms, one question at a time", ylabel="items", title="Latency")
    legend_below(figure, axes)


PANELS: Mapping[str, Callable[..., None]] = {  # of (figure, summary)
    OPENING: families,
    "Reliability": draw_reliability,
    "Risk and coverage": risk_and_coverage,
    "Threshold sweep": threshold_sweep,
    "Attempts": draw_attempts,
    "Latency": latency,
}


def panel_size(summary: Mapping[str, Any]) -> Size:
    """Width and height in inches; many families make a panel higher."""
    return PANEL[0], PANEL[1] + 0.28 * max(0, len(summary["by_task"]) - MOST_FAMILIES)


def draw_report(figure: Any, summary: Mapping[str, Any]) -> None:
    """All panels on one figure."""
    places = figure.subfigures(ROWS, COLUMNS, height_ratios=[panel_size(summary)[1], PANEL[1]])
    for place, panel in zip(places.flat, PANELS.values(), strict=True):
        panel(place, summary)


def plot_report(summary: Mapping[str, Any], path: Path) -> None:
    """Write all panels as one picture, PNG or SVG by the suffix of ``path``."""
    size = (COLUMNS * PANEL[0], panel_size(summary)[1] + (ROWS - 1) * PANEL[1])
    write_figure(path, partial(draw_report, summary=summary), size)


def charts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Every panel as an ``<svg>`` element, by its title."""
    sizes = {OPENING: panel_size(summary)}
    return {
        title: inline_svg(partial(panel, summary=summary), sizes.get(title, PANEL), title)
        for title, panel in PANELS.items()
    }
