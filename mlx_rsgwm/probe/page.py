"""The page of a probe: tables, fingerprints as bars, predicted against measured; it loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files, tables
from mlx_rsgwm.evaluation.report.figures import inline_svg, legend_below
from mlx_rsgwm.evaluation.report.html import page
from mlx_rsgwm.probe.fingerprints import fingerprint, sections
from mlx_rsgwm.probe.predictor import Predictor

BARS = 15  # measures of a fingerprint's picture


def write_page(predictors: Sequence[Predictor], path: Path) -> None:
    """Write the page of some predictors, whole or not at all."""
    pictures = [
        inline_svg(partial(bars, predictor=each), (6, 3.6), f"Fingerprint of {each.method}")
        for each in predictors
        if each.kind == "fingerprint" and fingerprint(each)
    ]
    pictures += [
        inline_svg(partial(scatter, predictor=each), (4, 3.6), f"Predicted and measured, {each.method}, {each.kind}")
        for each in predictors
    ]
    body = "".join(f"<h2>{title}</h2>{tables.html(rows)}" for title, rows in sections(predictors))
    files.write_text(path, page("Probe", f"<main><h1>Will they merge?</h1>{body}{''.join(pictures)}</main>"))


def bars(figure: Any, predictor: Predictor) -> None:
    """β of the measures that count most, the largest on top."""
    weights = dict(list(fingerprint(predictor).items())[:BARS])
    axes = figure.subplots()
    places = range(len(weights))
    axes.barh(places, list(weights.values()))
    axes.set_yticks(places, list(weights), fontsize="small")
    axes.invert_yaxis()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(title=f"{predictor.method}: what goes with retention", xlabel="β, on measures in [−1, 1]")


def scatter(figure: Any, predictor: Predictor) -> None:
    """Sets on left-out tasks: what was predicted, and what was measured."""
    axes = figure.subplots()
    predicted = [each[1] for each in predictor.about["left_out_sets"]]
    measured = [each[2] for each in predictor.about["left_out_sets"]]
    axes.plot(predicted, measured, "o", markersize=3, label="a set, its task left out")
    ends = [min([*predicted, *measured]), max([*predicted, *measured])]
    axes.plot(ends, ends, color="grey", linewidth=0.8, label="predicted = measured")
    axes.set(title=f"{predictor.method}, {predictor.kind}", xlabel="predicted retention", ylabel="measured")
    legend_below(figure, axes)
