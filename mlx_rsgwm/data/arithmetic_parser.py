"""Expressions of arithmetic: read by recursive descent from tokens, evaluated exactly.

Bounded on any input: terms, nesting and digits are limited, and what is beyond is not read. Nothing is evaluated by
the language itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import isqrt

from mlx_rsgwm.data.arithmetic_tokens import OPENING, Token
from mlx_rsgwm.data.arithmetic_units import GLUED, KNOWN, Unit
from mlx_rsgwm.data.digits import MAX_DIGITS

MAX_DEPTH = 20
MAX_TERMS = 200
_UNIT_WORDS = 5
_SIGNS = {"+": "+", "-": "-", "–": "-", "×": "*", "*": "*", "÷": "/", "/": "/"}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
# Words that are no units: the sentence goes on.
_SENTENCE_WORDS = (
    "and or so then but because which that is was are therefore thus hence where when if und oder also et ou donc y o "
    "entonces и или"
)
_SENTENCE = set(_SENTENCE_WORDS.split())


class Unreadable(Exception):
    """What stands there is no expression, or is not to be guessed."""


class TooLong(Unreadable):
    """More terms or levels than are read."""


@dataclass(frozen=True)
class Literal:
    """A number as written, with what is counted; ``text`` tells to how many digits it may have been rounded."""

    text: str
    value: Fraction
    percent: bool = False
    unit: Unit = ()


@dataclass(frozen=True)
class Operation:
    """``sign`` is one of + - * / ^ √ and ± for a negated operand; the last two have one operand."""

    sign: str
    operands: tuple[Node, ...]


Node = Literal | Operation


@dataclass(frozen=True)
class Way:
    """One way to read what people write in two: "6 ÷ 1/2" and "-2^2" (``loose``), "50 - 20%" (``percent``).

    A percentage is a hundredth (``scaled``), a unit like any other (``unit``), or a part of what it is added to or
    taken from (``relative``).
    """

    percent: str = "scaled"
    loose: bool = False


@dataclass
class Parser:
    """Reads one expression from ``position``; ``loose``: a fraction written tightly and a sign bind first."""

    tokens: Sequence[Token]
    position: int
    loose: bool = False
    depth: int = 0
    terms: int = field(default=0)

    def expression(self, lowest: int = 1) -> Node:
        """Operators of at least this precedence, from left to right."""
        left = self._signed()
        while (sign := self._operator()) is not None:
            precedence = 3 if self.loose and self._tight_fraction() else _PRECEDENCE[sign]
            if precedence < lowest:
                break
            self.position += 1
            self._skip_line_break()
            right = self.expression(precedence + 1) if precedence < 3 else self._power()
            left = Operation(sign, (left, right))
        return left

    def _peek(self, ahead: int = 0) -> Token | None:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def _operator(self) -> str | None:
        token = self._peek()
        return _SIGNS.get(token.text) if token is not None and token.kind == "op" else None

    def _skip_line_break(self) -> None:
        token = self._peek()
        if token is not None and token.kind == "newline":
            raise Unreadable

    def _tight_fraction(self) -> bool:
        before, sign, after = self._peek(-1), self._peek(), self._peek(1)
        return (
            sign is not None and sign.text == "/" and not sign.space
            and after is not None and after.kind == "number" and not after.space
            and before is not None and before.kind == "number"
        )  # fmt: skip

    def _signed(self) -> Node:
        token = self._peek()
        if token is None or token.kind != "op" or token.text not in "+-–":
            return self._product()
        self.position += 1
        self._deeper()
        operand = self._product()
        self.depth -= 1
        if token.text == "+":
            return operand
        if self.loose and isinstance(operand, Operation) and operand.sign == "^":
            base, exponent = operand.operands
            return Operation("^", (Operation("±", (base,)), exponent))
        return Operation("±", (operand,))

    def _product(self) -> Node:
        """Factors that stand side by side: "2(3 + 4)", "(2)(3)"; after a division their order is anybody's guess."""
        divided = self._peek(-1)
        left = self._power()
        while (token := self._peek()) is not None and token.kind == "open" and not token.space and token.text != "[":
            before = self.tokens[self.position - 1]
            if before.kind not in ("number", "close") or (divided is not None and divided.text in ("÷", "/")):
                raise Unreadable
            left = Operation("*", (left, self._power()))
        return left

    def _power(self) -> Node:
        base = self._atom()
        token = self._peek()
        if token is None or token.text != "^":
            return base
        self.position += 1
        self._deeper()
        sign = self._peek()
        if sign is not None and sign.text in ("-", "+"):
            self.position += 1
        exponent = self._power()
        self.depth -= 1
        if sign is not None and sign.text == "-":
            exponent = Operation("±", (exponent,))
        return Operation("^", (base, exponent))

    def _atom(self) -> Node:
        token = self._peek()
        self.terms += 1
        if self.terms > MAX_TERMS:
            raise TooLong
        if token is None:
            raise Unreadable
        if token.kind == "open":
            return self._group(token)
        if token.text == "√":
            self.position += 1
            return Operation("√", (self._nested(self._atom),))
        if token.text == "\\frac":
            self.position += 1
            return Operation("/", (self._argument(), self._argument()))
        money = ""
        if token.kind == "money":
            money = token.text
            self.position += 1
            token = self._peek()
        if token is None or token.kind != "number":
            raise Unreadable
        return self._literal(token, money)

    def _nested(self, read: Callable[[], Node]) -> Node:
        self._deeper()
        node = read()
        self.depth -= 1
        return node

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLong

    def _group(self, opened: Token) -> Node:
        self.position += 1
        node = self._nested(self.expression)
        closed = self._peek()
        if closed is None or closed.text != OPENING[opened.text]:
            raise Unreadable
        self.position += 1
        unit = self._unit(glued=True)
        return node if not unit else _with_unit(node, unit)

    def _argument(self) -> Node:
        r"""An argument of ``\frac``: a group, or one digit of what follows is not told apart from the next."""
        token = self._peek()
        if token is None or token.kind != "open" or token.text != "{":
            raise Unreadable
        return self._group(token)

    def _literal(self, token: Token, money: str) -> Node:
        self.position += 1
        assert token.value is not None
        value, text = token.value, token.text
        part = self._mixed_part(token)
        if part is not None:
            value, text = value + part, str(value + part)
        following = self._peek()
        percent = following is not None and following.kind == "percent"
        if percent:
            self.position += 1
            after = self._peek()
            if after is not None and after.kind in ("number", "money"):
                raise Unreadable  # "17 % 5"
        elif following is not None and following.text == "!" and not following.space and self._goes_on(1):
            raise Unreadable  # "5! = 120"
        unit = self._unit(glued=True)
        return Literal(text, value, percent, ((money,) if money else ()) + unit)

    def _goes_on(self, ahead: int) -> bool:
        token = self._peek(ahead)
        return token is not None and token.kind in ("op", "equals")

    def _mixed_part(self, integer: Token) -> Fraction | None:
        r"""The 1/2 of "2 1/2", "2 and 1/2" and of ``2\frac{1}{2}``."""
        if not integer.text.isdigit():
            return None
        start = self.position + (self.position < len(self.tokens) and self.tokens[self.position].text == "and")
        tokens = self.tokens[start : start + 7]
        kinds, first = [token.kind for token in tokens], tokens[0].text if tokens else ""
        if kinds[:3] == ["number", "op", "number"] and tokens[1].text == "/" and not tokens[2].space:
            top, bottom, length = tokens[0], tokens[2], 3
        elif first == "\\frac" and kinds[1:] == ["open", "number", "close", "open", "number", "close"]:
            top, bottom, length = tokens[2], tokens[5], 7
        else:
            return None
        if not (top.text.isdigit() and bottom.text.isdigit()) or not 0 < int(top.text) < int(bottom.text):
            return None
        self.position = start + length
        return Fraction(int(top.text), int(bottom.text))

    def _unit(self, glued: bool = False) -> Unit:
        """Words after a number, "per" and "/hour" among them; a letter alone may be a variable."""
        words: list[str] = []
        while (token := self._peek()) is not None and len(words) < _UNIT_WORDS:
            following = self._peek(1)
            if token.kind == "money" and not words and (following is None or following.kind not in ("number", "open")):
                words.append(token.text)
            elif token.text in ("/", "-") and following is not None and following.kind == "word" and (words or glued):
                if token.text == "-" and (token.space or following.space or len(following.text) < 3):
                    break
                words.append("/")
            elif token.text == "^" and words and following is not None and following.kind == "number":
                self.position += 1
                words.append("^")  # "cm^2"
            elif token.kind == "word":
                word = token.text.rstrip(".")
                if word.lower() in _SENTENCE:
                    break
                self._check_unit(token, word, following, tight=glued and not words and not token.space)
                words.append(word)
            else:
                break
            self.position += 1
        return tuple(words)

    def _check_unit(self, token: Token, word: str, following: Token | None, tight: bool) -> None:
        called = following is not None and following.text == "(" and not following.space
        short = word.isascii() and (word not in GLUED and len(word) < 4 if tight else len(word) == 1)
        article = word == "a" and following is not None and following.kind == "word"
        if called or (short and (tight or (word not in KNOWN and not article))):
            raise Unreadable


