"""Rows of a user's own question file: JSON lines, one JSON array, or a table with a header (CSV, TSV).

What a file is follows from its name; an array under the name ``.jsonl`` is read as the array it is. A table gives
text only: an empty cell is a missing value, everything else stays as it is written.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.json_lines import NumberedRow, RowFile, read_json_rows
from mlx_rsgwm.core.nearest import nearest_path

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # spreadsheets write ; where the comma is the decimal point
LONGEST_CELL = 1 << 28  # characters; the csv module's own limit is 131072


def is_question_file(name: str) -> bool:
    """Whether a task names a file of questions rather than a family or a public data set."""
    return Path(name).suffix.lower() in SUFFIXES


def read_question_rows(path: Path) -> RowFile:
    """The rows of a question file with their numbers; a row that cannot be read is a ``ValueError``.

    Raises:
        RsgwmError: the file is missing, not text, of no known kind, or a table without a usable header.
    """
    if not files.is_present(path):
        raise RsgwmError(f"{path} does not exist{nearest_path(path)}")
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return RowFile("line", _table(path, files.read_text(path), DELIMITERS[suffix]))
    file = read_json_rows(path)
    first = file.rows[0] if file.rows else None
    if first and isinstance(first.value, ValueError) and first.number == 1 and _looks_like_a_table(path):
        raise RsgwmError(f"{path} is a table, not JSON lines; name it {path.stem}.csv")
    return file


def _looks_like_a_table(path: Path) -> bool:
    text = files.read_text(path)
    return any(_has_questions(header_of(text, delimiter)) for delimiter in DELIMITERS[".csv"])


def _has_questions(header: list[str]) -> bool:
    return "question" in header or {"prompt", "completion"} <= set(header)


def header_of(text: str, delimiter: str) -> list[str]:
    """The names in the first line of a text, were it a table."""
    try:
        cells = next(csv.reader(text.split("\n", 1)[:1], delimiter=delimiter), [])
    except csv.Error:
        return []
    return [cell.strip().casefold() for cell in cells]


def _table(path: Path, text: str, delimiters: str) -> list[NumberedRow]:
    delimiter = next((sign for sign in delimiters if _has_questions(header_of(text, sign))), delimiters[0])
    header = header_of(text, delimiter)
    if not text.strip():
        return []
    if not _has_questions(header):
        shown = ", ".join(cell[:30] for cell in header[:6]) or "nothing"
        raise RsgwmError(f"{path}: line 1 must be a header with question and answer, found {shown}; rename its columns")
    return table_rows(path, text, delimiter, header)


def table_rows(path: Path, text: str, delimiter: str, header: list[str]) -> list[NumberedRow]:
    """The rows below a table's header, each by the header's names.

    Raises:
        RsgwmError: the header has a name twice.
    """
    double = sorted({name for name in header if name and header.count(name) > 1})
    if double:
        raise RsgwmError(f"{path}: the header names {', '.join(double)} twice")
    rows: list[NumberedRow] = []
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
        started = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                rows.append(NumberedRow(started, ValueError(f"not valid CSV ({error})")))
                break
            if started > 1 and any(cell.strip() for cell in cells):
                rows.append(NumberedRow(started, _record(header, cells)))
            started = reader.line_num + 1
    finally:
        csv.field_size_limit(before)
    return rows


def _lines(text: str) -> list[str]:
    """Lines with their line feeds: a quoted cell may hold some, and U+2028 ends no line."""
    return [line + "\n" for line in text.removesuffix("\n").split("\n")]


def _record(header: list[str], cells: list[str]) -> Any:
    while len(cells) > len(header) and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) != len(header):
        return ValueError(
            f"{len(cells)} cells where the header has {len(header)}; a cell with a delimiter needs quotes"
        )
    return {name: cell for name, cell in zip(header, cells, strict=True) if name and cell.strip()}
