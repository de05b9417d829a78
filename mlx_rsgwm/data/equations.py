"""Equations in running text: where they stand, what they say, and whether it is true.

True is meant exactly, in fractions: a rounded line ("100 / 3 = 33.33") is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from mlx_rsgwm.data.numbers import LITERAL, read_literal

OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
_SIGNS = {"−": "-", "–": "-", "×": "*", "x": "*", "X": "*", "÷": "/", "\\times": "*", "\\cdot": "*", "\\div": "/"}
_SIGNS |= {"of": "*"} | {sign: sign for sign in OPERATIONS}

_TOKEN = re.compile(
    rf"(?P<number>{LITERAL})(?P<percent>%?)|(?P<op>\\times|\\cdot|\\div|[+\-−–*×÷/])|(?P<word>[A-Za-z][A-Za-z'’]*)"
    r"|(?P<paren>[()])|(?P<equals>=)|(?P<money>\\?[$€£])|(?P<space>[ \t\u00a0]+)|(?P<other>.)"
)
_UNIT_WORDS = 4  # "7 trips per day * 2": words allowed between a number and the next operator


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
        """The numbers on the left, in order."""
        return [part for part in self.parts if isinstance(part, Number)]


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
            left = value_of_parts([value_of(part) for part in parts])
            if left is not None and right.scale != 1 and left == right.value:
                right = replace(right, scale=Fraction(1))  # "5 / 20 * 100 = 25%": the sign is only a unit
            yield Equation(start_of(parts[0]), parts, right), left == right.value * right.scale
        offset += len(line) + 1


@dataclass(frozen=True)
class EquationToken:
    """A number, sign, bracket, word or equals sign, with its place in the text."""

    kind: str
    start: int
    end: int
    text: str
    percent: bool = False


def _tokens(line: str, offset: int) -> list[EquationToken]:
    """The tokens of a line without spaces. Operators that lead to no number are words: "$12/hour", "per-day"."""
    matched = [
        EquationToken(
            str(match.lastgroup if match.lastgroup != "percent" else "number"), match.start(), match.end(), match[0]
        )
        for match in _TOKEN.finditer(line)
        if match["space"] is None
    ]
    tokens = []
    for index, token in enumerate(matched):
        if token.kind == "number":
            percent = token.text.endswith("%")
            token = replace(token, text=token.text.rstrip("%"), end=token.end - percent, percent=percent)
        leads = [following.kind for following in matched[index + 1 : index + 4] if following.kind != "money"]
        to_number = bool(leads) and (leads[0] == "number" or (leads[0] == "paren" and matched[index + 1].text != ")"))
        if token.kind == "op" and not to_number:
            token = replace(token, kind="word" if leads and leads[0] == "word" else "other")
        elif (
            token.kind == "word"
            and to_number
            and (
                token.text in ("x", "X") or (token.text == "of" and index > 0 and matched[index - 1].text.endswith("%"))
            )
        ):
            token = replace(token, kind="op")
        tokens.append(replace(token, start=token.start + offset, end=token.end + offset))
    return tokens


def _number_at(token: EquationToken) -> Number | None:
    value = read_literal(token.text)
    scale = Fraction(1, 100) if token.percent else Fraction(1)
    return None if value is None else Number(token.start, token.end, token.text, value, scale)


def _right_side(tokens: list[EquationToken], index: int) -> Number | None:
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


def _left_side(tokens: list[EquationToken], index: int) -> tuple[Part, ...] | None:
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
    glued = (
        parts and index >= 0 and tokens[index].end == start_of(parts[-1]) and tokens[index].text not in "([{$,;:\"'“*"
    )
    if not parts or glued or not any(isinstance(part, tuple) and part[2] in OPERATIONS for part in parts):
        return None
    return tuple(reversed(parts))


def _unbalanced(parts: list[Part]) -> bool:
    signs = [part[2] for part in parts if isinstance(part, tuple)]
    return signs.count("(") > signs.count(")")


def start_of(part: Part) -> int:
    """Where a number or a sign begins in the text."""
    return part.start if isinstance(part, Number) else part[0]


def value_of(part: Part) -> Fraction | str:
    """A number's exact value, its percent sign or unit counted in; a sign as it is."""
    return part.value * part.scale if isinstance(part, Number) else part[2]


def value_of_parts(tokens: list[Fraction | str]) -> Fraction | None:
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
            left = OPERATIONS[str(sign)](left, right)
        return left

    try:
        value = chain(atom(), 1)
    except (ValueError, IndexError, ZeroDivisionError, RecursionError):
        return None
    return None if rest else value


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
