"""A verdict on tails as text, and as a picture: mean excess, quantiles against the fit, ξ by threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_rsgwm.core.tables import aligned
from mlx_rsgwm.evaluation.tails.gates import EQUIVALENT, THRESHOLDS, Gate, Settings, TailVerdict
from mlx_rsgwm.evaluation.tails.pareto import NEAR_ZERO, standard_error
from mlx_rsgwm.evaluation.tails.resampling import tail_count, tails_of

SIZE = (10.0, 3.4)
EFFECTS = (0.05, 0.1, 0.2, 0.3)
MARKS = {True: "passed", False: "failed", None: "open"}


def verdict_text(verdict: TailVerdict) -> str:
    """Verdict, gates and arms, for a terminal."""
    gate = f" (gate {verdict.gate})" if verdict.gate else ""
    lines = [f"{verdict.verdict}{gate}: {verdict.reason}", ""]
    lines.append(aligned([["gate", "", "why"], *(_gate_row(gate, verdict.verdict) for gate in verdict.gates)]))
    head = ["", "scores", "in the tail", "from", "mean", "CVaR", "ξ", "±", "σ", "A-D p", "CvM p"]
    rows = [
        [
            arm.name,
            f"{arm.items}",
            f"{arm.excesses}",
            *(f"{value:.3g}" for value in (arm.threshold, arm.mean, arm.expected)),
            f"{arm.shape:+.3f}",
            f"{1.96 * arm.standard_error:.3f}",
            f"{arm.scale:.3g}",
            f"{arm.fit.anderson_darling:.3f}",
            f"{arm.fit.cramer_von_mises:.3f}",
        ]
        for arm in verdict.arms
    ]
    return "\n".join([*lines, "", aligned([head, *rows])])


def power_text(settings: Settings) -> str:
    """How many excesses, and scores, of each arm a difference in ξ takes, that of ``settings`` among them."""
    rows = [["difference in ξ", "in each tail", f"scores, tail from {settings.quantile:g}"]]
    for effect in sorted({*EFFECTS, settings.effect}):
        count = replace(settings, effect=effect).least_excesses
        rows.append([f"{effect:g}", f"{count}", f"{round(count / (1 - settings.quantile))}"])
    return aligned(rows)


def draw_tails(arms: Sequence[tuple[str, np.ndarray]], verdict: TailVerdict) -> Any:
    """A function that draws the arms' (name, scores (n,)) three diagnostics on a figure of ``SIZE``."""

    def draw(figure: Any) -> None:
        excess, quantiles, stability = figure.subplots(1, 3)
        quantile = verdict.settings.quantile
        for index, ((name, scores), arm) in enumerate(zip(arms, verdict.arms, strict=True)):
            color = f"C{index}"
            thresholds = np.quantile(scores, np.linspace(0.8, 0.995, 60))
            excess.plot(thresholds, [(scores[scores > u] - u).mean() for u in thresholds], color=color, label=name)
            tail = np.sort(tails_of(scores[None], quantile).excesses(quantile)[0])
            chances = (np.arange(len(tail)) + 0.5) / len(tail)
            near = abs(arm.shape) < NEAR_ZERO
            fitted = -np.log1p(-chances) if near else np.expm1(-arm.shape * np.log1p(-chances)) / arm.shape
            quantiles.plot(arm.scale * fitted, tail, ".", markersize=2, color=color)
            shapes = list(arm.shapes.values())
            errors = [
                1.96 * standard_error(shape, tail_count(arm.items, at))
                for shape, at in zip(shapes, THRESHOLDS, strict=True)
            ]
            places = np.array(THRESHOLDS) + 0.002 * index
            stability.errorbar(places, shapes, yerr=errors, marker="o", markersize=3, color=color)
        end = max(quantiles.get_xlim()[1], quantiles.get_ylim()[1])
        quantiles.plot([0, end], [0, end], color="0.6", linewidth=1)
        excess.set(title="Mean excess", xlabel="threshold", ylabel="mean of what exceeds it")
        quantiles.set(title="Excesses", xlabel="by the fit", ylabel="observed")
        stability.set(title="ξ by threshold", xlabel="quantile where the tail begins")
        excess.legend()

    return draw


def _gate_row(gate: Gate, verdict: str) -> list[str]:
    mark = "no effect" if verdict == EQUIVALENT and gate.number == 4 else MARKS[gate.passed]
    return [f"{gate.number} {gate.name}", mark, gate.reason]
