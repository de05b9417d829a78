"""Time and peak memory of a merge as pools grow, in adapters and in parameters; a figure of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.bench.merging_sides import process_of
from mlx_rsgwm.bench.random_pools import ATTENTION, COUNT, RANK, WIDE, write_pool
from mlx_rsgwm.evaluation.report.figures import legend_below, write_figure

GROWING_COUNTS = (2, 4, 8, 16, 32, 64)
GROWING_LAYERS = (1, 4, 16, 64, 152)  # 1.3M … 199M parameters
METHODS = {"rsgwm": "o", "linear": "s", "regmean": "^"}  # and their markers
MOST_LAYERS = {"regmean": 16}  # one of which takes as long as a hundred of the others


def grow(folder: Path, methods: Sequence[str] = tuple(METHODS)) -> dict[str, Any]:
    """Time and peak memory of ``methods`` as the number of adapters grows, and as the adapters do."""
    rows: dict[str, list[dict[str, Any]]] = {"adapters": [], "parameters": []}
    many = write_pool(folder / "many", ATTENTION, 6, max(GROWING_COUNTS), importance=True, directions=True)
    for count in GROWING_COUNTS:
        rows["adapters"] += [_growing(method, many[:count], count) for method in methods]
    for layers in GROWING_LAYERS:
        able = [method for method in methods if layers <= MOST_LAYERS.get(method, layers)]
        if not able:
            continue
        sketched = "regmean" in able
        (adapter,) = write_pool(folder / f"layers-{layers}", WIDE, layers, 1, importance=True, directions=sketched)
        names = [folder / f"layers-{layers}" / f"name-{index}" for index in range(COUNT)]
        for name in names:
            name.symlink_to(adapter, target_is_directory=True)
        parameters = layers * RANK * sum(map(sum, WIDE.values()))
        rows["parameters"] += [_growing(method, names, parameters) for method in able]
    exponents = {
        f"{what}, {method}, {figure}": round(_slope([r for r in rows[what] if r["method"] == method], figure), 3)
        for what in rows
        for method in methods
        for figure in ("seconds", "mb")
    }
    return {**rows, "exponents": exponents}


def _growing(method: str, folders: Sequence[Path], size: int) -> dict[str, Any]:
    with process_of("ours", method, folders) as step:
        figures = step()
    row = {"method": method, "size": size, "adapters": len(folders)}
    row |= {name: round(figures[name], 3) for name in ("seconds", "mb", "result_mb")}
    print(row, flush=True)
    return row


def _slope(rows: Sequence[Mapping[str, Any]], figure: str) -> float:
    x, y = ([math.log(row[name]) for row in rows] for name in ("size", figure))
    return statistics.linear_regression(x, y).slope


def plot(growth: Mapping[str, Any], path: Path) -> None:
    """Four panels: seconds and MB over the number of adapters and over their size; PNG or SVG."""
    write_figure(path, partial(_draw, growth=growth), (9, 6), dpi=120)


def _draw(figure: Any, growth: Mapping[str, Any]) -> None:
    axes = figure.subplots(2, 2)
    labels = {"seconds": "seconds", "mb": "peak memory, MB"}
    for column, (what, label) in enumerate(
        {"adapters": "adapters (1.2M each)", "parameters": "parameters (4 adapters)"}.items()
    ):
        for row, name in enumerate(labels):
            panel = axes[row][column]
            for method, marker in METHODS.items():
                points = [point for point in growth[what] if point["method"] == method]
                panel.plot([p["size"] for p in points], [p[name] for p in points], marker=marker, label=method)
            if name == "mb":
                points = [point for point in growth[what] if point["method"] == "rsgwm"]
                panel.plot(
                    [p["size"] for p in points], [p["result_mb"] for p in points], "k:", label="the result itself"
                )
            panel.set(xscale="log", yscale="log", xlabel=label, ylabel=labels[name])
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
            if what == "adapters":
                panel.set_xticks(GROWING_COUNTS, list(map(str, GROWING_COUNTS)))
                panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
    legend_below(figure, axes[1][0], 3)
