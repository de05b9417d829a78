"""Wrong solutions made from right ones, for the verifier to tell apart.

One number or one operation in one equation of the gold rationale is changed, and the consequence is carried through
every later equation and mention to the final answer. Only what can be recomputed exactly is touched: an equation
counts when its two sides are equal as exact fractions, so rounded lines ("100 / 3 = 33.33") are never rewritten.

What holds afterwards, by the kind of ``change``:

- ``operand``, ``operation``: every equation of the wrong rationale is true; it answers another question.
- ``slip``: exactly one equation is false, the one whose result was miscalculated; later ones are true again.
- ``answer``: no equation leads to the gold answer, so only its last mention was changed; at most one is false.
- the name of a mistake, where the question knows its likely ones (``SolvedQuestion``): every equation is true.
- ``label``: a yes/no or lettered answer was exchanged; equations stay as they were.

A text answer that holds nothing to change gets another row's answer of like kind (:func:`borrow`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mlx_rsgwm.data.boxes import Boxes, find_boxes
from mlx_rsgwm.data.equations import (
    OPERATIONS,
    Equation,
    Number,
    find_equations,
    scan_equations,
    start_of,
    value_of,
    value_of_parts,
)
from mlx_rsgwm.data.numbers import LITERAL, decimals_needed, parse_number, read_literal, unfrac, write_number
from mlx_rsgwm.data.questions import Question, SolvedQuestion, Wrong

_UNIT = r"(?:\s?/?\s?[A-Za-z][A-Za-z'’]*(?![A-Za-z'’])){0,4}"
# A number in running text: not part of a word, an index, a time or an ordinal.
_MENTION = re.compile(rf"(?<![\w.,/:^#_]){LITERAL}(?![0-9]|[.,:/][0-9]|(?:st|nd|rd|th)\b)")
_ADJACENT_BEFORE = re.compile(r"(?:[+*×÷/^]|[0-9)]\s*[-−–x]|[0-9][^=\n]{0,40}=)\s*[$€£]?\s?$")
_ADJACENT_AFTER = re.compile(rf"%?{_UNIT}\s*(?:[+*×÷/^=]|[-−–]\s*[0-9$(])|\s*[xX]\s*[0-9$(]")


MOST_LENDERS = 500  # rows looked at for an answer to borrow


def perturb(question: Question, rng: random.Random) -> Question | None:
    """The question with a wrong solution in place of the gold one, or None when nothing can be perturbed.

    ``rationale`` and ``gold`` are replaced, so ``.answer`` is the whole wrong text; the rest is kept. The wrong answer
    never equals the gold one in value, and the result depends only on the question and the state of ``rng``.
    """
    wrong = make_wrong(question, rng)
    return None if wrong is None else replace(question, rationale=wrong.rationale, gold=wrong.gold)


def borrow(question: Question, others: Sequence[Question], rng: random.Random) -> Question | None:
    """The question with another row's gold answer of like kind, or None where no other row has one.

    For text answers, which hold nothing that could be changed. Of like kind: the same task, both or neither a number,
    and of these the ten that are nearest in length, so that length does not give the verdict away. An answer that
    contains the right one, or is contained in it, may be right as well and is not taken. Answers of the gold's form
    (words, digits, mathematics) are preferred to others.
    """
    gold = _bare(question.gold)
    number = parse_number(question.gold) is not None
    if len(others) > MOST_LENDERS:
        others = rng.sample(others, MOST_LENDERS)
    known = {
        _bare(other.gold): other.gold
        for other in others
        if other.task == question.task and (parse_number(other.gold) is not None) == number
    }
    wrong = sorted(
        (text for text in known if text not in gold and gold not in text), key=lambda text: abs(len(text) - len(gold))
    )
    wrong = [text for text in wrong if _form(known[text]) == _form(question.gold)] or wrong
    if not wrong:
        return None
    taken = known[rng.choice(wrong[:10])]
    boxed = _put_boxed(question.rationale, question.gold, taken)
    if boxed is None:
        return None
    rationale = re.sub(rf"(?<!\w){re.escape(question.gold)}(?!\w)", lambda _: taken, boxed)
    return replace(question, rationale=rationale, gold=taken)


def _form(text: str) -> tuple[bool, bool, bool, bool]:
    """What a reader sees of an answer's form at a glance: mathematics, digits, words, several lines."""
    mathematics = re.search(r"[\\^_={}<>]", text) is not None
    words = not mathematics and re.search(r"[^\W\d_]", text) is not None
    return mathematics, any(sign.isdigit() for sign in text), words, "\n" in text


