"""The final answer in a generated text, and whether it equals the gold one.

A text without a parseable answer is a refusal (SPEC 6.3): it is neither right nor a hallucination. Values are
compared as exact fractions, never as floats.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlx_rsgwm.data.numbers import LITERAL, parse_number, plain_number, unfrac
from mlx_rsgwm.data.sources import last_boxed
from mlx_rsgwm.errors import RsgwmError

Status = Literal["answer", "refusal"]


@dataclass(frozen=True)
class Extraction:
    """The answer found, in canonical spelling (``1080``, ``B``, ``yes``), or None with status ``refusal``."""

    value: str | None
    status: Status


# A minus is a sign only where no number or word stands before it ("10-5" ends in 5) and no space after it.
_SIGNED = (
    rf"(?:(?<![\w)\]}}.%])-[$€£]?|[$€£]\s?-?)?"  # sign and currency
    rf"(?:[0-9]{{1,4}}\s+(?=[0-9]+/[0-9]))?"  # the whole part of a mixed number
    rf"{LITERAL}(?:/{LITERAL})?"
)
_NUMBER = re.compile(_SIGNED)
_MARKER = re.compile(r"#{4,}")
_AFTER_MARKER = re.compile(rf"[\s:=*`$€£]*?({_SIGNED})(?![0-9A-Za-z_]*[0-9_])")
_STATED_LETTER = re.compile(
    r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\**\(?([A-Ja-j])\)?(?![A-Za-z'’])", re.IGNORECASE
)
_STATED = re.compile(r"answer\s*(?:is|:|=)\s*(.+)", re.IGNORECASE)
_LABEL = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_LABELS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


def marked_line(text: str) -> str | None:
    """What follows the last ``####`` (four or more) on its line, or None without a marker."""
    marks = list(_MARKER.finditer(text))
    return text[marks[-1].end() :].split("\n")[0].strip() if marks else None


def _tidy(text: str) -> str:
    return text.replace("−", "-").replace("\\$", "$").replace("\u00a0", " ")


def _number(text: str) -> str | None:
    return None if parse_number(text) is None else plain_number(text)


def _strict(text: str) -> str | None:
    line = marked_line(_tidy(text))
    found = _AFTER_MARKER.match(unfrac(line)) if line else None
    return _number(found[1]) if found else None


def _flexible(text: str) -> str | None:
    found = _NUMBER.findall(unfrac(_tidy(text)))
    return _number(found[-1]) if found else None


def _choice(text: str) -> str | None:
    line = marked_line(text)
    if line is not None:
        found = re.match(r"[\s:*(\"']*([A-Ja-j])(?![A-Za-z'’])", line)
        return found[1].upper() if found else None
    stated = _STATED_LETTER.findall(text)
    if stated:
        return stated[-1].upper()
    alone = re.fullmatch(r"[\s*(\"']*([A-Ja-j])(?:[).:\"'*]+.*)?\s*", text, re.DOTALL)
    if alone:
        return alone[1].upper()
    # "A" opening a sentence and the pronoun "I" are words, so a bare letter must be last or wear brackets.
    bracketed = re.findall(r"\(([A-J])\)", text)
    if bracketed:
        return bracketed[-1]
    last = re.search(r"(?<![A-Za-z'’])([A-J])[.\s*)\"]*$", text)
    return last[1] if last else None


def _yesno(text: str) -> str | None:
    line = marked_line(text)
    if line is not None:
        found = re.match(r"[\s:*\"']*(yes|no|true|false)\b", line, re.IGNORECASE)
        return _LABELS[found[1].lower()] if found else None
    stated = _STATED.findall(text)
    labels = (_LABEL.findall(stated[-1]) if stated else []) or _LABEL.findall(text)
    return _LABELS[labels[-1].lower()] if labels else None


def _math(text: str) -> str | None:
    line = marked_line(text)
    scope = line if line is not None else text
    span = last_boxed(scope)
    if span is not None:
        value = scope[span[0] : span[1]]
    elif line is not None:
        value = line
    else:
        stated = _STATED.findall(text)
        value = stated[-1] if stated else ""
    value = value.strip().rstrip(".").strip()
    return plain_number(value.strip("$").strip()) if value.strip("$ ") else None


def _text(text: str) -> str | None:
    line = marked_line(text)
    if line is None:
        lines = [part.strip() for part in text.split("\n") if part.strip()]
        line = lines[-1] if lines else ""
    return plain_number(line) or None


KINDS: dict[str, Callable[[str], str | None]] = {
    "strict": _strict,
    "flexible": _flexible,
    "choice": _choice,
    "yesno": _yesno,
    "math": _math,
    "text": _text,
}

TASK_KINDS = {
    "gsm8k": "strict",
    "mawps": "strict",
    "svamp": "strict",
    "math": "math",
    "commonsense_qa": "choice",
    "strategyqa": "yesno",
}


def answer_kind(task: str, gold: str | None = None) -> str:
    """The kind of answer a task asks for: from the table, else from the form of one gold answer, else ``strict``."""
    if task in TASK_KINDS:
        return TASK_KINDS[task]
    if gold is None or parse_number(gold) is not None:
        return "strict"
    if gold.strip().lower() in _LABELS:
        return "yesno"
    if re.fullmatch(r"[A-J]", gold.strip()):
        return "choice"
    return "math" if "\\" in gold else "text"


def extract(text: str, kind: str) -> Extraction:
    r"""Find the final answer in ``text``.

    Kinds: ``strict`` the number after the last ``#{4,}`` (SPEC 6.9); ``flexible`` the last number anywhere;
    ``choice`` a letter; ``yesno``; ``math`` the last ``\boxed`` or the marked line; ``text`` the marked or last
    line. Where a marker stands, only its line counts.

    Raises:
        RsgwmError: an unknown kind.
    """
    if kind not in KINDS:
        raise RsgwmError(f"unknown answer kind {kind!r}; known are {', '.join(KINDS)}")
    value = KINDS[kind](text)
    return Extraction(value, "refusal" if value is None else "answer")


def canonical(value: str) -> str:
    """One spelling for equal answers: the exact value of a number, else folded text without spaces and LaTeX dress."""
    number = parse_number(value)
    if number is not None:
        return f"{number.numerator}/{number.denominator}"
    text = unfrac(value.replace("−", "-"))
    text = re.sub(r"\\(?:left|right|displaystyle|[!,;: ])", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(\\sqrt)\s*([0-9a-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"\s+", "", text.replace("$", "").replace("\\%", "").replace("%", ""))
    text = re.sub(r"^[a-zA-Z]=(?=.)", "", text)  # "x=5" answers "5"
    text = text.strip("\"'“”‘’").rstrip(".").casefold()
    number = parse_number(text)
    return text if number is None else f"{number.numerator}/{number.denominator}"


def is_correct(value: str | None, gold: str) -> bool:
    """True when ``value`` means the same as ``gold``: equal as exact numbers, else as canonical text."""
    return value is not None and canonical(value) == canonical(gold)
