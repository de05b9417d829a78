"""Questions with gold answers, from the public data sets or any file of a user's own.

Every problem names its file and line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_rsgwm.core.errors import RsgwmError, grouped, raise_problems
from mlx_rsgwm.core.json_lines import read_json_lines
from mlx_rsgwm.data.public_sets import SOURCES, hub_rows, local_file
from mlx_rsgwm.data.question_files import read_question_rows
from mlx_rsgwm.data.question_rows import LONGEST_TASK, Parsed, Row, parse_own


@dataclass(frozen=True)
class Question:
    """One item. ``rationale`` is the worked solution without the final line; ``gold`` is the final answer as text.

    A data set without rationales (CommonsenseQA, StrategyQA) leaves ``rationale`` empty or gives its facts.
    """

    id: str
    task: str
    question: str
    rationale: str
    gold: str

    @property
    def answer(self) -> str:
        """The full gold answer in GSM8K style: the rationale, then a line ``#### gold``.

        A gold answer of several lines stands below the mark, so that the reader of texts knows where it begins.
        """
        final = f"####\n{self.gold}" if "\n" in self.gold else f"#### {self.gold}"
        return f"{self.rationale}\n{final}" if self.rationale else final


@dataclass(frozen=True)
class Wrong:
    """A wrong solution: its rationale, its final answer, and what was changed (see ``data.perturb``)."""

    rationale: str
    gold: str
    change: str


@dataclass(frozen=True)
class SolvedQuestion(Question):
    """A question whose likely mistakes are known: wrong solutions in which every equation is true."""

    mistakes: tuple[Wrong, ...] = ()


class OwnFile(NamedTuple):
    """The questions of a user's own file, the rows that they stand in, and what those numbers count."""

    questions: list[Question]
    numbers: list[int]
    unit: str


def load_questions(
    task: str,
    split: str | None = None,
    data: Path | None = None,
    *,
    limit: int | None = None,
    offset: int = 0,
    seed: int | None = None,
    revision: str | None = None,
) -> list[Question]:
    """Read one split of a public data set.

    Args:
        task: a key of ``SOURCES``.
        split: name of the file or Hub split; None takes the one to report on.
        data: folder laid out as ``<data>/<task>/<split>.jsonl``; None asks the Hub.
        limit, offset: keep ``limit`` questions from ``offset`` on, after shuffling.
        seed: shuffle with this seed first; None keeps the order of the source.
        revision: commit, tag or branch of the Hub data set; None takes its newest.

    Raises:
        RsgwmError: unknown task, missing folder or split (naming what is there), bad rows with file and line.
    """
    if task not in SOURCES:
        raise RsgwmError(f"unknown task {task!r}; known are {', '.join(SOURCES)} (or give a .jsonl file)")
    source = SOURCES[task]
    split = split or source.evaluation_split
    if data is None:
        where, rows = f"{source.hub} {split}", hub_rows(source, split, revision)
    else:
        path = local_file(Path(data), task, split)
        where, rows = str(path), read_json_lines(path)
    unit = "row" if data is None else "line"
    questions, _ = _to_questions(where, rows, source.parse, task, f"{task}-{split}", unit)
    return select(questions, limit=limit, offset=offset, seed=seed)


def load_jsonl(
    path: Path,
    task: str | None = None,
    *,
    limit: int | None = None,
    offset: int = 0,
    seed: int | None = None,
) -> list[Question]:
    """Read a user's own questions: JSON lines, a JSON array, CSV or TSV, with ``question`` and ``answer`` in every row.

    Optional are ``id``, ``task``, ``rationale`` and ``answer_type`` (see :func:`parse_own`). The gold answer is what
    the row says; true and false become yes and no. ``task`` defaults to the row's, then the file's name.

    Raises:
        RsgwmError: a missing or empty file, bad rows with their line numbers, duplicate ids.
    """
    return select(read_own(Path(path), task).questions, limit=limit, offset=offset, seed=seed)


def read_own(path: Path, task: str | None = None) -> OwnFile:
    """Everything in a file of questions, as :func:`load_jsonl` reads it, in its order."""
    file = read_question_rows(path)
    name = path.stem[:LONGEST_TASK]
    read = _to_questions(str(path), file.rows, parse_own, task or name, path.stem, file.unit, task is None)
    return OwnFile(*read, file.unit)


def select(questions: list[Question], *, limit: int | None, offset: int = 0, seed: int | None = None) -> list[Question]:
    """``limit`` questions from ``offset`` on, in order, or in the order a seeded shuffle gives."""
    if limit is not None and limit < 1:
        raise RsgwmError(f"limit must be at least 1, found {limit}")
    if offset < 0 or offset >= len(questions):
        raise RsgwmError(f"offset must be in 0–{len(questions) - 1} (the questions there are), found {offset}")
    chosen = list(questions)
    if seed is not None:
        random.Random(seed).shuffle(chosen)
    return chosen[offset:] if limit is None else chosen[offset : offset + limit]


def _to_questions(
    where: str,
    rows: Iterable[tuple[int, Any]],
    parse: Callable[[Row], Parsed],
    task: str,
    prefix: str,
    unit: str,
    row_task: bool = False,
) -> tuple[list[Question], list[int]]:
    """The questions and the numbers of their rows."""
    questions: list[Question] = []
    numbers: list[int] = []
    problems: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, Mapping):
                raise ValueError(f"expected a JSON object, found {type(row).__name__}")
            parsed = parse(row)
            if not parsed.gold:
                raise ValueError("no gold answer")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            problems.append((f"{unit} {number}", str(error)))
            continue
        row_id = parsed.id or f"{prefix}-{number}"
        if row_id in seen:
            problems.append((f"{unit} {number}", f"id {row_id!r} is already that of {unit} {seen[row_id]}"))
        seen[row_id] = number
        name = parsed.task if row_task and parsed.task else task
        questions.append(Question(row_id, name, parsed.question, parsed.rationale, parsed.gold))
        numbers.append(number)
    raise_problems(where, grouped(problems))
    if not questions:
        raise RsgwmError(f"{where} is empty: no questions to read")
    return questions, numbers
