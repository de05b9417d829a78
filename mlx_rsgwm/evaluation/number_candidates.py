"""Which numbers of a sentence can be its answer, and whether one of them stands there alone.

No answers are list labels, what something is out of, what is denied, and what an operation or a second value is left
open beside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mlx_rsgwm.data.equations import evaluate
from mlx_rsgwm.data.numbers import read_numeral
from mlx_rsgwm.data.quantities import Quantity, quantities, word_quantities
from mlx_rsgwm.evaluation.final_text import AMBIGUOUS, Reading

_AND = r"(?:and|or|und|oder|et|ou|y|e|o|и|или|eller|lub|veya|أو|या|to|bis|through|plus|versus|vs)"
TWO_VALUES = re.compile(
    rf"(?:\s*[^\W\d][\w'’-]*|\s*[%°²³]){{0,3}}(?:\s*(?:[,;&和或]|または|또는)\s*(?:(?:and|or)\s+)?|\s+\(or\s+|\s+{_AND}\b\.?\s+(?:(?:about|also|another)\s+)?)"
    r"(?:[a-zA-Z]\w{0,3}\s*=\s*)?[(\[$€£¥₹]*",
    re.IGNORECASE,
)
COMPOUND = re.compile(
    r"\s?(?:feet|foot|ft|yards?|hours?|hrs?|h|minutes?|mins?|m|weeks?|days?|years?|months?|pounds?|lbs?|kg|km|meters?|"
    r"degrees|'|°),?\s?",
    re.IGNORECASE,
)
OPERATOR = re.compile(
    r"\s*(?:[-+*×÷/]|[xX](?![a-z])|times|plus|minus|divided by|multiplied by)\s*[$€£]?\s*\(*\s*(?=[-0-9.])"
)
_TWO_OPERANDS = re.compile(
    r"(?<![-+*×÷/x.,0-9])\s?[$€£]?([0-9][0-9.,]*)\s*[kK]?(?:\s+[a-zA-Z]+){0,3}\s*([-–+*×x÷/])\s*[$€£]?([0-9][0-9.,]*)"
    r"(?:\s+[a-zA-Z]+){0,5}\s*=\s*[$€£]?\s*$"
)
RENAMED = re.compile(r"\b(?:(?:which|that) (?:is|equals|makes|means|rounds|comes)|i\.e\.|rounds? (?:up |down )?to)\b")
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


def as_reading(number: Quantity, stated: bool = True) -> Reading:
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
    value = evaluate([left, {"×": "*", "x": "*", "÷": "/", "–": "-"}.get(match[2], match[2]), other])
    return replace(right, value=right.plain) if value == right.plain else right


def alone(sentence: str, number: Quantity, others: Sequence[Quantity]) -> bool:
    """Whether a number stands alone: no second value is offered beside it, and no operation on it is left open."""
    if OPERATOR.match(sentence, number.end):
        return False
    for other in others[:1]:
        gap = sentence[number.end : other.start]
        if len(gap) <= 60 and (TWO_VALUES.fullmatch(gap) or COMPOUND.fullmatch(gap)):
            return other.value is not None and other.value == number.value
    return True
