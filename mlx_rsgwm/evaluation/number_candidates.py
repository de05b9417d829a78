"""Which numbers of a sentence can be its answer, and whether one of them stands there alone.

No answers are list labels, what something is out of, what is denied, and what an operation or a second value is left
open beside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from mlx_rsgwm.data.equations import value_of_parts
from mlx_rsgwm.data.numbers import read_numeral
from mlx_rsgwm.data.quantities import Quantity, quantities, word_quantities
from mlx_rsgwm.evaluation.final_text import AMBIGUOUS, Reading
from mlx_rsgwm.evaluation.languages import words

_AND = words("joins", spaced=True)
_FEW_WORDS = r"(?:(?!(?:not|that|this|it|so|rather|then|he|she|they)\b)[^\W\d]+\s+){0,2}"
TWO_VALUES = re.compile(
    rf"(?:\s*[^\W\d][\w'’-]*|\s*[%°²³]){{0,3}}(?:\s*(?:[,;&]|{words('joins', spaced=False)})\s*(?:(?:and|or)\s+)?|"
    rf"\s+\(or\s+|\s+(?:to|through|plus|versus|vs|bis)\b\.?\s+|\s+(?:{_AND})\b\s+{_FEW_WORDS})"
    r"(?:[a-zA-Z]\w{0,3}\s*=\s*)?[(\[$€£¥₹]*",
    re.IGNORECASE,
)
COMPOUND = re.compile(
    r"\s?(?:feet|foot|ft|yards?|hours?|hrs?|h|minutes?|mins?|m|weeks?|days?|years?|months?|pounds?|lbs?|kg|km|meters?|"
    r"degrees|'|°|,?\s?(?:r|remainder|reste?|resto|остаток|余数?|餘|剩)),?\s?",
    re.IGNORECASE,
)
# What a number before or after it makes of it: "twice 8", "half of 20", "8的两倍".
_MULTIPLIED_BEFORE = re.compile(
    r"\b(?:twice|thrice|double|triple|treble|quadruple|half|"
    r"(?:two|three|four|five|six|seven|eight|nine|ten|twelve|many|several) times|"
    r"(?:half|double|triple|twice|thirds?|quarters?|fifths?|tenths?|square|(?:square |cube )?root|cube|multiple)\sof|"
    r"(?:doppelte|dreifache|hälfte|viertel|drittel)\w*\svon|(?:le\s)?(?:double|triple|moitié|tiers|quart)\sde|"
    r"(?:doble|triple|mitad|tercio|cuarto)\sde|(?:doppio|triplo|metà|terzo)\sdi|(?:dobro|triplo|metade|terço)\sde|"
    r"(?:половин\w+|треть|четверть)\sот|(?:вдвое|втрое)(?:\s(?:больше|меньше))?)\s"
    r"(?:as (?:much|many|long|old|tall|far|big|high|large|fast) as\s)?(?:the\s|[^\W\d]+['’]s\s)?[$€£]?$",
    re.IGNORECASE,
)
_MULTIPLIED_AFTER = re.compile(r"\s?的(?:[一二两兩三四五六七八九十0-9]*倍|[一二三四五六七八九十]分之|一半|平方|立方)")
# "5 more than Tom's 7": two numbers that only their sum, difference or product would answer.
DIFFERENCE = re.compile(
    r"\s?(?:%|percent)?(?:\s[^\W\d]+){0,3}?(?:\s(?:(?<!rather )(?<!other )than|above|below|on top of|in addition to|"
    r"mehr als|weniger als|de (?:plus|moins) que|más que|menos que|as (?:many|much|long|old|tall|far|big|high) as)\s"
    r"(?:[^\W\d][\w'’]*\s){0,4}?|\s(?:больше|меньше),? чем\s|\stimes\s(?:[^\W\d]+['’]s\s|the\s))"
    r"[$€£]?(?=\.?[0-9])",
    re.IGNORECASE,
)
_WITH_REST = re.compile(
    r"(?:\s[^\W\d]+){0,4},?\s(?:with|and there (?:is|are)|and)\s(?:a remainder of\s|still\s)?[$€£]?", re.IGNORECASE
)
_LEAVING_REST = re.compile(r"(?:\s[^\W\d]+){0,4},?\sleaving\s[$€£]?", re.IGNORECASE)
_REST_AFTER = re.compile(
    r"(?:\s[^\W\d]+){0,2}\s(?:left[- ]?over|over|remaining|left behind|to spare|extra|left)\b", re.IGNORECASE
)
_OVER_AFTER = re.compile(r"(?:\s[^\W\d]+){0,2}\s(?:left[- ]?over|over)\b", re.IGNORECASE)
OPERATOR = re.compile(
    r"\s*(?:[-+*×÷/]|[xX](?![a-z])|times|plus|minus|divided by|multiplied by|by|over)\s*[$€£]?\s*\(*\s*(?=[-0-9.])"
)
_TWO_OPERANDS = re.compile(
    r"(?<![-+*×÷/x.,0-9])\s?[$€£]?([0-9][0-9.,]*)\s*[kK]?(?:\s+[a-zA-Z]+){0,3}\s*([-–+*×x÷/])\s*[$€£]?([0-9][0-9.,]*)"
    r"(?:\s+[a-zA-Z]+){0,5}\s*=\s*[$€£]?\s*$"
)
RENAMED = re.compile(r"\b(?:(?:which|that) (?:is|equals|makes|means|rounds|comes)|i\.e\.|rounds? (?:up |down )?to)\b")
_DENIED_BEFORE = re.compile(
    rf"(?:\b(?:{words('denial', spaced=True)})|≠|{words('denial', spaced=False)})"
    r"(?:\s+(?:be|equal to|equal|just|only|simply|the|really|exactly))*\s*[$€£]?$"
    r"|\b(?:(?:not possible|impossible|not true|not the case)\s(?:that|for)|"
    r"(?:do|does|did|would)(?:n['’]t| not)\s(?:think|believe))\b[^.,;]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"(?:\s+[^\W\d]+)?\s*(?:(?:is|was|are|were|would be|seems|looks)\s+(?:not|wrong|incorrect|false|too|impossible)|"
    r"(?:is|was|are|were|ca|could|wo)n['’]t|cannot|can not)\b|\s*\?\s*(?:no|nope|wrong|nein|non)\b"
    rf"|\s?(?:{words('denial_after')})",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"(?:\b(?:fig(?:ure)?|table|step|problem|question|exercise|chapter|section|page|room|option|case|method|"
    r"equation|eq|line|version|part|approach|example|q)\.?|#)\s*\(?$",
    re.IGNORECASE,
)
_OUT_OF = re.compile(r"\bout\s+of\s+(?:the\s+)?(?:total\s+)?(?:of\s+)?[$€£]?$", re.IGNORECASE)
_BASELINE_BEFORE = re.compile(r"\b(?:up from|down from|compared (?:to|with)|as opposed to)\s+[$€£]?$", re.IGNORECASE)
_RATE_BEFORE = re.compile(r"(?:[^\W\d]/|\bper\s|\bfor every\s|\bout of every\s)$", re.IGNORECASE)  # "6.8 L/100 km"
_BOUND_BEFORE = re.compile(
    rf"(?:\b(?:{words('bound', spaced=True)})|{words('bound', spaced=False)}|(?<![-=<])[<>]=?|[≤≥]|"
    r"\\(?:leq?|geq?|lt|gt)(?:slant)?\b)\s*(?:about\s)?[$€£]?\s?$",
    re.IGNORECASE,
)
_BOUND_AFTER = re.compile(
    r"\s?(?:[<>](?!=?[<>])|[≤≥]|\\(?:leq?|geq?|lt|gt)(?:slant)?\b|\+(?=[\s.,]|$)(?!\s+\(?[-$€£]?\s?\.?[0-9]))|"
    r"(?:\s[^\W\d]+)?\s(?:or|and) (?:more|less|fewer|higher|lower|greater|above|below|over|under|up)\b|"
    r"(?:\s[^\W\d]+)?\s(?:at (?:most|least)|tops|max(?:imum)?|minimum)\b",
    re.IGNORECASE,
)
_NEEDED = re.compile(r"\b(?:needs?|must|should|has to|have to|requires?|takes?)\b", re.IGNORECASE)
_RANGE_FROM = re.compile(rf"\b(?:{words('range_from')})\s+[$€£]?$", re.IGNORECASE)
_RANGE_TO = re.compile(rf"(?:\s?[%°]|\s[^\W\d]+)?\s+(?:{words('range_to')})\s+[$€£]?", re.IGNORECASE)
_REWRITTEN = re.compile(
    r"(?:\.{3})?[^.;\d]{0,30}?(?:→|->|⇒|=>|≈|\\(?:to|rightarrow|Rightarrow|implies)\b|\bround\w*\s(?:it\s|this\s)?(?:(?:up|down|off)\s)?"
    r"to\s(?:about\s|approximately\s)?|\bwhich is (?:about|approximately|roughly|around)\s)\s*[$€£]?",
    re.IGNORECASE,
)
_DIGITS_AFTER = re.compile(r"\s(?:decimals?|significant|digits?|places?|d\.?p\.?|s\.?f\.?)\b", re.IGNORECASE)
_LIST_LABEL = re.compile(r"(?:^|\n)[ \t*]*(?:step\s+)?$", re.IGNORECASE)


def candidates(text: str, decimal_commas: bool, in_words: bool = False) -> list[Quantity]:
    """Quantities that can be answers: no list labels, no totals that something is out of, nothing that is denied."""
    numbers = quantities(text, decimal_commas)
    if in_words and not numbers:
        numbers = word_quantities(text)
    numbers = [replace(number, value=None) if is_multiplied(text, number) else number for number in numbers]
    standing: list[Quantity] = []
    denied: set[Fraction | None] = set()
    for number in numbers:
        before, after = text[max(0, number.start - 40) : number.start], text[number.end : number.end + 40]
        if (
            _OUT_OF.search(before)
            or _LABELLED.search(before)
            or _RATE_BEFORE.search(before)
            or _BASELINE_BEFORE.search(before)
        ):
            continue
        if _LIST_LABEL.search(before[-16:]) and re.match(r"[.):](?:\s|\*)", after) and after[1:].strip():
            continue
        if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after):
            denied.add(number.value)
        else:
            standing.append(number)
    standing = [number for number in standing if number.value is None or number.value not in denied]
    bounds = _bounds(text, standing)
    exact = [number for number in standing if number not in bounds]
    return exact or [replace(number, value=None) for number in standing]


def _bounds(text: str, numbers: Sequence[Quantity]) -> list[Quantity]:
    """The numbers that say how far a value may go ("more than 4", "from 3 to 5"): none of them is the value."""
    bounds = []
    for index, number in enumerate(numbers):
        before = text[max(0, number.start - 40) : number.start]
        bound = _BOUND_BEFORE.search(before)
        if bound and not (
            _NEEDED.search(before) and re.search(r"at least|minimum|mindestens", bound[0], re.IGNORECASE)
        ):
            bounds.append(number)
        if _BOUND_AFTER.match(text, number.end):
            bounds.append(number)
        if index and _RANGE_TO.fullmatch(text[numbers[index - 1].end : number.start]):
            first = numbers[index - 1]
            between = text[first.end : number.start].strip(" $€£")
            if between in ("to", "bis") or _RANGE_FROM.search(text[max(0, first.start - 12) : first.start]):
                bounds += [first, number]
    return bounds


def rewritten(sentence: str, number: Quantity, others: Sequence[Quantity]) -> Quantity:
    """What a number becomes in the same sentence: where it is rounded to, or what an arrow leads to."""
    for other in others:
        if number.fraction and "≈" in sentence[number.end : other.start]:
            break  # "5/3 ≈ 1.67" is exactly 5/3
        if _REWRITTEN.fullmatch(sentence[number.end : other.start]) and not _DIGITS_AFTER.match(sentence, other.end):
            number = other
        else:
            break
    return number


def as_reading(number: Quantity, stated: bool = True) -> Reading:
    """A quantity as the answer that was read; ambiguous where it has no exact value."""
    if number.value is None:
        return AMBIGUOUS
    return Reading(number.text, stated=stated, end=number.end)


def unscaled(sentence: str, right: Quantity) -> Quantity:
    """The right side of an equation in the unit that its left side is in: "32 - 28 = $4 million" comes to 4."""
    if right.value is None or right.plain is None:
        return right
    match = _TWO_OPERANDS.search(sentence[max(0, right.start - 80) : right.start])
    if match is None:
        return right
    left, other = read_numeral(match[1]), read_numeral(match[3])
    if left is None or other is None:
        return right
    value = value_of_parts([left, {"×": "*", "x": "*", "÷": "/", "–": "-"}.get(match[2], match[2]), other])
    return replace(right, value=right.plain) if value == right.plain else right


def is_multiplied(text: str, number: Quantity) -> bool:
    """Whether a word beside a number makes a multiple or a part of it ("twice 8"), so that it is not the value."""
    before = text[max(0, number.start - 48) : number.start]
    return bool(_MULTIPLIED_BEFORE.search(before) or _MULTIPLIED_AFTER.match(text, number.end))


def with_rest(sentence: str, number: Quantity, other: Quantity) -> bool:
    """Whether the second number is what a division leaves over ("6 candies with 2 left over")."""
    gap = sentence[number.end : other.start]
    return bool(
        (_WITH_REST.fullmatch(gap) and _REST_AFTER.match(sentence, other.end))
        or (_LEAVING_REST.fullmatch(gap) and _OVER_AFTER.match(sentence, other.end))
    )


def alone(sentence: str, number: Quantity, others: Sequence[Quantity]) -> bool:
    """Whether a number stands alone: no second value is offered beside it, and no operation on it is left open."""
    if OPERATOR.match(sentence, number.end):
        return False
    for other in others[:1]:
        gap = sentence[number.end : other.start]
        if gap.strip() in (",", ";") and OPERATOR.match(sentence, other.end):
            continue  # "20; 4 * 5 = 20"
        if "," not in gap and with_rest(sentence, number, other):
            return False  # with a comma the rest is an aside
        if len(gap) <= 60 and (TWO_VALUES.fullmatch(gap) or COMPOUND.fullmatch(gap)):
            return other.value is not None and other.value == number.value
    return True
