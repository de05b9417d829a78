"""The one way to write a table: rows of text, the first one the head, as aligned text, Markdown, LaTeX, CSV or HTML.

It stands here, and not with the reports, because model cards and commands write tables too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError

Rows = Sequence[Sequence[str]]
Section = tuple[str, Rows]  # a title and its table

ABSENT = "–"
FIRST_COLUMN = 48  # characters of a name on a terminal
TEX_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$", "×": r"$\times$", "τ": r"$\tau$",
    "≥": r"$\geq$", "→": r"$\rightarrow$",
}  # fmt: skip


def show(value: Any, digits: int = 3) -> str:
    """A cell: ``0.720 [0.625, 0.799]`` for a rate, a short number, or a dash for what does not apply."""
    if value is None:
        return ABSENT
    if isinstance(value, Mapping):
        return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def show_difference(value: Mapping[str, float] | None) -> str:
    """A difference with its interval: ``+0.120 [+0.010, +0.230]``."""
    return ABSENT if value is None else f"{value['value']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def shortened(name: str, limit: int = 28) -> str:
    """A name on one line with at most ``limit`` characters: of a longer one the beginning and the end."""
    line = " ".join(name.split())
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}…{line[-tail:]}"


def aligned(rows: Rows) -> str:
    """Plain text with a rule under the head; names that would fill a terminal's line are shortened."""
    rows = [[shortened(cell, FIRST_COLUMN) if place == 0 else cell for place, cell in enumerate(row)] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def markdown(rows: Rows) -> str:
    """GitHub's pipe table; cells stay on one line."""
    lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def latex(rows: Rows) -> str:
    """A ``tabular`` with the rules of the package booktabs."""
    lines = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in rows]
    return "\n".join([
        rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
        r"\bottomrule", r"\end{tabular}",
    ])  # fmt: skip


def _tex(text: str) -> str:
    return "".join(TEX_SIGNS.get(sign, sign) for sign in " ".join(text.split()))


def comma_separated(rows: Rows) -> str:
    """CSV with a comma, quoted where a cell needs it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")


def html(rows: Rows) -> str:
    """A ``<table>`` that scrolls sideways in a ``div`` of class ``wide``."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def text_page(sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """Titled tables for a terminal, and what must be said below them."""
    blocks = [f"{title}\n{aligned(rows)}" for title, rows in sections]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def markdown_page(title: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """A page that begins with what must be said, then the titled tables."""
    tables = [f"## {name}\n\n{markdown(rows)}" if name else markdown(rows) for name, rows in sections]
    return "\n\n".join([f"# {title}", *notes, *tables]) + "\n"


def latex_page(title: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """Tables to ``\\input``, each in a float with its title; what must be said stands above as comments."""
    said = [f"% {' '.join(line.split())}" for line in (title, *notes)]
    parts = [
        "\n".join([r"\begin{table}", rf"\caption{{{_tex(name or title)}}}", latex(rows), r"\end{table}"])
        for name, rows in sections
    ]
    return "\n\n".join(["\n".join(said), *parts]) + "\n"


def csv_page(title: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """One CSV of all tables; the first column names the table where there are several."""
    if len(sections) == 1:
        return comma_separated(sections[0][1]) + "\n"
    return "".join(comma_separated([[name, *row] for row in rows]) + "\n" for name, rows in sections)


PAGES: Mapping[str, Callable[[str, Sequence[Section], Sequence[str]], str]] = {
    ".md": markdown_page,
    ".tex": latex_page,
    ".csv": csv_page,
}


def page_writer(path: Path) -> Callable[[str, Sequence[Section], Sequence[str]], str]:
    """The format that a file's name asks for; a command asks before its work starts.

    Raises:
        RsgwmError: none by this name.
    """
    if path.suffix.lower() not in PAGES:
        raise RsgwmError(f"{path}: tables are written as {', '.join(PAGES)}; give a name that ends in one of them")
    return PAGES[path.suffix.lower()]


def write_page(path: Path, title: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> None:
    """Write titled tables as Markdown, LaTeX or CSV, by the suffix of ``path``."""
    files.write_text(path, page_writer(path)(title, sections, notes))
