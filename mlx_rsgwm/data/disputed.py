"""Questions that rows answer in two ways: the same words, another gold answer.

Training learns both, and an evaluation counts a right answer wrong: training tells the rows, evaluation refuses them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mlx_rsgwm.data.gold_answers import marked_answer
from mlx_rsgwm.data.numbers import parse_number
from mlx_rsgwm.data.row_hashes import folded

LONGEST_GOLD = 40  # characters of an answer that marks nothing and may still be compared with a marked one
SHOWN = 3  # pairs of rows that a message shows


class AnsweredRow(NamedTuple):
    """A row's number in its file, what it asks, and its gold answer."""

    number: int
    question: str
    gold: str


class Dispute(NamedTuple):
    """The first row of a question, and the first later row that answers it in another way."""

    first: AnsweredRow
    other: AnsweredRow


def find_disputes(rows: Iterable[AnsweredRow]) -> list[Dispute]:
    """One dispute for each question that has two different gold answers.

    Questions are the same whatever their case, spacing and Unicode form; golds are, too, and numbers by their value.
    """
    firsts: dict[str, AnsweredRow] = {}
    disputes: dict[str, Dispute] = {}
    for row in rows:
        question = folded(row.question)
        first = firsts.setdefault(question, row)
        if question not in disputes and not _same_gold(first.gold, row.gold):
            disputes[question] = Dispute(first, row)
    return list(disputes.values())


def describe_disputes(disputes: list[Dispute], unit: str) -> str:
    """One line that names the rows: ``line`` or ``row`` numbers of the file, as ``unit`` says."""
    shown = ", ".join(
        f"{unit}s {first.number} ({first.gold[:30]!r}) and {other.number} ({other.gold[:30]!r})"
        for first, other in disputes[:SHOWN]
    )
    more = f" and {len(disputes) - SHOWN} more" if len(disputes) > SHOWN else ""
    asked = "the same question has" if len(disputes) == 1 else f"{len(disputes)} questions have"
    return f"{asked} two different gold answers: {shown}{more}"


def same_answer(answer: str, other: str) -> bool:
    """Whether two whole answers end in the same gold: what both mark, else all that they say.

    Of an answer with a mark and a long one without nobody can tell; they count as the same.
    """
    marks = [marked_answer(text) for text in (answer, other)]
    if sum(mark is not None for mark in marks) == 1 and len((answer, other)[marks[0] is not None]) > LONGEST_GOLD:
        return True
    golds = [text if mark is None else mark[1] for text, mark in zip((answer, other), marks, strict=True)]
    return _same_gold(*golds)


def _same_gold(gold: str, other: str) -> bool:
    if gold == other or _plain(gold) == _plain(other):
        return True
    first, second = parse_number(gold), parse_number(other)
    return first is not None and first == second


def _plain(gold: str) -> str:
    return "".join(folded(gold).split()).strip("$.")
