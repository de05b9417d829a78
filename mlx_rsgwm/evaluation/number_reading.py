"""The one number that a text gives as its answer, or why there is none.

Every reader returns a :class:`Reading`: a value, or None with ``ambiguous`` where the text answers with something that
is not one number (two values, a range, a time, an expression left open), or without it where it does not answer here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_rsgwm.data.digits import fold
from mlx_rsgwm.data.equations import evaluate
from mlx_rsgwm.data.numbers import read_numeral
from mlx_rsgwm.data.quantities import Quantity, quantities, word_quantities, writes_decimal_commas
from mlx_rsgwm.evaluation.corrections import confirms, denies, find_correction, offers_another
from mlx_rsgwm.evaluation.final_text import Statement, marked_lines, statements


@dataclass(frozen=True)
class Reading:
    value: str | None = None
    ambiguous: bool = False
    stated: bool = True
    end: int = 0  # where the number ends in the text that was read; for texts that were cut off


MOST, LONGEST = 40, 1000  # sentences looked at from the end of a text, and characters of one

NOTHING, AMBIGUOUS = Reading(), Reading(ambiguous=True)

_AND = r"(?:and|or|und|oder|et|ou|y|e|o|и|или|eller|lub|veya|أو|या|to|bis|through|plus|versus|vs)"
_TWO_VALUES = re.compile(
    rf"(?:\s*[^\W\d][\w'’-]*|\s*[%°²³]){{0,3}}(?:\s*(?:[,;&和或]|または|또는)\s*(?:(?:and|or)\s+)?|\s+\(or\s+|\s+{_AND}\b\.?\s+(?:(?:about|also|another)\s+)?)"
    r"(?:[a-zA-Z]\w{0,3}\s*=\s*)?[(\[$€£¥₹]*",
    re.IGNORECASE,
)
_COMPOUND = re.compile(
    r"\s?(?:feet|foot|ft|yards?|hours?|hrs?|h|minutes?|mins?|m|weeks?|days?|years?|months?|pounds?|lbs?|kg|km|meters?|"
    r"degrees|'|°),?\s?",
    re.IGNORECASE,
)
_OPERATOR = re.compile(
    r"\s*(?:[-+*×÷/]|[xX](?![a-z])|times|plus|minus|divided by|multiplied by)\s*[$€£]?\s*\(*\s*(?=[-0-9.])"
)
_ARITHMETIC = re.compile(
    r"(?:[\s0-9.,$€£%+\-–*×÷/()\[\]^√=]|(?<![A-Za-z])[xX](?![A-Za-z])|\b(?:of|times|plus|minus|divided by)\b)*="
)
_WORDED = re.compile(r"(?:(?!\bbecause\b|\bsince\b|\bas\b|, | and )[^=;:!?\n]){0,120}=(?=\s*[-–$€£]*\s?\.?[0-9])")
_TWO_OPERANDS = re.compile(
    r"(?<![-+*×÷/x.,0-9])\s?[$€£]?([0-9][0-9.,]*)\s*[kK]?(?:\s+[a-zA-Z]+){0,3}\s*([-–+*×x÷/])\s*[$€£]?([0-9][0-9.,]*)"
    r"(?:\s+[a-zA-Z]+){0,5}\s*=\s*[$€£]?\s*$"
)
_SHARE = re.compile(r"\s?(?:%|percent)?\s+of\s+[$€£]?[0-9]", re.IGNORECASE)
_COMPARED = re.compile(
    r"(?:,?\s*(?:which|that|this|and that) (?:is|was|are)\s+|,\s*(?=[$€£]?[0-9]))?[$€£]?[0-9][\d.,]*\s+(?:[^\W\d]+\s+)?"
    r"(?:fewer|less|more|greater|higher|lower|older|younger|longer|shorter|bigger|smaller)\b[^.;,=\d]{0,30}?"
    r"\bthan\s+(?:[^\W\d]+\s+)?[$€£]?[0-9][\d.,]*[^\d=]*$",
    re.IGNORECASE,
)
_EQUALS = re.compile(
    r"(?:=|≈|\bequals\b|\bis equal to\b)\s*\(?(?:about|approximately|roughly)?\s*[$€£¥₹]?\s*(?=[-+–]?[$€£¥₹]?\.?[0-9])"
)
_RENAMED = re.compile(r"\b(?:(?:which|that) (?:is|equals|makes|means|rounds|comes)|i\.e\.|rounds? (?:up |down )?to)\b")
_DENIED_BEFORE = re.compile(
    r"(?:\bnot|n['’]t|\bcannot|\bnever|\bneither|\bnor|\brather than|\binstead of|\bother than|"
    r"\bnicht|\bpas|\bno es|\bnon è|\bstatt|≠|不是)"
    r"(?:\s+(?:be|equal to|equal|just|only|simply|the|really|exactly))*\s*[$€£]?$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"(?:\s+[^\W\d]+)?\s*(?:(?:is|was|are|were|would be|seems|looks)\s+(?:not|wrong|incorrect|false|too|impossible)|"
    r"(?:is|was|are|were|ca|could|wo)n['’]t|cannot|can not)\b|\s*\?\s*(?:no|nope|wrong|nein|non)\b",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"(?:\b(?:fig(?:ure)?|table|step|problem|question|exercise|chapter|section|page|room|option|case|method|"
    r"equation|eq|line|version|part|approach|example|q)\.?|#)\s*\(?$",
    re.IGNORECASE,
)
_OUT_OF = re.compile(r"\bout\s+of\s+(?:the\s+)?(?:total\s+)?(?:of\s+)?[$€£]?$", re.IGNORECASE)
_LIST_LABEL = re.compile(r"(?:^|\n)[ \t*]*(?:step\s+)?$", re.IGNORECASE)
_RELATIVE_TIME = re.compile(r"\s+[a-z]+\s+(?:later|earlier|ago)\b", re.IGNORECASE)
_GIVEN = re.compile(r"\b(?:the|these|those|all|her|his|their|its|both)\s+[$€£]?$", re.IGNORECASE)
_REASON = re.compile(
    r"[,;]?\s\(?(?:because|since|given that|assuming|as long as|if|rather than|instead of)\b", re.IGNORECASE
)
_OPEN_PHRASE = re.compile(
    r"\b(?:sum|product|difference|quotient|total|average|number|ratio|half|double|twice)\s+of\b|\b(?:first|let|step)\b",
    re.IGNORECASE,
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
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]*]*\s+(?=[\"'(*\\$\[]*[A-Z0-9\u0080-\uffff])|\n+")
_ABBREVIATION = re.compile(
    r"\b(?:approx|no|vs|mr|mrs|ms|dr|st|e\.g|i\.e|ca|bzw|mio|mrd|oz|lb|lbs|ft|hr|hrs|min|sq)\.$", re.IGNORECASE
)
_HEDGE = re.compile(r"\b(?:might be|may be|could be|[Mm]aybe|[Pp]erhaps|[Pp]ossibly)\b(?![^=]*=)")
_NAMED_LINE = re.compile(r"\W*([^\W\d][\w'’ ]{0,40}?)\s*(?:[-–:=])\s*[$€£]?-?[0-9][\d.,]*\W*(?:[^\W\d]+\W*){0,2}$")
_TOTAL = re.compile(r"total|sum|answer|result|left|profit|cost|altogether|ans|gesamt|suma", re.IGNORECASE)
_PARENTHESIS = re.compile(r"\([^()\n]{0,200}\)")
_MARK_PREFIX = re.compile(
    r"[\s*:=`(\[$_]*(?:(?:so|therefore|thus|hence)\b[,\s]*)?(?:(?:the|my)\s+)?(?:(?:final|correct)\s+)?(?:answer|ans|result|total)?[\s*:`]*"
    r"(?:is|are|=|:)?[\s*:`(\[$]*(?:[a-zA-Z]\w{0,3}\s*=\s*)?(?:(?:about|approximately|approx\.|around|roughly|only|exactly|~|≈)\s*)?[\s*:`(\[${]*",
    re.IGNORECASE,
)


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text; a point after an abbreviation or inside a number ends none."""
    pieces: list[str] = []
    position = 0
    for match in _SENTENCE_END.finditer(text):
        if "\n" not in match[0] and _ABBREVIATION.search(text[max(0, match.start() - 8) : match.start()]):
            continue
        pieces.append(text[position : match.start()])
        position = match.end()
    pieces.append(text[position:])
    return [piece for piece in pieces if piece.strip()]


