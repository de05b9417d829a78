"""The report's figures as one PNG: families, reliability, risk and coverage, threshold sweep, attempts, latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.evaluation.report.svg import shortened

SWEPT = {"accuracy": "accuracy", "accept_rate": "accept rate", "false_accept_rate": "false accepts"}
MODES = (("drafter", "drafter alone"), ("draft_verify", "draft–verify"))


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the six panels and write them.

    Raises:
        ImportError: matplotlib is not installed.
        RsgwmError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (families, reliability, risk), (sweep, attempts, latency) = figure.subplots(2, 3)
    _families(families, summary)
    _reliability(reliability, summary)
    _risk(risk, summary)
    _sweep(sweep, summary)
    counts = summary["attempts"]
    attempts.bar(list(counts), list(counts.values()))
    attempts.set(xlabel="attempts", ylabel="items", title="Attempts")
    for mode, label in MODES:
        if summary["latency_ms"][mode]:
            latency.hist(summary["latency_ms"][mode], bins=12, alpha=0.6, label=label)
    latency.set(xlabel="ms, one question at a time", ylabel="items", title="Latency")
    if latency.patches:
        latency.legend()
    files.write_figure(path, figure)


def _families(axes: Any, summary: Mapping[str, Any]) -> None:
    tasks = list(summary["by_task"])
    for shift, (mode, label) in enumerate(MODES):
        rates = [summary["by_task"][task][mode] for task in tasks]
        values = [rate["value"] for rate in rates]
        below = [rate["value"] - rate["low"] for rate in rates]
        above = [rate["high"] - rate["value"] for rate in rates]
        places = [index + (shift - 0.5) * 0.4 for index in range(len(tasks))]
        axes.bar(places, values, 0.4, yerr=[below, above], capsize=3, label=label)
    axes.set_xticks(range(len(tasks)), [shortened(task) for task in tasks], rotation=20, ha="right")
    axes.set(ylim=(0, 1), ylabel="accuracy", title="Families")
    axes.legend()


def _reliability(axes: Any, summary: Mapping[str, Any]) -> None:
    for name, labels in summary["verifier"].items():
        bins = labels["all"]["bins"]
        if bins:
            shares = [row["correct"] for row in bins]
            errors = [[s["value"] - s["low"] for s in shares], [s["high"] - s["value"] for s in shares]]
            places = [row["mean_score"] for row in bins]
            axes.errorbar(places, [s["value"] for s in shares], yerr=errors, fmt="o-", capsize=3, label=name)
    axes.plot((0, 1), (0, 1), color="grey", linestyle=":")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="share right", title="Reliability, all drafts")
    if summary["verifier"]:
        axes.legend()


def _risk(axes: Any, summary: Mapping[str, Any]) -> None:
    for name, labels in summary["verifier"].items():
        points = labels["first"]["risk_coverage"]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{name}, first drafts")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="coverage", ylabel="risk", title="Risk and coverage")
    if summary["verifier"]:
        axes.legend()


def _sweep(axes: Any, summary: Mapping[str, Any]) -> None:
    points = summary["sweep"].get(summary["score"], {})
    for name, label in SWEPT.items():
        shown = [(float(at), row[name]["value"]) for at, row in points.items() if row[name] is not None]
        if shown:
            axes.plot(*zip(*shown, strict=True), marker=".", label=label)
    axes.axvline(summary["threshold"], color="grey", linestyle=":", label="threshold used")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"threshold on {summary['score']}", title="Threshold sweep")
    axes.legend()
