"""A row of a user's own file as a question with its gold answer.

It has ``question`` and ``answer``, or is one of mlx-lm's training rows: ``prompt`` and ``completion``, or ``messages``
of one question and its answer. What cannot be asked as it stands (a conversation, a system message) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mlx_rsgwm.data.asked import said_by
from mlx_rsgwm.data.gold_answers import marked_answer, written_scalar
from mlx_rsgwm.data.numbers import LITERAL, parse_number, plain_number

LONGEST_TASK = 80  # characters; charts and tables are labelled with it

# The fields of a row in each form that it may have.
FORMS = (("question", "answer"), ("prompt", "completion"), ("messages",))
# Fields that files have beside a question, without which it often cannot be answered.
CONTEXT = ("system", "instruction", "input", "context", "passage", "paragraph", "article", "story", "document")

Row = Mapping[str, Any]


class Parsed(NamedTuple):
    """What a row parser finds; ``id`` and ``task`` are empty when the row has none."""

    question: str
    rationale: str
    gold: str
    id: str = ""
    task: str = ""


def text_of(row: Row, name: str) -> str:
    """A field that must be text and not empty, without the space around it."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no {name}" if value is None or value == "" else f"{name} is not text: {str(value)[:40]!r}")
    return value.strip()


def parse_own(row: Row) -> Parsed:
    """A row of a user's own file: question and answer in one of the :data:`FORMS`; optional id, task, rationale,
    answer_type.

    The gold answer is what the row says: all of the answer, or what it marks. ``"answer_type": "number"`` asks for the
    last number of a sentence; ``"text"`` for all of the answer, marks and all.
    """
    question, answer, name = _question_and_answer(row)
    refuse_unshown(row, question)
    row_id, task, rationale, asked = (_optional(row, name) for name in ("id", "task", "rationale", "answer_type"))
    if asked not in ("", "text", "number"):
        raise ValueError(f"answer_type must be text or number, found {asked[:40]!r}")
    if len(task) > LONGEST_TASK or not task.isprintable():
        raise ValueError(f"task must be printable and at most {LONGEST_TASK} characters long, found {task[:40]!r}")
    if not isinstance(answer, str):
        return Parsed(question, rationale, written_scalar(answer, name), row_id, task)
    answer = answer.strip()
    if not answer:
        raise ValueError(f"no gold answer: {name} is empty")
    if asked == "text":
        return Parsed(question, rationale, answer, row_id, task)
    solution, gold = _solution_and_gold(answer, asked == "number")
    return Parsed(question, solution or rationale, gold, row_id, task)


def refuse_unshown(row: Row, question: str) -> None:
    """Raise for what a row has beside its question, and nobody who is asked that could know."""
    _refuse_unshown_choices(row, question)
    _refuse_unshown_context(row, question)


def _refuse_unshown_choices(row: Row, question: str) -> None:
    """Raise for choices beside the question that it does not show: nobody who is asked could know them."""
    for name in ("choices", "options"):
        unshown = [text for text in _texts(row.get(name)) if len(text) > 1 and text not in question]
        if unshown:
            raise ValueError(
                f"it has {name} that its question does not show ({unshown[0][:40]!r}); write them into the question, "
                "as (A) …, and the letter as the answer"
            )


def _refuse_unshown_context(row: Row, question: str) -> None:
    """Raise for what stands beside the question and is not asked with it: a prompt, a passage, other messages."""
    asked = " ".join(question.split())
    beside: dict[str, list[str]] = {name: list(_texts(row.get(name))) for name in CONTEXT}
    if "question" in row:
        beside["prompt"] = list(_texts(row.get("prompt")))
    if isinstance(messages := row.get("messages"), list) and all(isinstance(each, Mapping) for each in messages):
        beside["messages"] = [text for role in ("system", "user") for text in said_by(messages, role)]
    for name, texts in beside.items():
        unshown = [text for text in texts if " ".join(text.split()) not in asked]
        if unshown:
            raise ValueError(
                f"it has {name} beside its question ({unshown[0][:40]!r}), which would not be asked; write it into the "
                f"question, or remove {name}"
            )


def _texts(value: Any) -> Iterator[str]:
    """All texts in lists and objects of lists."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _solution_and_gold(answer: str, number: bool) -> tuple[str, str]:
    thought = _THOUGHT.match(answer)
    solution, gold = marked_answer(answer) or (thought[0].strip() if thought else "", _THOUGHT.sub("", answer))
    if not gold:
        raise ValueError("no gold answer: nothing stands after the mark")
    if not number:
        return solution, gold
    if parse_number(gold) is None:
        numbers = _NUMBER_IN_TEXT.findall(gold.replace("−", "-"))
        if not numbers:
            raise ValueError(f"answer_type is number, and there is none in {gold[:40]!r}")
        solution, gold = solution or gold, numbers[-1]  # the sentence belongs to the solution
    return solution, plain_number(gold)


def _question_and_answer(row: Row) -> tuple[str, Any, str]:
    """The question, its answer, and what the answer is called in errors."""
    if "question" in row:
        return text_of(row, "question"), row.get("answer"), "answer"
    if "prompt" in row and "completion" in row:
        return text_of(row, "prompt"), row["completion"], "completion"
    if "messages" in row:
        return *_of_messages(row["messages"]), "the last message"
    has = ", ".join(str(name)[:20] for name in list(row)[:5]) or "no field"
    raise ValueError(f"no question, it has {has}; rows need {', or '.join(map(' and '.join, FORMS))}")


def _of_messages(messages: Any) -> tuple[str, str]:
    """The question and the answer of a chat that holds nothing else: one turn of the user, one of the assistant."""
    if not isinstance(messages, list) or not messages or not all(isinstance(each, Mapping) for each in messages):
        raise ValueError("messages is not a list of messages")
    parts = [part for each in messages if isinstance(each.get("content"), list) for part in each["content"]]
    if not all(isinstance(part.get("text") if isinstance(part, Mapping) else part, str) for part in parts):
        raise ValueError("a message holds more than text, which cannot be asked")
    roles = [each.get("role") for each in messages]
    if roles[0] == "system":
        raise ValueError(
            "it has a system message, and only the user's is asked; write it into that, or leave it out where "
            "the template says it"
        )
    if roles != ["user", "assistant"]:
        shown = ", ".join(str(role)[:12] for role in roles[:6])
        raise ValueError(
            f"its messages are {shown}{', …' * (len(roles) > 6)}, and only a question of the user's and the "
            "assistant's answer can be asked; write what must be known into the question"
        )
    question, answer = ("\n".join(said_by(messages, role)).strip() for role in ("user", "assistant"))
    if not question or not answer:
        raise ValueError(f"no {'text in the answer' if question else 'question'}: a message without text")
    return question, answer


def _optional(row: Row, name: str) -> str:
    """A field as text; missing, null and NaN (what pandas writes for missing) are empty."""
    value = row.get(name)
    if isinstance(value, (list, Mapping)):
        raise ValueError(f"{name} is not text: {str(value)[:40]}")
    return "" if value is None or value != value else str(value).strip()


_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w)\]])-)?{LITERAL}")
