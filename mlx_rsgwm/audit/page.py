"""An audit as one page that asks nothing of the network: the verdict, heat maps, dumbbells, spectra, tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.audit.adapter_audit import AdapterAudit
from mlx_rsgwm.audit.advice import advise, worst_first
from mlx_rsgwm.audit.eligibility import WEAK, Eligibility
from mlx_rsgwm.audit.pair_audit import PairAudit
from mlx_rsgwm.audit.pool_audit import PoolAudit
from mlx_rsgwm.audit.report import LEADS, MODULES_SHOWN, module_rows, notes, sections, short_names
from mlx_rsgwm.core import files, tables
from mlx_rsgwm.core.tables import Section, shortened
from mlx_rsgwm.evaluation.report.figures import Size, inline_svg, legend_below
from mlx_rsgwm.evaluation.report.html import page

PICTURE: Size = (4.6, 4.2)
MOST_ADAPTERS = 6  # of which spectra are drawn in one picture
# Colour, its range, and what a measure of the heat map is called.
MEASURES = {
    "mean_overlap": ("Overlap of what they change", "Blues", (0.0, 1.0)),
    "agreement": ("Agreement: the same way, or the opposite", "RdBu", (-1.0, 1.0)),
    "log_ratio": ("Size: log₂ of the norms' ratio", "PuOr", (-4.0, 4.0)),
}
# Kinds of modules in the order of a block; others come after them.
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_page(audited: PoolAudit, judged: Sequence[Eligibility], path: Path, of_merge: Sequence[Section] = ()) -> None:
    """Write the page of an audit, completely or not at all."""
    files.write_text(path, render_page(audited, judged, of_merge))


def render_page(audited: PoolAudit, judged: Sequence[Eligibility], of_merge: Sequence[Section] = ()) -> str:
    """The page as HTML; ``of_merge``: tables of a finished merge."""
    drawn = "".join(pictures(audited))
    shown = "".join(
        f'<h3>{escape(title)}</h3><p class="lead">{escape(LEADS[title])}</p>{tables.html(rows)}'
        for title, rows in (*of_merge, *sections(audited, judged))
    )
    if audited.pairs and len(worst_first(audited)[0].modules) > MODULES_SHOWN:
        every = tables.html(module_rows(worst_first(audited)[0], 0))
        shown += f"<details><summary>all its modules</summary>{every}</details>"
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes(audited, judged))
    title = " and ".join(short_names(audited.labels)) if len(audited.labels) < 4 else f"{len(audited.labels)} adapters"
    body = f'{_opening(audited, judged)}<div class="charts">{drawn}</div><h2>Tables</h2>{said}{shown}'
    return page(f"Audit of {title}", body)


def _opening(audited: PoolAudit, judged: Sequence[Eligibility]) -> str:
    if not audited.pairs:
        return f"<header><h1>{escape(short_names(audited.labels)[0])}</h1></header>"
    weak = [index for index, each in enumerate(judged) if each.verdict == WEAK]
    advice = advise(audited, weak)
    first = escape(advice.word[0].upper() + advice.word[1:])
    return (
        f"<header><h1>{first}</h1><p>{escape(advice.reason)}.</p>"
        f"<p class='meta'>Next:</p><pre>{escape(advice.command)}</pre></header>"
    )


def pictures(audited: PoolAudit) -> list[str]:
    """Spectra of the adapters, and of the worst pair a heat map for each measure and a dumbbell for each module."""
    names = short_names(audited.labels)
    drawn = [inline_svg(partial(spectra, adapters=audited.adapters, names=names), PICTURE, "Spectra")]
    if not audited.pairs:
        return drawn
    worst = worst_first(audited)[0]
    both = names[worst.first], names[worst.second]
    drawn += [
        inline_svg(partial(heat_map, pair=worst, measure=measure, names=both), PICTURE, MEASURES[measure][0])
        for measure in MEASURES
    ]
    return [*drawn, inline_svg(partial(dumbbells, pair=worst, names=both), PICTURE, "Norms by module")]


def spectra(figure: Any, adapters: Sequence[AdapterAudit], names: Sequence[str]) -> None:
    """Singular values over the largest, median over modules, with the middle half shaded."""
    axes = figure.subplots()
    for adapter, name in list(zip(adapters, names, strict=True))[:MOST_ADAPTERS]:
        ranks = min(module.rank for module in adapter.modules)
        values = np.array(
            [np.pad(m.sigma, (0, max(ranks - len(m.sigma), 0)))[:ranks] / (m.sigma[0] or 1.0) for m in adapter.modules]
        )
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        places = np.arange(1, ranks + 1)
        axes.fill_between(places, low, high, alpha=0.15)
        axes.plot(places, middle, marker="o", markersize=2.5, label=shortened(name, 24))
    axes.set(
        ylim=(0, 1.05), xlabel="singular value", ylabel="share of the largest", title=_spectra_title(len(adapters))
    )
    legend_below(figure, axes)


def _spectra_title(count: int) -> str:
    return "Spectra" if count <= MOST_ADAPTERS else f"Spectra of the first {MOST_ADAPTERS} of {count}"


def heat_map(figure: Any, pair: PairAudit, measure: str, names: tuple[str, str]) -> None:
    """Layers by kinds of module, coloured by a measure of the pair; grey where there is no module."""
    title, colours, (low, high) = MEASURES[measure]
    axes = figure.subplots()
    layers, kinds, grid = _grid(pair, measure)
    if measure == "log_ratio":  # symmetric, so that white is no difference
        high = max(high, float(np.nanmax(abs(grid))))
        low = -high
    axes.set_facecolor("#c8c8c8")
    image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    # Upright: the boxes around slanted labels meet.
    axes.set_xticks(range(len(kinds)), [shortened(kind, 14) for kind in kinds], rotation=90)
    step = max(1, -(-len(layers) // 12))
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set(ylabel="layer", title=title)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    ends = {
        "mean_overlap": ("apart", "the same directions"),
        "agreement": ("opposite", "the same way"),
        "log_ratio": tuple(f"{shortened(name, 16)} larger" for name in reversed(names)),
    }[measure]
    bar.set_label(f"← {ends[0]}      {ends[1]} →", fontsize="small")


def _grid(pair: PairAudit, measure: str) -> tuple[list[str], list[str], np.ndarray]:
    places = [_place(module.name) for module in pair.modules]
    layers = sorted({layer for layer, _ in places}, key=_layer_order)
    kinds = sorted(
        dict.fromkeys(kind for _, kind in places),
        key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS),
    )
    grid = np.full((len(layers), len(kinds)), np.nan)
    for (layer, kind), module in zip(places, pair.modules, strict=True):
        value = (
            np.log2(max(module.norms[0], 1e-12) / max(module.norms[1], 1e-12))
            if measure == "log_ratio"
            else getattr(module, measure)
        )
        grid[layers.index(layer), kinds.index(kind)] = value
    return layers, kinds, grid


def _place(name: str) -> tuple[str, str]:
    """The layer's number and the module's last name."""
    pieces = name.split(".")
    number = next((piece for piece in pieces if piece.isdigit()), "–")
    return number, pieces[-1]


def _layer_order(layer: str) -> tuple[bool, int, str]:
    return (not layer.isdigit(), int(layer) if layer.isdigit() else 0, layer)


def dumbbells(figure: Any, pair: PairAudit, names: tuple[str, str]) -> None:
    """Both adapters' norms in every module, joined by a line: a long line is a drowned adapter."""
    axes = figure.subplots()
    modules = sorted(pair.modules, key=lambda module: (_layer_order(_place(module.name)[0]), module.name))
    layers, norms = range(len(modules)), np.array([module.norms for module in modules])
    axes.vlines(layers, norms.min(axis=1), norms.max(axis=1), color="grey", linewidth=0.8)
    for index, name in enumerate(names):
        axes.plot(layers, norms[:, index], "o", markersize=3, label=shortened(name, 24))
    if 0 < 10 * norms.min() < norms.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="modules, layer after layer", ylabel="norm of the update", title="Norms by module")
    legend_below(figure, axes)
