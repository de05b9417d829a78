"""Questions to be asked, from a file of any form: JSON lines, a JSON array, a table with a header, or plain lines.

What a file is follows from what stands in it, whatever it is called; only a table is also known by its name, so that
one without a column of questions is refused and not asked line by line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, grouped, raise_problems
from mlx_rsgwm.core.json_lines import NumberedRow, RowFile, json_rows
from mlx_rsgwm.core.nearest import nearest_path
from mlx_rsgwm.data.asked import said_by
from mlx_rsgwm.data.question_files import DELIMITERS, TABLE_SUFFIXES, header_of, table_rows
from mlx_rsgwm.data.question_rows import refuse_unshown

COLUMNS = ("question", "prompt", "messages")
SHOWN = 6


@dataclass(frozen=True)
class AskedRow:
    """A question, where it stands (``number``: its line or row, from 1) and its ``id`` as the file has it, if any."""

    number: int
    question: str
    id: str | int | None = None


def read_asked(path: Path, text: str | None = None) -> list[AskedRow]:
    """The questions of a file, or of the ``text`` that is called ``path``.

    Raises:
        RsgwmError: no question in it, rows without one (all of them at once), a table without a column of questions.
    """
    if text is None and not files.is_present(path):
        raise RsgwmError(f"{path} does not exist{nearest_path(path)}")
    text = files.read_text(path) if text is None else text
    unit, rows = _rows(path, text)
    asked, problems = [], []
    for number, value in rows:
        try:
            asked.append(_asked(number, value))
        except ValueError as error:
            problems.append((f"{unit} {number}", str(error)))
    raise_problems(str(path), grouped(problems))
    if not asked:
        where = "standard input" if str(path) == "-" else path
        raise RsgwmError(f"{where} holds no question; write one a line, or rows with question in JSON or CSV")
    return asked


def _rows(path: Path, text: str) -> RowFile:
    start = text.lstrip()
    if start.startswith("["):
        try:
            value = files.parse_json(text, unique=True)
        except ValueError:
            value = None
        if isinstance(value, list) and all(isinstance(row, (str, Mapping)) for row in value):
            return RowFile("row", [NumberedRow(number, row) for number, row in enumerate(value, 1)])
    if start.startswith(("{", "[{")):
        return json_rows(path, text)
    if (table := _table(path, text)) is not None:
        return RowFile("line", table)
    return RowFile("line", [NumberedRow(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()])


def _table(path: Path, text: str) -> list[NumberedRow] | None:
    """The rows of a table; None where the first line names no column of questions."""
    headers = {sign: header_of(text, sign) for sign in DELIMITERS[".csv"]}
    sign = next((sign for sign, header in headers.items() if {"question", "prompt"} & set(header)), None)
    if sign is not None:
        return table_rows(path, text, sign, headers[sign])
    if path.suffix.lower() in TABLE_SUFFIXES and text.strip():
        header = max(headers.values(), key=len)
        shown = ", ".join(cell[:30] for cell in header[:SHOWN]) or "nothing"
        near = next((cell for cell in header if cell.startswith(("question", "prompt"))), header[0] if header else "")
        raise RsgwmError(
            f"{path}: line 1 must be a header with a column question, found {shown}; rename {near[:30]!r} to question "
            "if that is it, or save the questions as one a line, without .csv"
        )
    return None


def _asked(number: int, value: Any) -> AskedRow:
    """Raises ValueError for a row that holds no question, or more than could be asked."""
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, str):
        value = {"question": value}
    if not isinstance(value, Mapping):
        raise ValueError("neither an object nor a text")
    text = next(_texts(value), None)
    if text is not None and not text.strip():
        raise ValueError("its question is empty; fill it in, or leave the row out")
    if text is None:
        has = ", ".join(str(name)[:20] for name in list(value)[:SHOWN]) or "nothing"
        raise ValueError(f"no text under {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; it has {has}")
    refuse_unshown(value, text)
    row_id = value.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int, type(None))):
        raise ValueError(f"id must be a text or a whole number, found {str(row_id)[:40]}")
    return AskedRow(number, text.strip(), row_id)


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    for name in COLUMNS[:2]:
        if isinstance(row.get(name), str):
            yield row[name]
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(each, Mapping) for each in messages):
        said = said_by(messages, "user")
        if len(said) != 1:
            raise ValueError(f"messages with {len(said)} turns of the user, where one question is asked")
        yield said[0]