def _bare(text: str) -> str:
    """Letters and digits alone, folded: what two spellings of one answer share."""
    return "".join(sign for sign in text.casefold() if sign.isalnum()) or text.strip()


def make_wrong(question: Question, rng: random.Random) -> Wrong | None:
    """As :func:`perturb`, with the kind of change beside it."""
    if isinstance(question, SolvedQuestion) and question.mistakes:
        return rng.choice(question.mistakes)
    gold = question.gold.strip()
    if gold.lower() in ("yes", "no"):
        flipped = "no" if gold.lower() == "yes" else "yes"
        return Wrong(_exchange_label(question.rationale, gold, flipped), _cased(flipped, gold), "label")
    letters = re.findall(r"(?m)^\s*\(?([A-Z])[.):]\s", question.question)
    if re.fullmatch(r"[A-Z]", gold) and (gold in letters or not letters):
        others = [letter for letter in (letters or list("ABCDE")) if letter != gold]
        if not others:
            return None
        wrong = rng.choice(others)
        labelled = _put_boxed(question.rationale, gold, wrong)
        return None if labelled is None else Wrong(labelled, wrong, "label")
    value = parse_number(gold)
    if value is not None:
        computed = _perturb_computation(question.rationale, gold, value, rng)
        if computed is not None:
            return computed
    return _perturb_answer(question.rationale, gold, rng)


def _put_boxed(rationale: str, gold: str, wrong: str) -> str | None:
    """The rationale with ``wrong`` in place of all boxes that give ``gold``, by themselves or with those beside them.

    Unchanged where it has no box; None where it has some and none of them gives ``gold``, so that what it concludes
    cannot be changed.
    """
    groups = list(find_boxes(rationale))
    giving = [group for group in groups if _unwrapped(group.answer) == _unwrapped(gold)]
    spans = [(group.start, group.end) for group in giving]
    if groups and not spans:  # boxes apart from each other that give the gold one after the other
        together = ", ".join(dict.fromkeys(content for group in groups for content in group.contents))
        if _unwrapped(together) != _unwrapped(gold):
            return None
        return _put_parts(rationale, groups, wrong)
    for start, end in reversed(spans):
        rationale = rf"{rationale[:start]}\boxed{{{wrong}}}{rationale[end:]}"
    return rationale


def _put_parts(rationale: str, groups: Sequence[Boxes], wrong: str) -> str | None:
    """The parts of ``wrong`` in the boxes that gave one part of the gold each; None where they do not match up."""
    parts = wrong.split(", ")
    if len(parts) != len(groups):
        return None
    for group, part in reversed(list(zip(groups, parts, strict=True))):
        rationale = rf"{rationale[: group.start]}\boxed{{{part}}}{rationale[group.end :]}"
    return rationale