def candidates(text: str, decimal_commas: bool, words: bool = False) -> list[Quantity]:
    """Quantities that can be answers: no list labels, no totals that something is out of, nothing that is denied."""
    numbers = quantities(text, decimal_commas)
    if words and not numbers:
        numbers = word_quantities(text)
    kept: list[Quantity] = []
    for number in numbers:
        before, after = text[max(0, number.start - 40) : number.start], text[number.end : number.end + 40]
        if _OUT_OF.search(before) or _LABELLED.search(before):
            continue
        if _LIST_LABEL.search(before[-16:]) and re.match(r"[.):](?:\s|\*)", after) and after[1:].strip():
            continue
        if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after):
            continue
        kept.append(number)
    return kept


def _reading(number: Quantity, stated: bool = True) -> Reading:
    if number.value is None:
        return AMBIGUOUS
    return Reading(number.text, stated=stated, end=number.end)


def _first(text: str, commas: bool) -> Reading:
    """The number a statement gives: the first one, or the right end of the equation that it begins."""
    text = text[:LONGEST]
    parts = sentences(text)
    sentence = parts[0] if parts else ""
    numbers = candidates(sentence, commas, words=True)
    if not numbers:
        return NOTHING
    number, others = numbers[0], numbers[1:]
    before = sentence[: number.start]
    words = len(re.findall(r"[^\W\d]{2,}", before))
    if _OPEN_PHRASE.search(before) or words > 4 or (words and "=" in text[number.end :]):
        return last_number(text, commas)  # it tells how the answer comes about, and ends with it
    end = _equation_end(sentence, number)
    if end is not None:
        right = [other for other in quantities(sentence, commas) if other.end > end]
        if not right or not _only(sentence, right[0], right[1:]):
            return AMBIGUOUS
        return _reading(_unscaled(sentence, right[0]))
    if _SHARE.match(sentence, number.end):  # "25% of 80, which is 20"
        result = last_number(text, commas) if _RENAMED.search(sentence, number.end) else NOTHING
        return AMBIGUOUS if result.value is None else result
    if re.search(r"\b(?:between|from|either|both)\s+[$€£]?$", before, re.IGNORECASE):
        return AMBIGUOUS
    correction = find_correction(sentence[number.end :], number.text if number.value is not None else None)
    if correction is not None and quantities(correction.text, commas):
        return _first(correction.number or correction.text, commas)
    return _reading(number) if _only(sentence, number, others) else AMBIGUOUS


