"""The number that a text ends with where nothing marks or states its answer.

The last sentence that has a number decides, as far as it leaves no choice; offers, questions and remarks are
passed over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from mlx_rsgwm.data.quantities import Quantity, quantities, writes_decimal_commas
from mlx_rsgwm.evaluation.corrections import find_correction
from mlx_rsgwm.evaluation.final_text import AMBIGUOUS, LONGEST, MOST, NOTHING, Reading, sentences
from mlx_rsgwm.evaluation.languages import words
from mlx_rsgwm.evaluation.number_candidates import (
    COMPOUND,
    DIFFERENCE,
    OPERATOR,
    RENAMED,
    TWO_VALUES,
    alone,
    as_reading,
    candidates,
    rewritten,
    unscaled,
    with_rest,
)

_COMPARED = re.compile(
    r"(?:,?\s*(?:which|that|this|and that) (?:is|was|are)\s+|,\s*(?=[$€£]?[0-9]))?[$€£]?[0-9][\d.,]*\s+(?:[^\W\d]+\s+)?"
    r"(?:fewer|less|more|greater|higher|lower|older|younger|longer|shorter|bigger|smaller)\b[^.;,=\d]{0,30}?"
    r"\bthan\s+(?:[^\W\d]+\s+)?[$€£]?[0-9][\d.,]*[^\d=]*$",
    re.IGNORECASE,
)
_BESIDE = re.compile(r"(?:\s[^\W\d]+){0,3}(?:\s\(|,\s|,?\s(?:which|that|this)\s(?:is|was|are)\s)[$€£]?", re.IGNORECASE)
_EQUALS = re.compile(
    r"(?:=|≈|\bequals\b|\bis equal to\b)\s*\(?(?:about|approximately|roughly)?\s*[$€£¥₹]?\s*(?=[-+–]?[$€£¥₹]?\.?[0-9])"
)
# The left side of an equation that is still to be solved: "2x", "x^2", "|x|".
_UNSOLVED = re.compile(r"(?:[0-9][xyznpq]|\b[a-z]\s?(?:\^\s?\{?[2-9]\}?|²)|\|\s?[a-z]\s?\|)[\s$]*$")
_CHECK = re.compile(
    r"\W*(?:(?:now|to|so|let['’]?s|let me|let us|we can|i can|i will|i['’]ll)\s)*(?:double[- ]?)?"
    r"(?:verify|check|checking|verification)\b",
    re.IGNORECASE,
)
_MODAL = re.compile(r"\b(?:could|might|may)\b(?![^=]*=)", re.IGNORECASE)
_RELATIVE_TIME = re.compile(r"\s+[a-z]+\s+(?:later|earlier|ago)\b", re.IGNORECASE)
_GIVEN = re.compile(r"\b(?:the|these|those|all|her|his|their|its|both)\s+[$€£]?$", re.IGNORECASE)
_REASON = re.compile(
    r"[,;]?\s\(?(?:because|since|given that|assuming|as long as|if|by [^\W\d]+ing)\b|"
    r"\smore(?:\s[^\W\d]+){0,3}\sto\b|,?\s(?:which|that)\s(?:is|was|are)\s[$€£]?[0-9][\d.,]*\s(?:[^\W\d]+\s)?"
    r"(?:more|fewer|less|higher|lower|older|younger|longer|shorter|bigger|smaller)\b",
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
_YEAR = re.compile(r"\b(?:by|in|since|until)\s(?:1[5-9]|20)[0-9]{2}$", re.IGNORECASE)
_REASON_FIRST = re.compile(
    r"\W*(?:since|because|as|given that|if|when|although|while|with|after|out of|at|in|on|for|by)\b[^,]*,\s",
    re.IGNORECASE,
)
_COPULA = rf"(?:\b(?:{words('copula')}|are|were|be|had|sind|sont|son|sono|são|zijn)|['’]s)\b"
_IS = re.compile(_COPULA, re.IGNORECASE)
_IS_BEFORE = re.compile(rf"{_COPULA}(?:\s[^\W\d]+)?\s?[$€£]?$", re.IGNORECASE)
_CONCLUSION = re.compile(
    rf"\b(?:{words('conclusion', spaced=True)}|but)\b|{words('conclusion', spaced=False)}|[=:→]|\bi\.e\.", re.IGNORECASE
)
_ALL = re.compile(r"(?:\s[^\W\d]+)?\s(?:in all|in total|altogether|overall|left)\b", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:might be|may be|could be|[Mm]aybe|[Pp]erhaps|[Pp]ossibly)\b(?![^=]*=)")
_NAMED_LINE = re.compile(r"\W*([^\W\d][\w'’ ]{0,40}?)[\s*]*[-–:=)|][\s*]*[$€£]?-?[0-9][\d.,]*\W*(?:[^\W\d]+\W*){0,2}$")
_NEXT_LABEL = re.compile(r"(?:\s[^\W\d]+)?\W+([^\W\d][\w ]{0,30}?)\s?[:=]\s?[$€£]?")
_TOTAL = re.compile(r"total|sum|answer|result|left|profit|cost|altogether|ans|gesamt|suma", re.IGNORECASE)
_PARENTHESIS = re.compile(r"\((?!or\b)[^()\n]{0,200}\)")
_REASON_ASIDE = re.compile(r"\((?:since|because|as|given that)\b[^()\n]{0,200}\)", re.IGNORECASE)
# "= 7, but with his extra 2 it is 9": the equation is not what the sentence comes to.
_QUALIFIED = re.compile(r"[,;]\s(?:but|although|though|however|yet|except that)\b", re.IGNORECASE)


def last_number(text: str, decimal_commas: bool | None = None, confirm: bool = True) -> Reading:
    """The number that a text ends with, as far as its last sentence with one leaves no choice.

    ``confirm``: a number in a check, or in what only could be, has to be what the text came to before.
    """
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
        if confirm and reading.value is not None:
            checked = next((before for before in range(1, index + 1) if _CHECK.match(pieces[before])), None)
            if checked is None and index and _MODAL.search(sentence) and re.search(r"[0-9]", "".join(pieces[:index])):
                checked = index
            if checked is not None and last_number("\n".join(pieces[:checked]), commas, False).value != reading.value:
                return AMBIGUOUS
        if reading is not NOTHING:
            return AMBIGUOUS if _hedged(sentence, pieces[index - 1] if index else "") else reading
    for sentence in (piece[-LONGEST:] for piece in pieces[: -MOST - 1 : -1]):
        in_words = [
            number
            for number in candidates(sentence, commas, in_words=True)
            if number.value != 1  # "this one"
        ]
        if in_words and not re.search(r"[0-9]", sentence):
            return as_reading(in_words[-1], stated=False) if len(in_words) == 1 else NOTHING
    return NOTHING


def _hedged(sentence: str, before: str) -> bool:
    """Whether two sentences in a row each offer a number as a possibility."""
    return all(_HEDGE.search(part) and re.search(r"[0-9]", part) for part in (sentence, before))


def _concluded(sentence: str, line_before: str, commas: bool) -> Reading:
    """What one sentence, not marked as an answer, comes to."""
    variable = re.search(r"(?:^|[\s=])([-–]?[$€£]?[0-9][0-9.,/]*)\s*=\s*[A-Za-z]\W*$", sentence)
    if variable is not None:  # "160 = Y."
        return as_reading(quantities(variable[1], commas)[0], stated=False)
    if _listed(sentence, line_before):
        return AMBIGUOUS
    without_reason = _REASON_ASIDE.sub("", sentence)
    sentence = without_reason if quantities(without_reason, commas) else sentence
    computed = _after_equals(sentence, commas)
    if computed is not None:
        return computed
    numbers = _offered(sentence, commas)
    if numbers is None:
        return AMBIGUOUS
    if not numbers:
        return NOTHING
    if len(numbers) > 1 and _undecided(sentence, numbers):
        return AMBIGUOUS
    correction = find_correction(sentence[numbers[-1].end :], as_reading(numbers[-1]).value)
    if correction is not None:
        instead = quantities(correction.text, commas)
        return as_reading(instead[-1], stated=False) if len(instead) == 1 else AMBIGUOUS
    return as_reading(numbers[-1], stated=False)


def _after_equals(sentence: str, commas: bool) -> Reading | None:
    """What stands right of the last equals sign; None where nothing there settles it."""
    equals = list(_EQUALS.finditer(sentence))
    right = [number for number in quantities(sentence, commas) if equals and number.end > equals[-1].end()]
    left = [number for number in quantities(sentence, commas) if right and number.end <= equals[-1].start()]
    if right and _UNSOLVED.search(sentence[: equals[-1].start()]):
        return AMBIGUOUS
    operands = left
    left = [number for number in left if not re.search(r"[-+*×÷/]\s?[$€£]?$", sentence[: number.start])]
    if left and left[-1].value != right[0].value and TWO_VALUES.fullmatch(sentence[left[-1].end : right[0].start]):
        return AMBIGUOUS  # "x = 5 or x = -5"
    if right and len(equals) > 1 and _two_results(sentence, equals[-2].end(), right[0], operands):
        return AMBIGUOUS
    if right and not OPERATOR.match(sentence, right[0].end) and find_correction(sentence[right[0].end :]) is None:
        qualified = _QUALIFIED.search(sentence, right[0].end)
        later = [number for number in right[1:] if qualified and number.start > qualified.end()]
        if not alone(sentence, right[0], right[1:]) or (later and later[-1].value != right[0].value):
            return AMBIGUOUS
        return as_reading(_renamed(sentence, right), stated=False)
    return None


def _offered(sentence: str, commas: bool) -> list[Quantity] | None:
    """The numbers that may be the answer, without reasons, times and what was given; None: only things compared."""
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
            return None
    numbers = _without_differences(sentence, numbers)
    reason = _REASON.search(sentence, numbers[0].end) if numbers else None
    if reason is not None:
        numbers = [number for number in numbers if number.end <= reason.start()] or numbers
    numbers = [number for number in numbers if not _RELATIVE_TIME.match(sentence, number.end)]
    likelier = [
        number
        for number in numbers
        if not _GIVEN.search(sentence[max(0, number.start - 16) : number.start])
        and not _YEAR.search(sentence[max(0, number.start - 8) : number.end])
    ]
    return likelier or numbers


def _undecided(sentence: str, numbers: Sequence[Quantity]) -> bool:
    """Whether the last two of several numbers stand for the answer with the same right."""
    gap = sentence[numbers[-2].end : numbers[-1].start]
    if with_rest(sentence, numbers[-2], numbers[-1]):
        return True
    if len(gap) <= 60 and (_NEW_SUBJECT.fullmatch(gap) or COMPOUND.fullmatch(gap) or not gap.strip(" ,;|")):
        return True
    return numbers[-2].value not in (None, numbers[-1].value) and not _follows(sentence, numbers)


def _without_differences(sentence: str, numbers: Sequence[Quantity]) -> list[Quantity]:
    """The numbers but those of "5 more than Tom's 7": both go where a value stands beside them, else both have none."""
    for first, second in pairwise(numbers):
        match = DIFFERENCE.match(sentence, first.end)
        if match is None or match.end() < second.start:
            continue
        before = [number for number in numbers if number.end <= first.start]
        after = [number for number in numbers if number.start >= second.end]
        if after:
            return after
        if before and _BESIDE.fullmatch(sentence[before[-1].end : first.start]):
            return before
        return [replace(first, value=None)]
    return list(numbers)


def _listed(line: str, line_before: str) -> bool:
    """Whether two lines give a value each ("Ann - 2" under "Ben - 3"), and neither is said to be the sum."""
    named, earlier = _NAMED_LINE.fullmatch(line), _NAMED_LINE.fullmatch(line_before)
    if named is None or earlier is None or named[1].casefold() == earlier[1].casefold():
        return False
    return not _TOTAL.search(named[1]) or bool(_TOTAL.search(earlier[1]))


def _two_results(sentence: str, position: int, result: Quantity, left: Sequence[Quantity]) -> bool:
    """Whether a sentence has two equations side by side ("2 * 4 = 8 cups and 3 * 5 = 15 plates")."""
    operands = [number for number in left if number.start >= position]
    if len(operands) < 2 or operands[0].value in (result.value, *(number.value for number in operands[1:])):
        return False
    gap = sentence[operands[0].end : operands[1].start]
    return bool(re.search(r"\b(?:and|while)\b|;", gap)) and not re.search(r"\b(?:so|then|thus|total|altogether)\b", gap)


def _follows(sentence: str, numbers: Sequence[Quantity]) -> bool:
    """Whether the last of several numbers is said to come of what stands before it."""
    given, last = numbers[-2], numbers[-1]
    gap, before = sentence[given.end : last.start], sentence[: given.start]
    label = _NEXT_LABEL.fullmatch(gap)
    if label is not None and re.search(r"[:=]\s?[$€£]?$", before):  # "Boys: 14, Girls: 16"
        return _TOTAL.search(label[1]) is not None
    since_first = re.sub("[:=]", " ", sentence[numbers[0].end : last.start])
    if _CONCLUSION.search(gap) or _CONCLUSION.search(since_first) or _ALL.match(sentence, last.end):
        return True
    return bool(_IS.search(gap)) and not _IS_BEFORE.search(before)


def _renamed(sentence: str, right: Sequence[Quantity]) -> Quantity:
    """What the right side of an equation is called afterwards ("= 240 minutes, which is 4 hours"), else itself."""
    if len(right) > 1 and RENAMED.search(sentence[right[0].end : right[1].start]):
        return right[1] if alone(sentence, right[1], right[2:]) else replace(right[1], value=None)
    result = rewritten(sentence, right[0], right[1:])
    return unscaled(sentence, right[0]) if result is right[0] else result
