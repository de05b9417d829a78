"""The one renderer of pictures: a function that draws on a matplotlib figure, written as PNG or SVG.

The report's page embeds the SVG, so a picture and a page cannot disagree. matplotlib takes .3 s to import and is
imported only when something is drawn. Names of tasks and adapters are shown as they are: a ``$`` in one begins no
formula, and a sign that the font lacks is drawn as a box without a word on standard error.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError

Draw = Callable[[Any], None]  # draws on a matplotlib Figure or SubFigure
Size = tuple[float, float]  # inches
SUFFIXES = (".png", ".svg")
DPI = 110
COLORS = ("#2563a8", "#d9730d", "#2e7d4f", "#9c3587", "#7a6a00", "#5b5b5b")


def _style() -> Any:
    from cycler import cycler

    return {
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "axes.titleweight": "bold",
        "font.size": 9,
        "legend.fontsize": "small",
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text: smaller, and it can be searched and read aloud
        "svg.hashsalt": "mlx-rsgwm",  # the same picture has the same bytes
        "text.parse_math": False,
    }


def render(draw: Draw, size: Size, form: str = "png", dpi: int = DPI) -> bytes:
    """What ``draw`` draws on a figure of ``size`` inches, as the bytes of a PNG or SVG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = io.BytesIO()
    with matplotlib.rc_context(_style()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # without it a text has no size to lay out by
        draw(figure)
        figure.savefig(picture, format=form, dpi=dpi, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()


def picture_format(path: Path) -> str:
    """``png`` or ``svg``, by the suffix of a picture's name; a command asks before its work starts.

    Raises:
        RsgwmError: another suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RsgwmError(f"{path}: pictures are written as .png or .svg; give a name that ends in one of them")
    return path.suffix.lower()[1:]


def write_figure(path: Path, draw: Draw, size: Size, dpi: int = DPI) -> None:
    """Write a picture as PNG or SVG by the suffix of ``path``, completely or not at all."""
    files.write_bytes(path, render(draw, size, picture_format(path), dpi))


def inline_svg(draw: Draw, size: Size, label: str) -> str:
    """An ``<svg>`` element for a page: as wide as its place, named for screen readers, without ids that nothing uses.

    Several stand in one page: what is left of their ids is hashed from the content, so that equal ones are alike.
    """
    text = render(draw, size, "svg").decode("utf-8")
    body = text[text.index("<svg") :]
    opening, rest = body[: body.index(">")], body[body.index(">") + 1 :]
    viewbox = re.search(r'viewBox="[^"]*"', opening)
    assert viewbox is not None
    rest = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", rest, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", rest)
    rest = re.sub(r">\s*\n\s*<", ">\n<", rest).strip()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {viewbox[0]} role="img" '
        f'aria-label="{escape(label)}">{rest}'
    )


def spread_of(rates: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Error bars [[below …], [above …]] of rates ``{value, low, high}``."""
    return [[rate["value"] - rate["low"] for rate in rates], [rate["high"] - rate["value"] for rate in rates]]


def legend_below(figure: Any, axes: Any, columns: int = 2) -> None:
    """A legend under the axes, where it can cover nothing; none where nothing has a name."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))
