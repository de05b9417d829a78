"""The one number that a text gives as its answer, or why there is none.

Every reader returns a :class:`Reading`: a value, or None with ``ambiguous`` where the text answers with something that
is not one number (two values, a range, a time, an expression left open), or without it where it does not answer here.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mlx_rsgwm.data.digits import fold
from mlx_rsgwm.data.quantities import Quantity, quantities, word_quantities, writes_decimal_commas
from mlx_rsgwm.evaluation.corrections import confirms, denies, find_correction, offers_another
from mlx_rsgwm.evaluation.final_text import (
    AMBIGUOUS,
    LONGEST,
    MOST,
    NOTHING,
    Reading,
    Statement,
    marked_lines,
    sentences,
    statements,
)
from mlx_rsgwm.evaluation.languages import words
from mlx_rsgwm.evaluation.last_number import last_number
from mlx_rsgwm.evaluation.number_candidates import (
    DIFFERENCE,
    OPERATOR,
    RENAMED,
    alone,
    as_reading,
    candidates,
    is_multiplied,
    rewritten,
    unscaled,
)

_ARITHMETIC = re.compile(
    r"(?:[\s0-9.,$€£%+\-–*×÷/()\[\]^√=]|(?<![A-Za-z])[xX](?![A-Za-z])|\b(?:of|times|plus|minus|divided by)\b)*="
)
_WORDED = re.compile(r"(?:(?!\bbecause\b|\bsince\b|\bas\b|, | and )[^=;:!?\n]){0,120}=(?=\s*[-–$€£]*\s?\.?[0-9])")
_SHARE = re.compile(r"\s?(?:%|percent)?\s+of\s+[$€£]?[0-9]", re.IGNORECASE)
_OPEN_PHRASE = re.compile(
    r"\b(?:sum|product|difference|quotient|total|average|number|ratio|half|double|twice)\s+of\b|\b(?:first|let|step)\b",
    re.IGNORECASE,
)
_CONDITION = re.compile(
    r"\b(?:otherwise|or else|but|also|while|whereas|alternatively|maybe|perhaps|possibly|could be|might be|"
    r"and(?!\s(?:that|this|it|so|not|each|every)\b))\b",
    re.IGNORECASE,
)
# "9 if it rains", "1 out of 6": no value by itself.
_LEFT_OPEN = re.compile(
    r"(?:\s[^\W\d]+){0,3}\s(?:if|unless|wenn|falls|si|se)\b|\sout of\s(?:the\s)?[0-9]+[.)\s]*$", re.IGNORECASE
)
_IF_BEFORE = re.compile(r"\b(?:if|unless)\b[^.!?\n]*$", re.IGNORECASE)
_NOT_THIS_BOX = re.compile(rf"\b(?:{words('denial')})[\s$(\\]*$", re.IGNORECASE)
_MARK_PREFIX = re.compile(
    r"[\s*:=`(\[$_]*(?:(?:so|therefore|thus|hence)\b[,\s]*)?(?:(?:the|my)\s+)?(?:(?:final|correct)\s+)?(?:answer|ans|result|total)?[\s*:`]*"
    r"(?:is|are|=|:)?[\s*:`(\[$]*(?:[a-zA-Z]\w{0,3}\s*=\s*)?(?:(?:about|approximately|approx\.|around|roughly|only|exactly|~|≈)\s*)?[\s*:`(\[${]*",
    re.IGNORECASE,
)


def _first(text: str, commas: bool) -> Reading:
    """The number a statement gives: the first one, or the right end of the equation that it begins."""
    text = text[:LONGEST]
    parts = sentences(text)
    sentence = parts[0] if parts else ""
    numbers = candidates(sentence, commas, in_words=True)
    if not numbers:
        return NOTHING
    number, others = numbers[0], numbers[1:]
    before = sentence[: number.start]
    count = len(re.findall(r"[^\W\d]{2,}", before))
    if _OPEN_PHRASE.search(before) or count > 4 or (count and "=" in text[number.end :]):
        return last_number(text, commas)  # it tells how the answer comes about, and ends with it
    end = _equation_end(sentence, number)
    if end is not None:
        right = [other for other in quantities(sentence, commas) if other.end > end]
        if not right or not alone(sentence, right[0], right[1:]):
            return AMBIGUOUS
        result = rewritten(sentence, right[0], right[1:])
        return as_reading(unscaled(sentence, right[0]) if result is right[0] else result)
    if (  # "25% of 80, which is 20", "twice 8, which is 16"
        _SHARE.match(sentence, number.end)
        or OPERATOR.match(sentence, number.end)
        or DIFFERENCE.match(sentence, number.end)
        or is_multiplied(sentence, number)
    ):
        share = last_number(text, commas) if RENAMED.search(sentence, number.end) else NOTHING
        return AMBIGUOUS if share.value is None else share
    if re.search(r"\b(?:between|from|either|both)\s+[$€£]?$", before, re.IGNORECASE):
        return AMBIGUOUS
    if _LEFT_OPEN.match(sentence, number.end) or any(
        _CONDITION.search(sentence[number.end : other.start]) for other in others[:1]
    ):
        return AMBIGUOUS
    correction = find_correction(sentence[number.end :], number.text if number.value is not None else None)
    if correction is not None and quantities(correction.text, commas):
        return _first(correction.number or correction.text, commas)
    return as_reading(rewritten(sentence, number, others)) if alone(sentence, number, others) else AMBIGUOUS


def _equation_end(sentence: str, number: Quantity) -> int | None:
    """Where the right side of the equation that a statement begins with stands, or None without one."""
    match = _ARITHMETIC.match(sentence, number.end)
    if match is not None:
        return match.end()
    worded = _WORDED.match(sentence, number.end)
    return worded.end() if worded is not None and re.search(r"[+*×÷/]|\s[-x]\s", worded[0]) else None


def marked_number(text: str) -> Reading:
    """The number after the last ``####`` that has one; words before it are none, two values are ambiguous."""
    text = fold(_unboxed(text))
    commas = writes_decimal_commas(text)
    for line in reversed(marked_lines(text)):
        prefix = _MARK_PREFIX.match(line)
        start = prefix.end() if prefix else 0
        rest = line[start:]
        numbers = quantities(rest, commas)
        in_words = word_quantities(rest) if not numbers or numbers[0].start > 12 else []
        if in_words and in_words[0].start == 0 and in_words[0].value is not None:
            return as_reading(in_words[0])
        # The sign or the currency may have been taken for dress.
        if (
            re.match(
                r"(?:[-+–±]|[$€£¥₹₩]|\.|√|(?:USD|EUR|GBP|INR|US|CA|AU|Rs\.?|R)\s?[$€£]?|minus\b|negative\b|between\b|either\b|from\b)?\s?-?[$€£¥₹]?\s?\.?[0-9]",
                rest,
                re.IGNORECASE,
            )
            is None
        ):
            continue
        reading = _first(rest, commas)
        if reading is not NOTHING:
            return Reading(reading.value, reading.ambiguous, end=len(line) - len(rest) + reading.end)
    return NOTHING


