"""Rows without answers: questions, prompts, or lines of plain text, of which directions can be collected.

A ``.txt`` file has a row a line; JSON lines have ``question`` without ``answer``, or ``prompt`` without ``completion``.
Questions and prompts are put in the words that the adapter was trained with. All of them are draft rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, grouped, raise_problems
from mlx_rsgwm.core.json_lines import read_json_rows
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.data.row_hashes import KEY, RowKeys, RowRecord, row_keys
from mlx_rsgwm.data.template import Template, Tokenizer

ANSWERED_BY = {"question": "answer", "prompt": "completion"}


@dataclass(frozen=True)
class Unlabelled:
    """Texts of a file; ``asked``: they are questions, which ``template`` puts into a prompt, else they stand alone."""

    path: Path
    texts: tuple[str, ...]
    numbers: tuple[int, ...]
    asked: bool
    template: Template | None
    file_hash: str

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the file, apart from the same file read with answers."""
        return files.sha256_json([self.file_hash, "unlabelled"])

    @cached_property
    def keys(self) -> tuple[RowKeys, ...]:
        """What each row is recognised by."""
        return tuple(map(row_keys, self.texts))

    def record(self) -> RowRecord:
        """What the rows are recognised by."""
        return RowRecord.of_keys(self.keys)

    def describe(self) -> dict[str, Any]:
        """For an adapter's manifest."""
        kind = "questions without answers" if self.asked else "plain text"
        return {"hash": self.hash, "format": kind, "file": self.path.name, KEY: self.record().describe()}

    def token_rows(self, tokenizer: Tokenizer, max_tokens: int, long_rows: str) -> tuple[list[TokenRow], int]:
        """Token rows, whose tokens are all inputs, and how many were left out as longer than ``max_tokens``."""
        rows, dropped = [], 0
        for number, text, keys in zip(self.numbers, self.texts, self.keys, strict=True):
            tokens = self._tokens(tokenizer, text)[: max_tokens if long_rows == "cut" else None]
            if len(tokens) > max_tokens:
                dropped += 1
            elif tokens:  # a row's last token is no input, so one more stands behind
                rows.append(TokenRow("draft", (*tokens, tokens[-1]), 1, f"{self.path.name}:{number}", keys=keys))
        if not rows:
            raise RsgwmError(f"every row of {self.path} is longer than {max_tokens} tokens; raise max_tokens")
        return rows, dropped

    def _tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        if not self.asked:
            return list(tokenizer.encode(text))
        if self.template is not None:
            return self.template.draft_prompt(tokenizer, text)
        if not getattr(tokenizer, "chat_template", None):
            return list(tokenizer.encode(text))
        message = [{"role": "user", "content": text}]
        return list(
            tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        )


def load_unlabelled(path: Path, template: Template | None) -> Unlabelled | None:
    """The rows of a file without answers; None where ``path`` is something else.

    Raises:
        RsgwmError: the file is unreadable or empty; some rows have answers or no text.
    """
    if path.is_dir() or not path.is_file():
        return None
    if path.suffix.lower() == ".txt":
        lines = [(number, line) for number, line in enumerate(files.read_text(path).split("\n"), 1) if line.strip()]
        return _made(path, lines, False, None)
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        return None
    unit, rows = read_json_rows(path)
    field = _field(rows[0].value) if rows else ""
    if not field:
        return None
    problems = [
        (f"{unit} {number}", f"its {field} is no text, or it has a {ANSWERED_BY[field]}, unlike the first row")
        for number, row in rows
        if _field(row) != field
    ]
    raise_problems(str(path), grouped(problems))
    return _made(path, [(number, row[field]) for number, row in rows], True, template)


def _field(row: Any) -> str:
    """What a row without an answer asks under; empty for any other row."""
    if not isinstance(row, Mapping):
        return ""
    return next(
        (
            field
            for field, answer in ANSWERED_BY.items()
            if isinstance(row.get(field), str) and row[field].strip() and answer not in row
        ),
        "",
    )


def _made(path: Path, rows: list[tuple[int, str]], asked: bool, template: Template | None) -> Unlabelled:
    if not rows:
        raise RsgwmError(f"{path} holds no rows")
    numbers, texts = zip(*rows, strict=True)
    return Unlabelled(path, tuple(texts), tuple(numbers), asked, template, files.sha256_file(path))
