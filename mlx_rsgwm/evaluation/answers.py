r"""The final answer in a generated text, by several named extractors, and what became of a text without one.

``strict`` reads the number after the last ``####`` that has one, and nothing else. ``flexible`` reads the number that a
text marks, boxes, states ("the answer is …") or, failing these, mentions last. ``math`` does so for any expression,
``choice`` for a letter, ``yesno`` for a verdict, ``text`` for the marked or last line.

Every text falls into one class: ``answer``, ``refusal`` (no answer can be read, SPEC 6.3, or it says that it has none)
or ``truncated`` (the token limit came before the answer). What a text mentions last is its answer only if it came to
its end; a number that touches the cut may have lost digits and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mlx_rsgwm.data.numbers import LITERAL, parse_number, plain_number, unfrac
from mlx_rsgwm.data.sources import last_boxed
from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.evaluation.equality import is_correct as is_correct
from mlx_rsgwm.evaluation.equality import parse_mathematics

Status = Literal["answer", "refusal", "truncated"]
STATUSES: tuple[Status, ...] = ("answer", "refusal", "truncated")


@dataclass(frozen=True)
class Extraction:
    """The answer found, in canonical spelling (``1080``, ``B``, ``yes``), or None where the status is another."""

    value: str | None
    status: Status


class Found(NamedTuple):
    """A value, and whether the text gives it as its answer or merely mentions it last."""

    value: str
    stated: bool = True


# A minus is a sign only where no number or word stands before it ("10-5" ends in 5) and no space after it.
_SIGNED = (
    rf"(?:(?<![\w)\]}}.%])-[$€£]?|[$€£]\s?-?)?"  # sign and currency
    rf"(?:[0-9]{{1,4}}\s+(?=[0-9]+/[0-9]))?"  # the whole part of a mixed number
    rf"{LITERAL}(?:/{LITERAL})?"
)
_NUMBER = re.compile(rf"(?<![A-Za-z_^])(?<!\^\{{){_SIGNED}(?!(?:st|nd|rd|th)\b)")
_CHAIN = re.compile(rf"[^\n=]{{0,80}}?=\s*\**\s*({_SIGNED})")
_MARKER = re.compile(r"#{4,}")
_AFTER_MARKER = re.compile(rf"[\s:=*`$€£]*?({_SIGNED})(?![0-9A-Za-z_]*[0-9_])")
_LIST_LABEL = re.compile(r"(?:^|\n)[ \t*]*(?:step\s+)?$", re.IGNORECASE)
_OUT_OF = re.compile(r"\bout\s+of\s+(?:the\s+)?(?:total\s+)?(?:of\s+)?[$€£]?$", re.IGNORECASE)
_STATED = re.compile(
    r"\banswer\b[^.:=\n\d]{0,50}?(?:\bis\b(?! to\b)|\bwould be\b|\bwill be\b|[:=])[ \t*]*(?:\n[ \t*]*)?([^\n]*)",
    re.IGNORECASE,
)
_STATED_LETTER = re.compile(
    r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\**[\"'“]?\(?([A-Ja-j])\)?(?![A-Za-z'’])", re.IGNORECASE
)
# One line of mathematics without a word: all of it, or its right side, is the answer.
_BARE = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z](?![a-zA-Z])|[-+*/^=().,$\[\]{}\d \t])+")
_LABEL = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_LEADING_LABEL = re.compile(r"[\s*\"']*(yes|no|true|false)\b(?=\s*(?:[,.:;!*\n\"']|$))", re.IGNORECASE)
_LABELS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_ANSWER_WORD = re.compile(r"^['\"*\s]*(?:the\s+)?(?:final\s+)?answer\b['\"*\s]*(?:is\b|[:=.])?['\"*\s]*", re.IGNORECASE)
_ANOTHER_QUESTION = re.compile(
    r"\n[\s#*]*(?:Q\s*\d*\s*:|(?:Question|Problem|Exercise)(?:\s*\d+)?\s*[:.])", re.IGNORECASE
)
_LETTERED = re.compile(r"[\s*]*[B-PR-Z]\s*[:.)]")
# Three or more empty markers at the end: the model has said what it had to say and cannot stop.
_STUCK = re.compile(r"(?:\s*#{4,}[ \t]*(?:answer)?[ \t.:]*(?=\s|$)){3,}\s*$", re.IGNORECASE)
_CUT_NUMBER = re.compile(r"[\d.,/%]*\d[\d.,/%]*\Z")
REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able|not sure)|\bI (?:do not|don['’]t|cannot|can['’]t|can not) "
    r"(?:know|answer|solve|help|determine|provide|assist|have)|\bas an AI\b|\b(?:cannot|can['’]t|can not) be "
    r"(?:determined|answered|solved)|\bnot enough information\b|"
    r"\bimpossible to (?:say|determine|know|tell|give|provide)\b",
    re.IGNORECASE,
)


def marked_line(text: str) -> str | None:
    """What follows the last filled ``####`` (four or more) on its line, or None without one.

    Models that got stuck end in empty markers, or in the prompt's own ``#### answer``; both count as not filled.
    """
    filled = [line for line in _marked_lines(text) if line]
    return filled[-1] if filled else None


def _marked_lines(text: str) -> list[str]:
    lines = []
    for found in _MARKER.finditer(text):
        line, _, after = text[found.end() :].partition("\n")
        if line.strip().lower().endswith("answer:"):  # and the answer stands below
            line = after.split("\n", 1)[0]
        lines.append(_ANSWER_WORD.sub("", line.strip()).strip())
    return lines


def _tidy(text: str) -> str:
    return text.replace("−", "-").replace("\\$", "$").replace("\u00a0", " ")


def _number(text: str) -> str | None:
    return None if parse_number(text) is None else plain_number(text)


def _found(text: str | None, stated: bool = True) -> Found | None:
    return None if text is None else Found(text, stated)


def _strict(text: str, options: Mapping[str, str]) -> Found | None:
    text = unfrac(_tidy(text))
    for marker in reversed(list(_MARKER.finditer(text))):
        end = text.find("\n", marker.end())
        found = _AFTER_MARKER.match(text[: len(text) if end < 0 else end], marker.end())
        number = _number(found[1]) if found else None
        if found and number is not None:
            return Found(number)
    return None


def _numbers(text: str) -> Iterator[re.Match[str]]:
    """Numbers that can be answers: no list labels, and no totals that something is out of."""
    for found in _NUMBER.finditer(text):
        before = text[: found.start()]
        if _OUT_OF.search(before[-24:]):
            continue
        if _LIST_LABEL.search(before[-16:]) and re.match(r"[.):](?:\s|\*)", text[found.end() : found.end() + 2]):
            continue
        yield found


def _first_value(text: str) -> re.Match[str] | None:
    """The number a statement gives: the first one, or the right end of the equation that it begins."""
    found: re.Match[str] | None = next(_numbers(text), None)
    start = found.end() if found else 0
    while (
        found is not None and (further := _CHAIN.match(text, start)) and _is_arithmetic(text[start : further.start(1)])
    ):
        found, start = further, further.end()
    return found


def _is_arithmetic(text: str) -> bool:
    return re.fullmatch(r"[\s\d.,$€£%+\-*×x÷/()=^*]*", text) is not None


def _flexible(text: str, options: Mapping[str, str]) -> Found | None:
    marked = _strict(text, options)
    if marked is not None:
        return marked
    text = unfrac(_tidy(text))
    span = last_boxed(text)
    boxed = next(_numbers(text[slice(*span)]), None) if span else None
    if boxed is not None:
        return _found(_number(boxed[0]))
    for stated in reversed(list(_STATED.finditer(text))):
        said = _first_value(stated[1])
        if said is not None:
            return _found(_number(said[said.lastindex or 0]))
    last = list(_numbers(text))
    return _found(_number(last[-1][0]), stated=False) if last else None


def _choice(text: str, options: Mapping[str, str]) -> Found | None:
    line = marked_line(text)
    if line is not None:
        found = re.match(r"[\s:*(\"']*([A-Ja-j])(?![A-Za-z'’])", line)
        return Found(found[1].upper()) if found else _by_option(line, options)
    stated = _STATED_LETTER.findall(text)
    if stated:
        return Found(stated[-1].upper())
    opening = re.findall(r"(?m)^[\s*(\"']*([A-J])(?:[).:]|[ \t]*$)", text)
    if len(opening) == 1 and re.match(r"[\s*(\"']*[A-J](?:[).:]|\s*$)", text):
        return Found(opening[0])
    alone = re.fullmatch(r"[\s*(\"']*([A-Ja-j])[).:\"'*]*\s*", text)
    if alone:
        return Found(alone[1].upper())
    # "A" opening a sentence and the pronoun "I" are words, so a bare letter must be last or wear brackets.
    bracketed = re.findall(r"\(([A-J])\)", text)
    if bracketed:
        return Found(bracketed[-1])
    last = re.search(r"(?<![A-Za-z'’])([A-J])[.\s*)\"]*$", text)
    return Found(last[1], stated=False) if last else _by_option(text, options)


def _by_option(text: str, options: Mapping[str, str]) -> Found | None:
    """The letter of the one option whose words are said; of several none, unless one is stated as the answer."""
    stated = _STATED.findall(text)
    for scope in (*stated[-1:], text):
        said = [
            letter
            for letter, words in options.items()
            if words.strip() and re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", scope, re.IGNORECASE)
        ]
        if len(said) == 1:
            return Found(said[0], stated=scope is not text)
    return None


def _yesno(text: str, options: Mapping[str, str]) -> Found | None:
    line = marked_line(text)
    if line is not None:
        found = re.match(r"[\s:*\"']*(yes|no|true|false)\b", line, re.IGNORECASE)
        return Found(_LABELS[found[1].lower()]) if found else None
    stated = _STATED.findall(text)
    said = _LABEL.findall(stated[-1]) if stated else []
    if said:
        return Found(_LABELS[said[0].lower()])
    leading = _LEADING_LABEL.match(text)
    if leading:
        return Found(_LABELS[leading[1].lower()])
    labels = _LABEL.findall(text)
    return Found(_LABELS[labels[-1].lower()], stated=False) if labels else None


def _math(text: str, options: Mapping[str, str]) -> Found | None:
    line = marked_line(text)
    scope = line if line is not None else text
    span = last_boxed(scope)
    stated = _STATED.findall(text)
    if span is not None:
        value = scope[slice(*span)]
    elif line is not None:
        value = line
    elif stated and stated[-1].strip(" *$.\\[]("):
        value = _expression(stated[-1])
    elif _BARE.fullmatch(text.strip()):
        value = text.rpartition("=")[2]
    else:
        read = parse_mathematics(text)
        return _found(plain_number(str(read[-1])), stated=False) if read else None
    value = value.strip(" *`").rstrip(".").strip().strip("$").strip()
    return Found(plain_number(value)) if value else None


def _expression(text: str) -> str:
    r"""The mathematics in a stated answer: what stands between ``$`` or ``\(``, else the text up to its full stop."""
    inside = re.search(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text)
    if inside:
        return inside[1] or inside[2] or inside[3]
    return re.split(r"\.(?:\s|$)|,\s", text.strip(" *"), maxsplit=1)[0].strip()


def _text(text: str, options: Mapping[str, str]) -> Found | None:
    line = marked_line(text)
    if line is None:
        lines = [part.strip() for part in text.split("\n") if part.strip()]
        line = lines[-1] if lines else ""
    return _found(plain_number(line) or None, stated=False)


EXTRACTORS: dict[str, Callable[[str, Mapping[str, str]], Found | None]] = {
    "strict": _strict,
    "flexible": _flexible,
    "math": _math,
    "choice": _choice,
    "yesno": _yesno,
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

# What is scored beside the extractor that decides, on the same generations.
BESIDE = {"strict": ("flexible", "math"), "math": ("flexible", "strict")}


def answer_kind(task: str, gold: str | None = None) -> str:
    """The extractor that decides for a task: from the table, else by the form of one gold answer, else ``strict``."""
    if task in TASK_KINDS:
        return TASK_KINDS[task]
    if gold is None or parse_number(gold) is not None:
        return "strict"
    if gold.strip().lower() in _LABELS:
        return "yesno"
    if re.fullmatch(r"[A-J]", gold.strip()):
        return "choice"
    return "math" if "\\" in gold else "text"


def extract(
    text: str,
    kind: str,
    finished: bool = True,
    question: str = "",
    refusal: re.Pattern[str] = REFUSAL,
) -> Extraction:
    """Find the final answer in ``text``.

    Args:
        text: what was generated; where it goes on to ask another question, it is cut there.
        kind: a key of ``EXTRACTORS``.
        finished: whether the text ended by itself.
        question: for ``choice``: its lettered options can also be named by their words.
        refusal: wording of a refusal; it overrules a value that is merely mentioned, not one that is stated.

    Raises:
        RsgwmError: an unknown extractor.
    """
    if kind not in EXTRACTORS:
        raise RsgwmError(f"unknown answer extractor {kind!r}; known are {', '.join(EXTRACTORS)}")
    further = _further_question(text)
    if further is not None:
        text, finished = text[:further], True
    stuck = _STUCK.search(text)
    if stuck is not None:
        text, finished = text[: stuck.start()], True
    if not finished:
        text = _CUT_NUMBER.sub("", text)
    found = EXTRACTORS[kind](text, options_of(question) if kind == "choice" else {})
    if (found is None or not found.stated) and refusal.search(text):
        return Extraction(None, "refusal")
    if found is None or not (finished or found.stated):
        return Extraction(None, "refusal" if finished else "truncated")
    return Extraction(found.value, "answer")


def _further_question(text: str) -> int | None:
    """Where the text goes on to ask another question; the Q between the lines P and R of a list is none."""
    for found in _ANOTHER_QUESTION.finditer(text):
        before = text[: found.start()]
        if before.strip() and not _LETTERED.match(before.rstrip().rpartition("\n")[2]):
            return found.start()
    return None


def options_of(question: str) -> dict[str, str]:
    """Lettered options of a question, by letter: lines like ``B. library``."""
    return {found[1]: found[2].strip() for found in re.finditer(r"(?m)^\s*\(?([A-J])[.):]\s+(.+)$", question)}
