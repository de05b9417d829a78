"""Wrong solutions made from right ones, for the verifier to tell apart.

One number or one operation in one equation of the gold rationale is changed, and the consequence is carried through
every later equation and mention to the final answer. Only what can be recomputed exactly is touched: an equation
counts when its two sides are equal as exact fractions, so rounded lines ("100 / 3 = 33.33") are never rewritten.

What holds afterwards, by the kind of ``change``:

- ``operand``, ``operation``: every equation of the wrong rationale is true; it answers another question.
- ``slip``: exactly one equation is false, the one whose result was miscalculated; later ones are true again.
- ``answer``: no equation leads to the gold answer, so only its last mention was changed; at most one is false.
- ``label``: a yes/no or lettered answer was exchanged; equations stay as they were.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from mlx_rsgwm.data.numbers import LITERAL, decimals_needed, parse_number, read_literal, unfrac, write_number
from mlx_rsgwm.data.sources import Question, last_boxed

_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
_SIGNS = {"−": "-", "–": "-", "×": "*", "x": "*", "X": "*", "÷": "/", "\\times": "*", "\\cdot": "*", "\\div": "/"}
_SIGNS |= {"of": "*"} | {sign: sign for sign in _OPERATIONS}

_TOKEN = re.compile(
    rf"(?P<number>{LITERAL})(?P<percent>%?)|(?P<op>\\times|\\cdot|\\div|[+\-−–*×÷/])|(?P<word>[A-Za-z][A-Za-z'’]*)"
    r"|(?P<paren>[()])|(?P<equals>=)|(?P<money>\\?[$€£])|(?P<space>[ \t\u00a0]+)|(?P<other>.)"
)
_UNIT_WORDS = 4  # "7 trips per day * 2": words allowed between a number and the next operator
_UNIT = r"(?:\s?/?\s?[A-Za-z][A-Za-z'’]*(?![A-Za-z'’])){0,4}"
# A number in running text: not part of a word, an index, a time or an ordinal.
_MENTION = re.compile(rf"(?<![\w.,/:^#_]){LITERAL}(?![0-9]|[.,:/][0-9]|(?:st|nd|rd|th)\b)")
_ADJACENT_BEFORE = re.compile(r"(?:[+*×÷/^]|[0-9)]\s*[-−–x]|[0-9][^=\n]{0,40}=)\s*[$€£]?\s?$")
_ADJACENT_AFTER = re.compile(rf"%?{_UNIT}\s*(?:[+*×÷/^=]|[-−–]\s*[0-9$(])|\s*[xX]\s*[0-9$(]")


@dataclass(frozen=True)
class Number:
    """A literal and where it stands in the text; ``scale`` is 1/100 for a percentage that is used as one."""

    start: int
    end: int
    text: str
    value: Fraction
    scale: Fraction = Fraction(1)


Part = Number | tuple[int, int, str]


@dataclass(frozen=True)
class Equation:
    """``left = right`` in a text. ``parts`` are numbers, operators (start, end, sign) and parentheses, in order."""

    start: int
    parts: tuple[Part, ...]
    right: Number

    @property
    def numbers(self) -> list[Number]:
        return [part for part in self.parts if isinstance(part, Number)]


@dataclass(frozen=True)
class Wrong:
    """A wrong solution: its rationale, its final answer, and what was changed (see the module's text)."""

    rationale: str
    gold: str
    change: str


def find_equations(text: str) -> list[Equation]:
    """Every equation in ``text`` that is a computation on numbers and exactly true, in order of appearance."""
    return [equation for equation, holds in scan_equations(text) if holds]


def scan_equations(text: str) -> Iterator[tuple[Equation, bool]]:
    """Every equation that is a computation on numbers, with whether its two sides are exactly equal."""
    offset = 0
    for line in text.split("\n"):
        tokens = _tokens(line, offset)
        for index, token in enumerate(tokens):
            right = _right_side(tokens, index + 1) if token.kind == "equals" else None
            parts = _left_side(tokens, index - 1) if right is not None else None
            if right is None or parts is None:
                continue
            left = evaluate([_value(part) for part in parts])
            if left is not None and right.scale != 1 and left == right.value:
                right = replace(right, scale=Fraction(1))  # "5 / 20 * 100 = 25%": the sign is only a unit
            yield Equation(_start(parts[0]), parts, right), left == right.value * right.scale
        offset += len(line) + 1


@dataclass(frozen=True)
class Token:
    kind: str
    start: int
    end: int
    text: str
    percent: bool = False


def _tokens(line: str, offset: int) -> list[Token]:
    """The tokens of a line without spaces. Operators that lead to no number are words: "$12/hour", "per-day"."""
    found = [
        Token(str(match.lastgroup if match.lastgroup != "percent" else "number"), match.start(), match.end(), match[0])
        for match in _TOKEN.finditer(line)
        if match["space"] is None
    ]
    tokens = []
    for index, token in enumerate(found):
        if token.kind == "number":
            percent = token.text.endswith("%")
            token = replace(token, text=token.text.rstrip("%"), end=token.end - percent, percent=percent)
        leads = [following.kind for following in found[index + 1 : index + 4] if following.kind != "money"]
        to_number = bool(leads) and (leads[0] == "number" or (leads[0] == "paren" and found[index + 1].text != ")"))
        if token.kind == "op" and not to_number:
            token = replace(token, kind="word" if leads and leads[0] == "word" else "other")
        elif (
            token.kind == "word"
            and to_number
            and (token.text in ("x", "X") or (token.text == "of" and index > 0 and found[index - 1].text.endswith("%")))
        ):
            token = replace(token, kind="op")
        tokens.append(replace(token, start=token.start + offset, end=token.end + offset))
    return tokens


def _number_at(token: Token) -> Number | None:
    value = read_literal(token.text)
    scale = Fraction(1, 100) if token.percent else Fraction(1)
    return None if value is None else Number(token.start, token.end, token.text, value, scale)


def _right_side(tokens: list[Token], index: int) -> Number | None:
    """The number after ``=``, unless it only begins another computation ("= 8 - 2")."""
    if index < len(tokens) and tokens[index].kind == "money":
        index += 1
    if index >= len(tokens) or tokens[index].kind != "number":
        return None
    rest = [token.kind for token in tokens[index + 1 : index + 2 + _UNIT_WORDS]]
    after = next((kind for kind in rest if kind != "word"), "")
    glued = index + 1 < len(tokens) and tokens[index + 1].start == tokens[index].end
    if after == "op" or (glued and tokens[index + 1].text in ("^", "\\", ":", "_")):
        return None
    return _number_at(tokens[index])


def _left_side(tokens: list[Token], index: int) -> tuple[Part, ...] | None:
    """The longest computation that ends at ``index``, read backwards; None when it has no operator."""
    parts: list[Part] = []
    words, need_number = 0, True
    while index >= 0:
        token = tokens[index]
        if token.kind == "word" and need_number:
            words += 1
            if words > _UNIT_WORDS:
                break
        elif token.kind == "number" and need_number:
            number = _number_at(token)
            if number is None:
                return None
            parts.append(number)
            words, need_number = 0, False
        elif token.kind == "op" and not need_number:
            parts.append((token.start, token.end, _SIGNS[token.text]))
            need_number = True
        elif token.kind == "paren" and (token.text == ")") == need_number:
            parts.append((token.start, token.end, token.text))
        elif token.kind != "money" or need_number:
            break
        index -= 1
    while parts and not isinstance(parts[-1], Number) and (parts[-1][2] != "(" or _unbalanced(parts)):
        parts.pop()
    # "x^2 + 7 = 9", "3.2.1 + 4 = …": the first number is a piece of something else.
    glued = parts and index >= 0 and tokens[index].end == _start(parts[-1]) and tokens[index].text not in "([{$,;:\"'“*"
    if not parts or glued or not any(isinstance(part, tuple) and part[2] in _OPERATIONS for part in parts):
        return None
    return tuple(reversed(parts))


def _unbalanced(parts: list[Part]) -> bool:
    signs = [part[2] for part in parts if isinstance(part, tuple)]
    return signs.count("(") > signs.count(")")


def _start(part: Part) -> int:
    return part.start if isinstance(part, Number) else part[0]


def _value(part: Part) -> Fraction | str:
    return part.value * part.scale if isinstance(part, Number) else part[2]


def evaluate(tokens: list[Fraction | str]) -> Fraction | None:
    """Exact value of a token list with ``+ - * /`` and parentheses, or None when malformed or divided by zero."""
    rest = list(reversed(tokens))

    def atom() -> Fraction:
        token = rest.pop()
        if isinstance(token, Fraction):
            return token
        if token != "(":
            raise ValueError(token)
        value = chain(atom(), 1)
        if rest.pop() != ")":
            raise ValueError("(")
        return value

    def chain(left: Fraction, lowest: int) -> Fraction:
        while rest and isinstance(rest[-1], str) and _PRECEDENCE.get(rest[-1], 0) >= lowest:
            sign = rest.pop()
            right = atom()
            while rest and isinstance(rest[-1], str) and _PRECEDENCE.get(rest[-1], 0) > _PRECEDENCE[str(sign)]:
                right = chain(right, _PRECEDENCE[str(rest[-1])])
            left = _OPERATIONS[str(sign)](left, right)
        return left

    try:
        value = chain(atom(), 1)
    except (ValueError, IndexError, ZeroDivisionError, RecursionError):
        return None
    return None if rest else value


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def perturb(question: Question, rng: random.Random) -> Question | None:
    """The question with a wrong solution in place of the gold one, or None when nothing can be perturbed.

    ``rationale`` and ``gold`` are replaced, so ``.answer`` is the whole wrong text; the rest is kept. The wrong answer
    never equals the gold one in value, and the result depends only on the question and the state of ``rng``.
    """
    wrong = make_wrong(question, rng)
    return None if wrong is None else replace(question, rationale=wrong.rationale, gold=wrong.gold)


def make_wrong(question: Question, rng: random.Random) -> Wrong | None:
    """As :func:`perturb`, with the kind of change beside it."""
    gold = question.gold.strip()
    if gold.lower() in ("yes", "no"):
        flipped = "no" if gold.lower() == "yes" else "yes"
        return Wrong(_exchange_label(question.rationale, gold, flipped), _cased(flipped, gold), "label")
    letters = re.findall(r"(?m)^\s*\(?([A-Z])[.):]\s", question.question)
    if re.fullmatch(r"[A-Z]", gold) and (gold in letters or not letters):
        others = [letter for letter in (letters or list("ABCDE")) if letter != gold]
        if not others:
            return None
        wrong, span = rng.choice(others), last_boxed(question.rationale)
        boxed = span is not None and question.rationale[span[0] : span[1]].strip() == gold
        rationale = _put(question.rationale, span, wrong) if span and boxed else question.rationale
        return Wrong(rationale, wrong, "label")
    value = parse_number(gold)
    if value is not None:
        computed = _perturb_computation(question.rationale, gold, value, rng)
        if computed is not None:
            return computed
    return _perturb_answer(question.rationale, gold, rng)


def _put(text: str, span: tuple[int, int], new: str) -> str:
    return text[: span[0]] + new + text[span[1] :]


def _cased(text: str, like: str) -> str:
    return text.capitalize() if like[:1].isupper() else text


def _exchange_label(rationale: str, gold: str, flipped: str) -> str:
    """Flip the label where the last line states it ("So the answer is yes."), and nowhere else."""
    head, newline, last = rationale.rpartition("\n")
    pattern = rf"(?i)((?:answer\s+is|so|therefore|thus|hence|,|:|^)\s*)\b({re.escape(gold)})\b(?=\s*\W*$)"
    return head + newline + re.sub(pattern, lambda found: found[1] + _cased(flipped, found[2]), last)


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
        if not isinstance(part, Number) and part[2] in _OPERATIONS:
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
            value = _value(part)
            if index == edit.equation and _start(part) == edit.start:
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
        result = evaluate(tokens)
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
    same = [found for found in mentions if read_literal(found[0]) == right.value]
    return [(found.start(), found.end(), write_number(result, like=found[0])) for found in same[-1:]]


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
    for found in _MENTION.finditer(text, start, end):
        value = read_literal(found[0])
        if value is None or value not in changed:
            continue
        line_end = text.find("\n", found.end())
        after = text[found.end() : line_end if line_end >= 0 else len(text)]
        before = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
        if _ADJACENT_BEFORE.search(before) or _ADJACENT_AFTER.match(after):
            return None
        pieces.append((found.start(), found.end(), write_number(changed[value], like=found[0])))
    return pieces


def _sound(text: str, count: int, change: str) -> bool:
    """Re-read the result: as many equations as before, all true, or all but one after a slip."""
    holds = [held for _, held in scan_equations(text)]
    return sum(holds) == (count - 1 if change == "slip" else count)


def _perturb_answer(rationale: str, gold: str, rng: random.Random) -> Wrong | None:
    r"""Change one number of the answer itself: in the last ``\boxed``, else at its last mention in the last line."""
    shown = unfrac(gold)  # "\\frac12" holds no number 12
    numbers = [
        Number(found.start(), found.end(), found[0], value)
        for found in re.finditer(LITERAL, shown)
        if (value := read_literal(found[0])) is not None
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
    span = last_boxed(rationale)
    if span is not None and rationale[span[0] : span[1]].strip() == gold:
        return Wrong(_put(rationale, span, wrong), wrong, "answer")
    last = rationale.rfind("\n") + 1
    mentions = [
        found for found in _MENTION.finditer(rationale, last) if read_literal(found[0]) == abs(old_value or Fraction(0))
    ]
    if mentions:
        start, end = mentions[-1].span()
        rationale = rationale[:start] + wrong.lstrip("-") + rationale[end:]
    return Wrong(rationale, wrong, "answer")
