r"""The final answer in a generated text, by several named extractors, and what became of a text without one.

``strict`` reads the number after the last ``####`` that has one, and nothing else. ``flexible`` reads the number that a
text marks, boxes, states ("the answer is …") or, failing these, ends with. ``math`` does so for any expression,
``choice`` for a letter, ``yesno`` for a verdict, ``text`` for the words that are marked, boxed, stated or come last.

Every text falls into one class: ``answer``, ``no_answer`` (none can be read, two are given, or it says that it has
none) or ``cut_off`` (the token limit came before the answer). What a text mentions last is its answer only if it came
to its end; a number that touches the cut may have lost digits and is not read. Where a text leaves a choice between
two answers, none is read: a guess would be scored as what the model said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.boxes import find_boxes
from mlx_rsgwm.data.digits import fold
from mlx_rsgwm.data.number_words import could_become_scale
from mlx_rsgwm.data.numbers import parse_number, plain_number
from mlx_rsgwm.data.quantities import writes_decimal_commas
from mlx_rsgwm.evaluation.corrections import interrupts
from mlx_rsgwm.evaluation.equality import RUNAWAY, parse_mathematics
from mlx_rsgwm.evaluation.equality import is_correct as is_correct
from mlx_rsgwm.evaluation.final_text import (
    AMBIGUOUS,
    NOTHING,
    Reading,
    Statement,
    final_text,
    marked_lines,
    sentences,
    statements,
)
from mlx_rsgwm.evaluation.label_reading import options_of as options_of
from mlx_rsgwm.evaluation.label_reading import read_choice, read_verdict
from mlx_rsgwm.evaluation.last_number import last_number
from mlx_rsgwm.evaluation.number_reading import after_correction, marked_number, stated_number, taken_back

Status = Literal["answer", "no_answer", "cut_off"]
STATUSES: tuple[Status, ...] = ("answer", "no_answer", "cut_off")


@dataclass(frozen=True)
class Extraction:
    """The answer read, in canonical spelling (``1080``, ``B``, ``yes``), or None where the status is another."""

    value: str | None
    status: Status


# One line of mathematics without a word: all of it, or its right side, is the answer.
_BARE = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z](?![a-zA-Z])|[-+*/^=().,$\[\]{}\d \t])+")
# A set, a point or an interval that a text ends with is the answer as a whole.
_LIST_AT_END = re.compile(r"(?P<list>\\?[{(\[][^{}()\[\]\n]*\d\s*[,;][^{}()\[\]\n]*\d\s*\\?[)}\]])[\s.$*]*\Z")
_LABELS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_ANSWER_WORD = re.compile(r"['\"*\s]*(?:the\s+)?(?:final\s+)?answer\b['\"*\s]*(?:is\b|[:=.])?['\"*\s]*", re.IGNORECASE)
_CUT_NUMBER = re.compile(r"[\d.,/%]*\d[\d.,/%]*\Z")
REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able|not sure)|\bI (?:do not|don['’]t|cannot|can['’]t|can not) "
    r"(?:know|answer|solve|help|determine|provide|assist|have)|\bas an AI\b|\b(?:cannot|can['’]t|can not) be "
    r"(?:determined|answered|solved)|\bnot enough information\b|\bneed more (?:information|details|data)\b|"
    r"\bimpossible to (?:say|determine|know|tell|give|provide)\b",
    re.IGNORECASE,
)


def marked_line(text: str) -> str | None:
    """What follows the last filled ``####`` (four or more) on its line, or None without one.

    Models that got stuck end in empty markers, or in the prompt's own ``#### answer``; both count as not filled.
    """
    filled = [line for line in (_ANSWER_WORD.sub("", line, count=1).strip() for line in marked_lines(text)) if line]
    return filled[-1] if filled else None


def _strict(text: str, options: Mapping[str, str], finished: bool) -> Reading:
    return marked_number(text)


def _flexible(text: str, options: Mapping[str, str], finished: bool) -> Reading:
    return stated_number(text, finished)


def _choice(text: str, options: Mapping[str, str], finished: bool) -> Reading:
    return read_choice(text, options, finished)


def _yesno(text: str, options: Mapping[str, str], finished: bool) -> Reading:
    return read_verdict(text, finished)


def _math(text: str, options: Mapping[str, str], finished: bool) -> Reading:
    line = marked_line(text)
    scope = line if line is not None else text
    places = statements(scope, finished)
    boxes = list(find_boxes(scope, finished))
    said = [place for place in places if place.kind in ("said", "tag") and place.text.strip(" *$.\\[](")]
    if boxes:
        value = _bare_content(boxes[-1].answer)
        instead = _instead(scope, Statement(0, "", "box", end=boxes[-1].end), value)
        if instead is not None or not value:
            return instead or AMBIGUOUS
    elif line is not None:
        value = line
    elif said:
        value = _expression(said[-1].text)
        instead = _instead(scope, said[-1], value)
        if instead is not None or not value:
            return instead or AMBIGUOUS
    elif len(text) < 2000 and _BARE.fullmatch(text.strip()):
        value = text.rpartition("=")[2]
    else:
        if RUNAWAY.search(text[-4000:]):
            return NOTHING
        values = _LIST_AT_END.search(text[-4000:])
        if values is not None:
            return Reading(values["list"].replace("\\{", "{").replace("\\}", "}"), stated=False)
        if "\\" not in text and "^" not in text and last_number(fold(text[-4000:])).ambiguous:
            return AMBIGUOUS
        read = parse_mathematics(text[-4000:])
        return Reading(plain_number(str(read[-1])), stated=False) if read else NOTHING
    value = value.strip(" *`").rstrip(".").strip().strip("$").strip()
    return Reading(plain_number(value)) if value else NOTHING


def _instead(text: str, place: Statement, value: str) -> Reading | None:
    """What a text gives in place of mathematics that it takes back: a number, or nothing that can be known."""
    unchanged = Reading(plain_number(value.strip(" *`$.")))
    reading = after_correction(text, place, unchanged, writes_decimal_commas(fold(text)))
    if reading == unchanged:
        return None
    instead = taken_back(text, place, unchanged.value)
    plain = re.sub(r"\$(-?[0-9.,]+)\$", r"\1", instead or "")
    return AMBIGUOUS if re.search(r"[$\\^]", plain) else reading


def _bare_content(box: str) -> str:
    """A box without what names its contents: ``x \\in`` before a set."""
    return re.sub(r"^\s*[a-zA-Z]\s*\\in\b\s*", "", box).strip()


def _expression(text: str) -> str:
    r"""The mathematics in a stated answer: what stands between ``$`` or ``\(``, else the text up to its full stop."""
    # A dollar sign that opens mathematics touches it, and the closing one is before no digit ("$10 - $3" is money).
    inside = re.search(
        r"(?<!\\)\$((?:\\\$|[^$\s])(?:(?:\\\$|[^$])*[^$\s])?)(?<!\\)\$(?!\d)|\$\s([^$]+)\s\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]",
        text,
    )
    if inside:
        return next(filter(None, inside.groups()))
    sentence = re.split(r"\.(?:\s|$)", text.strip(" *"), maxsplit=1)[0].strip()
    if re.search(r"\$\s?\d.*=", sentence):
        return sentence.rpartition("=")[2].strip()
    if re.match(r"[-\d./]+,\s(?:and\s)?[-\d]", sentence):  # a list of values is the answer as a whole
        return sentence if re.fullmatch(r"[-\d./]+(?:,\s(?:and\s)?[-\d./]+)+", sentence) else ""
    text = text.strip(" *")
    for match in re.finditer(r"\.(?:\s|$)|,\s", text):
        before = text[: match.start()]
        if match[0][0] == "." or len(re.findall(r"[(\[{]", before)) <= len(re.findall(r"[)\]}]", before)):
            return before.strip()  # a comma inside brackets belongs to a point or an interval
    return text


def _text(text: str, options: Mapping[str, str], finished: bool) -> Reading:
    below = re.search(r"(?m)^[ \t]*#{4,}[ \t]*\n(?P<lines>(?:(?!.*#{4}).*\n?)+)\Z", text[-20_000:])
    if below is not None and below["lines"].strip():  # a mark on a line of its own: all that follows is the answer
        return Reading(below["lines"].strip()) if "\n" in below["lines"].strip() else _words(below["lines"])
    line = marked_line(text)
    if line is not None:
        boxes = list(find_boxes(line, finished))
        mark = Statement(0, line, "said", end=text.rfind(line))
        return _standing_words(text, mark, boxes[-1].answer if boxes else line)
    for place in reversed(statements(text, finished)):
        if place.kind != "subject" and place.text.strip(" *.:"):
            said = place.text if place.kind != "said" else next(iter(sentences(place.text)), "")
            return _standing_words(text, place, said)
    lines = [part.strip() for part in text.split("\n") if part.strip()]
    reading = _words(lines[-1]) if lines else NOTHING
    return Reading(reading.value, stated=False) if reading.value else NOTHING


def _standing_words(text: str, place: Statement, words: str) -> Reading:
    """An answer in words, unless the text takes it back: then what it says instead is not known."""
    interrupted = any(interrupts(sentence) for sentence in sentences(text[place.end :])[1:])
    return AMBIGUOUS if interrupted or taken_back(text, place) is not None else _words(words)


def _words(text: str) -> Reading:
    value = plain_number(re.sub(r"^[\s*:=]+(?=[^\s:=])", "", text).strip(" *\t\n"))
    return Reading(value) if value else NOTHING


EXTRACTORS: dict[str, Callable[[str, Mapping[str, str], bool], Reading]] = {
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
        text: what was generated; reasoning blocks are left out, and where it goes on to ask another question, or to
            another turn, it is cut there.
        kind: a key of ``EXTRACTORS``.
        finished: whether the text ended by itself.
        question: for ``choice``: its lettered options can also be named by their words.
        refusal: wording of a refusal; it overrules a value that is merely mentioned, not one that is stated.

    Raises:
        RsgwmError: an unknown extractor.
    """
    if kind not in EXTRACTORS:
        raise RsgwmError(f"unknown answer extractor {kind!r}; known are {', '.join(EXTRACTORS)}")
    text, complete = final_text(text)
    finished = finished or complete
    if not finished:
        text = _CUT_NUMBER.sub("", _uncut(text))
    reading = EXTRACTORS[kind](text, options_of(question) if kind == "choice" else {}, finished)
    if reading.value is None or not (finished or reading.stated):
        return Extraction(None, "no_answer" if finished or refusal.search(text) else "cut_off")
    if not reading.stated and refusal.search(text):
        return Extraction(None, "no_answer")
    return Extraction(reading.value, "answer")


def _uncut(text: str) -> str:
    """``text`` up to its last number, if what follows that is the beginning of a word that would multiply it."""
    match = re.search(r"\d[\d.,]* ?([a-zA-Z]{1,9})\Z", text[-40:])
    return text[: len(text) - len(match[0])] if match and could_become_scale(match[1]) else text