def _unboxed(text: str) -> str:
    return re.sub(r"(#{4,}[^\n]{0,40}?)\\(?:boxed|fbox)\s*\{([^{}\n]*(?:\{[^{}\n]*\}[^{}\n]*)*)\}", r"\1\2", text)


def stated_number(text: str, finished: bool = True) -> Reading:
    r"""The number after ``####``, in the last box, tag or statement that has one, or the one the text ends with."""
    marked = marked_number(text)
    commas = writes_decimal_commas(fold(text))
    if marked is not NOTHING:
        marker = Statement(0, "", "said", end=text.rfind("####") + 4)
        return after_correction(text, marker, marked, commas)
    places = statements(text, finished)
    for index in range(len(places) - 1, -1, -1):
        place = places[index]
        before = text[max(0, place.start - 100) : place.start]
        if place.kind == "box" and _NOT_THIS_BOX.search(before):
            continue
        if "would be" in text[place.start : place.end] and _IF_BEFORE.search(before):
            return AMBIGUOUS
        reading = _stated(place, commas)
        if reading is NOTHING:
            continue
        if reading.value is not None and place.kind != "box" and not place.text.strip():
            continue
        return after_correction(text, place, reading, commas)
    return last_number(fold(text), commas)


def _stated(place: Statement, commas: bool) -> Reading:
    if place.kind == "box":
        readings = [_whole(fold(box), commas) for box in place.boxes]
        return readings[0] if len({reading.value for reading in readings}) == 1 else AMBIGUOUS
    if place.kind == "tag":
        return stated_number(place.text) if "<answer" not in place.text else NOTHING
    return _first(fold(place.text), commas)


def _whole(box: str, commas: bool) -> Reading:
    """What a box or a tag holds: all of it is the answer, so nothing in it may be left over."""
    reading = _first(box, commas)
    return AMBIGUOUS if reading is NOTHING else reading


def after_correction(text: str, place: Statement, reading: Reading, commas: bool) -> Reading:
    """The reading, unless the text takes it back afterwards: then what it says instead, or nothing."""
    return _corrected(_following(text, place), reading, commas, MOST)


def _corrected(tail: str, reading: Reading, commas: bool, most: int) -> Reading:
    correction = find_correction(tail, reading.value)
    if correction is None or not most:
        return AMBIGUOUS if offers_another(tail[:LONGEST].lstrip(" .*$)]}"), reading.value) else reading
    if correction.number is not None:
        return replace(_first(correction.number, commas), stated=False)
    instead = _first(correction.text, commas) if correction.puts_forward else NOTHING
    if instead is not NOTHING:  # which may be taken back in its turn
        after = "\n".join(sentences(correction.text)[1:])
        return _corrected(after, replace(instead, stated=False), commas, most - 1)
    confirmed = confirms(correction.text)
    if confirmed and not denies(correction.text):
        return reading
    instead = last_number(correction.text, commas)
    if confirmed and instead is NOTHING:
        return reading  # "Was that wrong? No, it is correct."
    return AMBIGUOUS if instead.value is None else replace(instead, stated=False)


def taken_back(text: str, place: Statement, value: str | None = None) -> str | None:
    """What a text says after it takes an answer back ("Wait, that is wrong; …"), or None where it stands by it."""
    correction = find_correction(_following(text, place), value)
    return None if correction is None else correction.text


def _following(text: str, place: Statement) -> str:
    """What comes after an answer; after one in words that holds no digit, from the next sentence on."""
    tail = fold(text[place.end :])
    if place.kind != "said":
        return tail
    first, *later = sentences(tail) or [""]
    digits = re.search(r"[0-9](?:[0-9.,/]*[0-9])?", first)
    within = first[digits.end() :] if digits is not None else ""
    return "\n".join([within, *later] if find_correction(within) is not None else later)
