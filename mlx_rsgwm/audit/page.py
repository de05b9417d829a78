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
from mlx_rsgwm.audit.report import notes, sections, short_names
from mlx_rsgwm.core import files, tables
from mlx_rsgwm.core.tables import shortened
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


def write_page(audited: PoolAudit, judged: Sequence[Eligibility], path: Path) -> None:
    """Write the page of an audit, completely or not at all."""
    files.write_text(path, render_page(audited, judged))


def render_page(audited: PoolAudit, judged: Sequence[Eligibility]) -> str:
    """The page as HTML."""
    drawn = "".join(pictures(audited))
    shown = "".join(
        f"<h3>{escape(title)}</h3>{tables.html(rows)}" for title, rows in sections(audited, judged, every_module=True)
    )
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
        inline_svg(partial(heat_map, pair=worst, measure=measure), PICTURE, MEASURES[measure][0])
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
    axes.set(ylim=(0, 1.05), xlabel="singular value", ylabel="share of the largest", title="Spectra")
    legend_below(figure, axes)


def heat_map(figure: Any, pair: PairAudit, measure: str) -> None:
    """Layers by kinds of module, coloured by a measure of the pair."""
    title, colours, (low, high) = MEASURES[measure]
    axes = figure.subplots()
    layers, kinds, grid = _grid(pair, measure)
    image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(kinds)), [shortened(kind, 12) for kind in kinds], rotation=35, ha="right")
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set(ylabel="layer", title=title)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _grid(pair: PairAudit, measure: str) -> tuple[list[str], list[str], np.ndarray]:
    places = [_place(module.name) for module in pair.modules]
    layers = sorted(
        {layer for layer, _ in places},
        key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0, layer),
    )
    kinds = list(dict.fromkeys(kind for _, kind in places))
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


def dumbbells(figure: Any, pair: PairAudit, names: tuple[str, str]) -> None:
    """Both adapters' norms in every module, joined by a line: a long line is a drowned adapter."""
    axes = figure.subplots()
    layers, norms = range(len(pair.modules)), np.array([module.norms for module in pair.modules])
    axes.vlines(layers, norms.min(axis=1), norms.max(axis=1), color="grey", linewidth=0.8)
    for index, name in enumerate(names):
        axes.plot(layers, norms[:, index], "o", markersize=3, label=shortened(name, 24))
    if norms.min() > 0:
        axes.set_yscale("log")
    axes.set(xlabel="modules", ylabel="norm of the update", title="Norms by module")
    legend_below(figure, axes)