def _unwrapped(answer: str) -> str:
    r"""An answer without ``\text{…}``, brackets of a letter, units and spaces, a number by its value."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}", r" \1 ", answer)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}", r" \1 ", text).strip(" $.")
    text = re.sub(r"^\(\s*([A-Za-z])\s*\)$", r"\1", text)
    bare = re.sub(rf"^([-−]?\s?[$€£]?{LITERAL})\s*[^\W\d].*$", r"\1", text)
    number = parse_number(bare)
    return str(number) if number is not None else re.sub(r"[\s$]|\\[!,;: ]", "", text).casefold()


def _cased(text: str, like: str) -> str:
    return text.capitalize() if like[:1].isupper() else text


def _exchange_label(rationale: str, gold: str, flipped: str) -> str:
    """Flip the label where the last line states it ("So the answer is yes."), and nowhere else."""
    head, newline, last = rationale.rpartition("\n")
    pattern = rf"(?i)((?:answer\s+is|so|therefore|thus|hence|,|:|^)\s*)\b({re.escape(gold)})\b(?=\s*\W*$)"
    return head + newline + re.sub(pattern, lambda stated: stated[1] + _cased(flipped, stated[2]), last)


def _perturb_computation(rationale: str, gold: str, value: Fraction, rng: random.Random) -> Wrong | None:
    equations = find_equations(rationale)
    edits = [edit for index, equation in enumerate(equations) for edit in _edits(index, equation, rng)]
    # The kind is drawn before the place, so that the many possible numbers do not crowd out the operations.
    kinds = ["operand", "operation", "slip"]
    rng.shuffle(kinds)
    rng.shuffle(edits)
    edits.sort(key=lambda edit: kinds.index(edit.change))
    for most_decimals, factor in _PREFERENCES:
        for edit in edits:
            carried = _carry(rationale, equations, edit, most_decimals, factor)
            if carried is None:
                continue
            text, changed = carried
            new = changed.get(abs(value))
            if new is None or new == abs(value) or not _sound(text, len(equations), edit.change):
                continue
            return Wrong(text, write_number(-new if value < 0 else new, like=gold), edit.change)
    return None


# Whole results stay whole and within a factor of ten of the right ones, unless nothing else works.
_PREFERENCES = ((0, 10), (0, 10**9), (2, 10**9))


@dataclass(frozen=True)
class Edit:
    """One change to one equation: ``span`` is replaced by ``text``, with what that means for the value."""

    equation: int
    change: str
    start: int
    end: int
    text: str
    value: Fraction | str


def _edits(index: int, equation: Equation, rng: random.Random) -> Iterator[Edit]:
    for number in equation.numbers:
        for value in _nearby(number, rng)[:4]:
            yield Edit(index, "operand", number.start, number.end, write_number(value, like=number.text), value)
    # A percentage is a factor; adding it to something would be nonsense rather than a mistake.
    offered = "*/" if any(number.scale != 1 for number in equation.numbers) else "+-*/"
    for part in equation.parts:
        if not isinstance(part, Number) and part[2] in OPERATIONS:
            for sign in offered.replace(part[2], ""):
                yield Edit(index, "operation", part[0], part[1], sign, sign)
    right = equation.right
    for value in _nearby(right, rng)[:4]:
        yield Edit(index, "slip", right.start, right.end, write_number(value, like=right.text), value)


def _nearby(number: Number, rng: random.Random) -> list[Fraction]:
    """Plausible misreadings: a step or two in the last digit, ten off, two digits exchanged. Positive, shuffled."""
    digits = len(number.text.rpartition(".")[2]) if "." in number.text else 0
    unit = Fraction(1, 10**digits)
    values = [number.value + step * unit for step in (-10, -2, -1, 1, 2, 10)]
    plain = number.text.replace(",", "")
    if len(plain) == 2 and plain.isdigit() and plain[1] != "0":
        values.append(Fraction(plain[::-1]))
    values = sorted({value for value in values if value > 0 and value != number.value})
    rng.shuffle(values)
    return values


def _carry(
    text: str, equations: list[Equation], edit: Edit, most_decimals: int, factor: int
) -> tuple[str, dict[Fraction, Fraction]] | None:
    """Apply ``edit`` and recompute what follows.

    Returns the new text and the map from old to new values as it stands at the end, or None when a new result could
    not be written exactly in the style of the old one, or a changed value is used in a line that cannot be recomputed.
    """
    changed: dict[Fraction, Fraction] = {}
    pieces: list[tuple[int, int, str]] = []
    cursor = equations[edit.equation].right.end
    for index in range(edit.equation, len(equations)):
        equation = equations[index]
        if index > edit.equation:
            mentions = _replace_mentions(text, cursor, equation.start, changed)
            if mentions is None:
                return None
            pieces += mentions
        tokens: list[Fraction | str] = []
        for part in equation.parts:
            value = value_of(part)
            if index == edit.equation and start_of(part) == edit.start:
                pieces.append((edit.start, edit.end, edit.text))
                value = edit.value
                if isinstance(part, Number):
                    assert isinstance(value, Fraction)
                    value = value * part.scale
            elif isinstance(part, Number) and part.value in changed:
                new = changed[part.value]
                pieces.append((part.start, part.end, write_number(new, like=part.text)))
                value = new * part.scale
            tokens.append(value)
        right = equation.right
        result = value_of_parts(tokens)
        if result is not None:
            result = result / right.scale
        if index == edit.equation and edit.change == "slip":
            assert isinstance(edit.value, Fraction)
            result = edit.value
        if result is None or not _presentable(result, right.value, most_decimals, factor):
            return None
        if result == right.value:
            if index == edit.equation:
                return None
            # This value was just computed afresh: later uses mean this one.
            changed.pop(right.value, None)
        else:
            changed[right.value] = result
            pieces.append((right.start, right.end, write_number(result, like=right.text)))
            pieces += _announced(text, equation, result)
        cursor = right.end
    mentions = _replace_mentions(text, cursor, len(text), changed)
    if mentions is None:
        return None
    unique = {start: (end, new_text) for start, end, new_text in pieces + mentions}
    for start, (end, new_text) in sorted(unique.items(), reverse=True):
        text = text[:start] + new_text + text[end:]
    return text, changed


def _announced(text: str, equation: Equation, result: Fraction) -> list[tuple[int, int, str]]:
    """The result stated ahead of its computation ("They pay $126 because 200 - 74 = 126")."""
    start = text.rfind("\n", 0, equation.start) + 1
    reason = re.search(r"\b(?:because|since)\b", text[start : equation.start])
    if reason is None:
        return []
    right = equation.right
    mentions = list(_MENTION.finditer(text, start, start + reason.start()))
    same = [mention for mention in mentions if read_literal(mention[0]) == right.value]
    return [(mention.start(), mention.end(), write_number(result, like=mention[0])) for mention in same[-1:]]


def _presentable(value: Fraction, old: Fraction, most_decimals: int, factor: int) -> bool:
    """Positive, no more decimals than the value it replaces or ``most_decimals``, and within ``factor`` of it."""
    digits, before = decimals_needed(value), decimals_needed(old)
    if value <= 0 or digits is None or before is None:
        return False
    return digits <= max(before, most_decimals) and old <= value * factor and value <= max(old, Fraction(1)) * factor


def _replace_mentions(
    text: str, start: int, end: int, changed: dict[Fraction, Fraction]
) -> list[tuple[int, int, str]] | None:
    """Replacements for changed values in running text; None when one is part of a computation not understood."""
    pieces = []
    for mention in _MENTION.finditer(text, start, end):
        value = read_literal(mention[0])
        if value is None or value not in changed:
            continue
        line_end = text.find("\n", mention.end())
        after = text[mention.end() : line_end if line_end >= 0 else len(text)]
        before = text[text.rfind("\n", 0, mention.start()) + 1 : mention.start()]
        if _ADJACENT_BEFORE.search(before) or _ADJACENT_AFTER.match(after):
            return None
        pieces.append((mention.start(), mention.end(), write_number(changed[value], like=mention[0])))
    return pieces


def _sound(text: str, count: int, change: str) -> bool:
    """Re-read the result: as many equations as before, all true, or all but one after a slip."""
    holds = [held for _, held in scan_equations(text)]
    return sum(holds) == (count - 1 if change == "slip" else count)


def _perturb_answer(rationale: str, gold: str, rng: random.Random) -> Wrong | None:
    r"""Change one number of the answer itself: in the last ``\boxed``, else at its last mention in the last line."""
    shown = unfrac(gold)  # "\\frac12" holds no number 12
    numbers = [
        Number(mention.start(), mention.end(), mention[0], value)
        for mention in re.finditer(LITERAL, shown)
        if (value := read_literal(mention[0])) is not None
    ]
    if not numbers:
        return None
    number = rng.choice(numbers)
    options = _nearby(number, rng)
    if not options:
        return None
    wrong = shown[: number.start] + write_number(options[0], like=number.text) + shown[number.end :]
    old_value, new_value = parse_number(gold), parse_number(wrong)
    if old_value is not None and old_value == new_value:
        return None
    boxed = _put_boxed(rationale, gold, wrong)
    if boxed is None:
        return None
    if boxed != rationale:
        return Wrong(boxed, wrong, "answer")
    last = rationale.rfind("\n") + 1
    mentions = [
        mention
        for mention in _MENTION.finditer(rationale, last)
        if read_literal(mention[0]) == abs(old_value or Fraction(0))
    ]
    if mentions:
        start, end = mentions[-1].span()
        rationale = rationale[:start] + wrong.lstrip("-") + rationale[end:]
    return Wrong(rationale, wrong, "answer")