def _with_unit(node: Node, unit: Unit) -> Node:
    if isinstance(node, Literal):
        return Literal(node.text, node.value, node.percent, node.unit + unit)
    return Operation(node.sign, (*node.operands[:-1], _with_unit(node.operands[-1], unit)))


def literals(node: Node) -> Iterator[Literal]:
    """All numbers, from left to right."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Literal):
            yield node
        else:
            stack += reversed(node.operands)


def terms(node: Node) -> list[Literal]:
    """The numbers that are added or subtracted as they are; none of a node without a sum."""
    if isinstance(node, Operation) and node.sign in "+-":
        return [term for side in node.operands for term in ([side] if isinstance(side, Literal) else terms(side))]
    return []


def lone(node: Node) -> bool:
    """Whether it is one number, signed or not."""
    return isinstance(node, Literal) or (node.sign == "±" and isinstance(node.operands[0], Literal))


def additive(node: Node) -> bool:
    """Whether nothing but sums and differences stands there."""
    return isinstance(node, Literal) or (node.sign in "+-±" and all(additive(side) for side in node.operands))


def evaluate(node: Node, way: Way, sizes: bool = False) -> Fraction:
    """Exact value; with ``sizes`` in the smallest unit of what is measured.

    Raises:
        Unreadable: a division by zero, a root that is not rational, a power with too many digits.
    """
    if isinstance(node, Literal):
        scale = Fraction(1, 100) if node.percent and way.percent != "unit" else Fraction(1)
        if sizes:
            scale *= next(KNOWN[word][1] for word in node.unit if word in KNOWN)
        return node.value * scale
    values = [evaluate(side, way, sizes) for side in node.operands]
    right = node.operands[-1]
    if way.percent == "relative" and node.sign in "+-" and isinstance(right, Literal) and right.percent:
        values[1] *= values[0]
    return _bounded(_operate(node.sign, values))


def _operate(sign: str, values: Sequence[Fraction]) -> Fraction:
    left, right = values[0], values[-1]
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    if sign == "±":
        return -left
    if sign == "/":
        if not right:
            raise Unreadable
        return left / right
    return _root(left) if sign == "√" else _raised(left, right)


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise Unreadable
    root = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    if root * root != value:
        raise Unreadable
    return root


def _raised(base: Fraction, exponent: Fraction) -> Fraction:
    digits = len(str(base.numerator)) + len(str(base.denominator))
    if exponent.denominator != 1 or digits * abs(exponent) > MAX_DIGITS or (not base and exponent < 0):
        raise Unreadable
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > 8 * MAX_DIGITS:
        raise Unreadable
    return value