def _equation_end(sentence: str, number: Quantity) -> int | None:
    """Where the right side of the equation that a statement begins with stands, or None without one."""
    match = _ARITHMETIC.match(sentence, number.end)
    if match is not None:
        return match.end()
    worded = _WORDED.match(sentence, number.end)
    return worded.end() if worded is not None and re.search(r"[+*×÷/]|\s[-x]\s", worded[0]) else None


def _unscaled(sentence: str, right: Quantity) -> Quantity:
    """The right side of an equation in the unit that its left side is in: "32 - 28 = $4 million" comes to 4."""
    if right.value is None or right.plain is None:
        return right
    match = _TWO_OPERANDS.search(sentence[max(0, right.start - 80) : right.start])
    if match is None:
        return right
    left, other = read_numeral(match[1]), read_numeral(match[3])
    if left is None or other is None:
        return right
    value = evaluate([left, {"×": "*", "x": "*", "÷": "/", "–": "-"}.get(match[2], match[2]), other])
    return replace(right, value=right.plain) if value == right.plain else right


def _only(sentence: str, number: Quantity, others: Sequence[Quantity]) -> bool:
    """Whether a number stands alone: no second value is offered beside it, and no operation on it is left open."""
    if _OPERATOR.match(sentence, number.end):
        return False
    for other in others[:1]:
        gap = sentence[number.end : other.start]
        if len(gap) <= 60 and (_TWO_VALUES.fullmatch(gap) or _COMPOUND.fullmatch(gap)):
            return other.value is not None and other.value == number.value
    return True


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
            for number in candidates(sentence, commas, words=True)
            if sentence[number.start :][:3].lower() != "one"
        ]
        if words and not re.search(r"[0-9]", sentence):
            return _reading(words[-1], stated=False) if len(words) == 1 else NOTHING
    return NOTHING


def _hedged(sentence: str, before: str) -> bool:
    """Whether two sentences in a row each offer a number as a possibility."""
    return all(_HEDGE.search(part) and re.search(r"[0-9]", part) for part in (sentence, before))


def _concluded(sentence: str, line_before: str, commas: bool) -> Reading:
    """What one sentence, not marked as an answer, comes to."""
    variable = re.search(r"(?:^|[\s=])([-–]?[$€£]?[0-9][0-9.,/]*)\s*=\s*[A-Za-z]\W*$", sentence)
    if variable is not None:  # "160 = Y."
        return replace(_first(variable[1], commas), stated=False)
    equals = list(_EQUALS.finditer(sentence))
    right = [number for number in quantities(sentence, commas) if equals and number.end > equals[-1].end()]
    left = [number for number in quantities(sentence, commas) if right and number.end <= equals[-1].start()]
    if left and left[-1].value != right[0].value and _TWO_VALUES.fullmatch(sentence[left[-1].end : right[0].start]):
        return AMBIGUOUS  # "x = 5 or x = -5"
    if right and not _OPERATOR.match(sentence, right[0].end) and find_correction(sentence[right[0].end :]) is None:
        if not _only(sentence, right[0], right[1:]):
            return AMBIGUOUS
        renamed = _RENAMED.search(sentence, right[0].end) and len(right) > 1
        return _reading(right[-1] if renamed else _unscaled(sentence, right[0]), stated=False)
    outside = _PARENTHESIS.sub(
        lambda match: " " * len(match[0]) if re.search("[A-Za-z]", match[0]) else match[0], sentence
    )
    numbers = candidates(outside, commas) or candidates(sentence, commas)
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
        if len(gap) <= 60 and (_NEW_SUBJECT.fullmatch(gap) or _COMPOUND.fullmatch(gap) or not gap.strip(" ,;")):
            return AMBIGUOUS
    return _reading(numbers[-1], stated=False)


def marked_number(text: str) -> Reading:
    """The number after the last ``####`` that has one; words before it are none, two values are ambiguous."""
    text = fold(_unboxed(text))
    commas = writes_decimal_commas(text)
    for line in reversed(marked_lines(text)):
        prefix = _MARK_PREFIX.match(line)
        start = prefix.end() if prefix else 0
        rest = line[start:]
        numbers = quantities(rest, commas)
        words = word_quantities(rest) if not numbers or numbers[0].start > 12 else []
        if words and words[0].start == 0 and words[0].value is not None:
            return _reading(words[0])
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
