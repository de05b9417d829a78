"""The number that a text ends with where nothing marks or states its answer.

The last sentence that has a number decides, as far as it leaves no choice; offers, questions and remarks are
passed over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mlx_rsgwm.data.quantities import Quantity, quantities, writes_decimal_commas
from mlx_rsgwm.evaluation.corrections import find_correction
from mlx_rsgwm.evaluation.final_text import AMBIGUOUS, LONGEST, MOST, NOTHING, Reading, sentences
from mlx_rsgwm.evaluation.number_candidates import (
    COMPOUND,
    OPERATOR,
    RENAMED,
    TWO_VALUES,
    alone,
    as_reading,
    candidates,
    rewritten,
    unscaled,
)

_COMPARED = re.compile(
    r"(?:,?\s*(?:which|that|this|and that) (?:is|was|are)\s+|,\s*(?=[$€£]?[0-9]))?[$€£]?[0-9][\d.,]*\s+(?:[^\W\d]+\s+)?"
    r"(?:fewer|less|more|greater|higher|lower|older|younger|longer|shorter|bigger|smaller)\b[^.;,=\d]{0,30}?"
    r"\bthan\s+(?:[^\W\d]+\s+)?[$€£]?[0-9][\d.,]*[^\d=]*$",
    re.IGNORECASE,
)
_EQUALS = re.compile(
    r"(?:=|≈|\bequals\b|\bis equal to\b)\s*\(?(?:about|approximately|roughly)?\s*[$€£¥₹]?\s*(?=[-+–]?[$€£¥₹]?\.?[0-9])"
)
_RELATIVE_TIME = re.compile(r"\s+[a-z]+\s+(?:later|earlier|ago)\b", re.IGNORECASE)
_GIVEN = re.compile(r"\b(?:the|these|those|all|her|his|their|its|both)\s+[$€£]?$", re.IGNORECASE)
_REASON = re.compile(
    r"[,;]?\s\(?(?:because|since|given that|assuming|as long as|if|rather than|instead of)\b", re.IGNORECASE
)
_NEW_SUBJECT = re.compile(
    r"(?:\s+[^\W\d][\w'’-]*){0,3},?\s+(?:and|or|while|but|und|oder|et|ou|y|e|o|и)\s+"
    r"(?:(?!So |Then )[A-Z][\w'’-]*\s+|(?:he|she|they|the \w+|another|about|also)\s+)?"
    r"(?:has|have|had|got|gets|is|are|was|were|needs?|eats?)?\s*[$€£]?",
)
_CHATTER = re.compile(
    r"\W*(?:\(|note\b|notes\b|n\.b\.|prices?\b|hope\b|i hope\b|let me know|feel free|would you|do you|please|ask me|"
    r"source|disclaimer|copyright|\*\s*note)",
    re.IGNORECASE,
)
_REASON_FIRST = re.compile(r"\W*(?:since|because|as|given that|if|when|although|while)\b[^,]*,\s", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:might be|may be|could be|[Mm]aybe|[Pp]erhaps|[Pp]ossibly)\b(?![^=]*=)")
_NAMED_LINE = re.compile(r"\W*([^\W\d][\w'’ ]{0,40}?)\s*[-–:=)]\s*[$€£]?-?[0-9][\d.,]*\W*(?:[^\W\d]+\W*){0,2}$")
_TOTAL = re.compile(r"total|sum|answer|result|left|profit|cost|altogether|ans|gesamt|suma", re.IGNORECASE)
_PARENTHESIS = re.compile(r"\([^()\n]{0,200}\)")


def last_number(text: str, decimal_commas: bool | None = None) -> Reading:
    """The number that a text ends with, as far as its last sentence with one leaves no choice."""
    commas = writes_decimal_commas(text) if decimal_commas is None else decimal_commas
    if re.fullmatch(r"\W*[0-9]+!\W*", text):
        return AMBIGUOUS  # a factorial, or joy
    pieces = sentences(text)
    for index in range(len(pieces) - 1, max(-1, len(pieces) - 1 - MOST), -1):
        sentence = pieces[index][-LONGEST:]
        if not re.search(r"[0-9]", sentence) or (_CHATTER.match(sentence) and index):
            continue
        if sentence.rstrip(" \"'*)").endswith("?"):
            if index:
                continue
            return NOTHING
        reading = _concluded(sentence, pieces[index - 1] if index else "", commas)
        if reading is not NOTHING:
            return AMBIGUOUS if _hedged(sentence, pieces[index - 1] if index else "") else reading
    for sentence in (piece[-LONGEST:] for piece in pieces[: -MOST - 1 : -1]):
        words = [
            number
            for number in candidates(sentence, commas, in_words=True)
            if sentence[number.start :][:3].lower() != "one"
        ]
        if words and not re.search(r"[0-9]", sentence):
            return as_reading(words[-1], stated=False) if len(words) == 1 else NOTHING
    return NOTHING


def _hedged(sentence: str, before: str) -> bool:
    """Whether two sentences in a row each offer a number as a possibility."""
    return all(_HEDGE.search(part) and re.search(r"[0-9]", part) for part in (sentence, before))


def _concluded(sentence: str, line_before: str, commas: bool) -> Reading:
    """What one sentence, not marked as an answer, comes to."""
    variable = re.search(r"(?:^|[\s=])([-–]?[$€£]?[0-9][0-9.,/]*)\s*=\s*[A-Za-z]\W*$", sentence)
    if variable is not None:  # "160 = Y."
        return as_reading(quantities(variable[1], commas)[0], stated=False)
    equals = list(_EQUALS.finditer(sentence))
    right = [number for number in quantities(sentence, commas) if equals and number.end > equals[-1].end()]
    left = [number for number in quantities(sentence, commas) if right and number.end <= equals[-1].start()]
    if left and left[-1].value != right[0].value and TWO_VALUES.fullmatch(sentence[left[-1].end : right[0].start]):
        return AMBIGUOUS  # "x = 5 or x = -5"
    if right and not OPERATOR.match(sentence, right[0].end) and find_correction(sentence[right[0].end :]) is None:
        if not alone(sentence, right[0], right[1:]):
            return AMBIGUOUS
        return as_reading(_renamed(sentence, right), stated=False)
    outside = _PARENTHESIS.sub(
        lambda match: " " * len(match[0]) if re.search("[A-Za-z]", match[0]) else match[0], sentence
    )
    reason = _REASON_FIRST.match(outside)
    outside = outside if reason is None else " " * reason.end() + outside[reason.end() :]
    numbers = candidates(outside, commas) or ([] if reason else candidates(sentence, commas))
    compared = _COMPARED.search(sentence)
    if compared is not None and numbers and numbers[-1].end > compared.start():  # neither is the difference the answer
        numbers = [number for number in numbers if number.end <= compared.start()]
        if not numbers:
            return AMBIGUOUS
    reason = _REASON.search(sentence, numbers[0].end) if numbers else None
    if reason is not None:
        numbers = [number for number in numbers if number.end <= reason.start()] or numbers
    numbers = [number for number in numbers if not _RELATIVE_TIME.match(sentence, number.end)]
    plain = [number for number in numbers if not _GIVEN.search(sentence[max(0, number.start - 16) : number.start])]
    numbers = plain or numbers
    if not numbers:
        return NOTHING
    named, earlier = _NAMED_LINE.fullmatch(sentence), _NAMED_LINE.fullmatch(line_before)
    if named and earlier and not _TOTAL.search(named[1]) and len(numbers) == 1:
        return AMBIGUOUS  # "Ann - 2" under "Ben - 3": a list of values, none of them the answer
    if len(numbers) > 1:
        gap = sentence[numbers[-2].end : numbers[-1].start]
        if len(gap) <= 60 and (_NEW_SUBJECT.fullmatch(gap) or COMPOUND.fullmatch(gap) or not gap.strip(" ,;")):
            return AMBIGUOUS
    return as_reading(numbers[-1], stated=False)


def _renamed(sentence: str, right: Sequence[Quantity]) -> Quantity:
    """What the right side of an equation is called afterwards ("= 240 minutes, which is 4 hours"), else itself."""
    if len(right) > 1 and RENAMED.search(sentence[right[0].end : right[1].start]):
        return right[1] if alone(sentence, right[1], right[2:]) else replace(right[1], value=None)
    result = rewritten(sentence, right[0], right[1:])
    return unscaled(sentence, right[0]) if result is right[0] else result
