"""JSON lines, read in one place: data, records and drafts kept in files all come through here.

A line ends at a line feed or a carriage return and nowhere else: U+2028 and its like may stand unescaped inside a JSON
string, and ``str.splitlines`` would cut there. Line numbers are those of an editor, blank lines counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError


class NumberedRow(NamedTuple):
    """A row and its line (or its place in an array), from 1; ``value`` is a ``ValueError`` where it cannot be read."""

    number: int
    value: Any


class RowFile(NamedTuple):
    """Rows of a file and what their numbers count: ``line``, or ``row`` of a JSON array."""

    unit: str
    rows: list[NumberedRow]


def read_json_lines(path: Path) -> list[NumberedRow]:
    """Every line of a file that is not blank, parsed, with its number.

    Raises:
        RsgwmError: the file is missing, a folder, or not UTF-8 text. A line that is not JSON is no error here: its
            value is a ``ValueError``, so that the caller can report all of them at once.
    """
    return _parsed_lines(files.read_text(path))


def read_json_rows(path: Path) -> RowFile:
    """As :func:`read_json_lines`; a file that is one JSON array gives its elements.

    Raises:
        RsgwmError: also one JSON object over several lines, and an array that is not valid JSON.
    """
    return json_rows(path, files.read_text(path))


def json_rows(path: Path, text: str) -> RowFile:
    """:func:`read_json_rows` of the ``text`` of ``path``, read already."""
    start = text.lstrip()[:2]
    rows = _parsed_lines(text)
    if start[:1] == "[":
        array = _array(path, text, rows)
        if array is not None:
            return RowFile("row", [NumberedRow(number, value) for number, value in enumerate(array, 1)])
    elif start[:1] == "{" and len(rows) > 1 and isinstance(rows[0].value, ValueError):
        _refuse_spread_object(path, text)
    return RowFile("line", rows)


def _parsed_lines(text: str) -> list[NumberedRow]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of files that were put one after the other
        if not line.strip():
            continue
        try:
            rows.append(NumberedRow(number, files.parse_json(line, unique=True)))
        except ValueError as error:
            reason = re.sub(r"line 1 (column \d+) \(char \d+\)", r"\1", str(error))  # "line 1" of this line
            rows.append(NumberedRow(number, ValueError(f"not valid JSON ({reason})")))
    return rows


def _array(path: Path, text: str, rows: list[NumberedRow]) -> list[Any] | None:
    """The elements of a file that is one array of objects; None where its lines are rows of their own."""
    try:
        value = files.parse_json(text, unique=True)
    except ValueError as error:
        if all(not isinstance(row.value, ValueError) for row in rows):
            return None
        if isinstance(rows[0].value, ValueError):
            raise RsgwmError(f"{path} begins as a JSON array but is not valid JSON: {error}") from None
        return None
    return value if all(isinstance(element, Mapping) for element in value) else None


def _refuse_spread_object(path: Path, text: str) -> None:
    try:
        value = files.parse_json(text)
    except ValueError:
        return
    lists = [f"{key!r}" for key, inner in value.items() if isinstance(inner, list)]
    inside = f" (its rows may be under {' or '.join(lists)})" if lists else ""
    raise RsgwmError(f"{path} is one JSON object over several lines{inside}; write every row as one line, or an array")
