"""False equations in running text: what a draft states to be equal and is not.

Exact, in fractions, and without a guess: what cannot be read whole, what is only compared, asked, rounded or denied,
and what units may explain, is no false equation. Two habits of people who calculate are no errors: "3 + 4 = 7 × 2 = 14"
(every step of a running total holds) and a last decimal place that was rounded or cut off ("10/3 = 3.33").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from mlx_rsgwm.data.arithmetic_expressions import (
    OTHER_SYSTEM,
    Expression,
    after_break,
    before_break,
    break_at,
    expression_at,
    find_expressions,
    may_begin,
    may_end,
    unmeant,
)
from mlx_rsgwm.data.arithmetic_parser import (
    Literal,
    Node,
    Operation,
    Parser,
    Unreadable,
    Way,
    additive,
    evaluate,
    literals,
    lone,
    terms,
)
from mlx_rsgwm.data.arithmetic_tokens import MAX_TEXT, READINGS, Token, normalised, tokens_of
from mlx_rsgwm.data.arithmetic_units import conversions, converted, excuse, noun, unlike
from mlx_rsgwm.data.numbers import decimals_needed


@dataclass(frozen=True)
class FalseEquation:
    """``text`` as it stands there, in plain spelling, and what its sides are worth."""

    text: str
    left: Fraction
    right: Fraction

    @property
    def reason(self) -> str:
        """What a user is told: "21 - 4 = 18 is false"."""
        return f"{self.text} is false"


_ANNOTATION = re.compile(r"<<([^<>\n]{1,200})>>")
_WAYS = (Way(), Way("relative"), Way(loose=True))
_OWN = re.compile(
    r"(?<!\w)[a-zA-Z]\s*\$?(?:[*×∗⋆★@#◊]|\\(?:star|ast|times|diamond|oplus|otimes)\b)"
    r"\s*\$?[a-zA-Z]\s*\$?\s*(?:=|(?:to )?means?\b|denotes\b|stands for|be\b|is (?:defined|given))"
)


def false_equations(text: str, question: str = "") -> list[FalseEquation]:
    """Every equation in ``text`` whose two sides are read whole and differ, in order of appearance.

    The time is bounded on any input: at most ``arithmetic_tokens.MAX_TEXT`` characters are read, and of an expression
    at most ``MAX_TERMS`` numbers, ``MAX_DEPTH`` levels and ``MAX_DIGITS`` digits.

    Args:
        question: what the text answers; where it speaks of other bases or makes its own operation of a sign ("a * b =
            a^2 + b"), nothing is claimed.
    """
    return list(_false_equations(text, question))


def first_false_equation(text: str, question: str = "") -> str | None:
    """The first of :func:`false_equations` as it is written; None where ``text`` states none."""
    equations = false_equations(text, question)
    return equations[0].text if equations else None


@lru_cache(maxsize=4096)  # the same drafts are looked at for every system that chooses among them
def _false_equations(text: str, question: str) -> tuple[FalseEquation, ...]:
    if not any(character.isnumeric() for character in text) or OTHER_SYSTEM.search(question) or _OWN.search(question):
        return ()
    text = text[:MAX_TEXT]
    equations = _in_plain(";\n".join(match[1] for match in _ANNOTATION.finditer(text)))
    said = {(equation.left, equation.right) for equation in equations}
    return (*equations, *(e for e in _in_plain(_ANNOTATION.sub("", text)) if (e.left, e.right) not in said))


def _in_plain(text: str) -> list[FalseEquation]:
    """Of every sign of equality what each reading of commas makes of it: false is what holds in none."""
    plain = normalised(text)
    if "=" not in plain:
        return []
    verdicts: dict[int, list[FalseEquation | None]] = {}
    for reading in READINGS if re.search(r"\d,\d|\d\.\d{3}", plain) else READINGS[:1]:
        for place, verdict in _verdicts(plain, tokens_of(plain, reading)):
            verdicts.setdefault(place, []).append(verdict)
    equations = []
    for place in sorted(verdicts):
        wrong = [verdict for verdict in verdicts[place] if verdict is not None]
        if len(wrong) == len(verdicts[place]):
            equations.append(wrong[0])
    return equations


def _verdicts(text: str, tokens: Sequence[Token]) -> Iterator[tuple[int, FalseEquation | None]]:
    """Every sign of equality that joins two expressions: where it stands, and what is false about it."""
    expressions = find_expressions(tokens)
    starts = {expression.first: expression for expression in expressions}
    ends = {expression.end: expression for expression in expressions}
    for index, token in enumerate(tokens):
        if token.kind != "equals":
            continue
        left = ends.get(index) or ends.get(before_break(tokens, index))
        right = starts.get(index + 1)
        if right is None and break_at(tokens, index + 1) and index + 2 in starts:
            alone = break_at(tokens, starts[index + 2].end) or starts[index + 2].end == len(tokens)
            right = starts[index + 2] if alone else None
        if left is None or right is None or left.node is None or right.node is None:
            continue
        if lone(left.node) and lone(right.node):
            continue
        if not (may_begin(tokens, left) and may_end(text, tokens, right)) or unmeant(text, tokens, left, right):
            continue
        goes_on = right.end < len(tokens) and tokens[after_break(tokens, right.end)].kind == "equals"
        try:
            verdict = _verdict(text, tokens, left, right, goes_on)
        except Unreadable:
            continue
        yield token.start, verdict


def _verdict(
    text: str, tokens: Sequence[Token], left: Expression, right: Expression, goes_on: bool
) -> FalseEquation | None:
    assert left.node is not None
    assert right.node is not None
    pairs = list(_values(tokens, left, right))
    if any(_same(a, b, left.node, right.node) for a, b in pairs) or _loose_start(tokens, left, right.node):
        return None
    first = re.match(r"\d+(?= \d{3})", right.node.text) if isinstance(right.node, Literal) else None
    if first is not None and pairs[0][0] == int(first[0]):
        return None  # "= 12 200-gram bars"
    if goes_on and isinstance(right.node, Operation) and any(a == _opening(right.node) for a, _ in pairs):
        return None  # a running total: "3 + 4 = 7 × 2 = 14"
    _check_units(left.node, right.node, *pairs[0])
    _check_habits(left.node, right.node, *pairs[0])
    if re.match(r"\d+-\d+/\d+(?!\d)", text[tokens[left.first].start : tokens[left.end - 1].end]):
        raise Unreadable  # "2-1/2": two and a half
    written = re.sub(r"\s+", " ", text[tokens[left.first].start : tokens[right.end - 1].end]).strip()
    return FalseEquation(written, *pairs[0])


def _values(tokens: Sequence[Token], left: Expression, right: Expression) -> Iterator[tuple[Fraction, Fraction]]:
    """Values of both sides in every way to read them; the plain one first."""
    sides = [expression.node for expression in (left, right)]
    for way in _WAYS:
        nodes = [_loosely(tokens, expression) if way.loose else expression.node for expression in (left, right)]
        if any(node is None for node in nodes) or (way.loose and nodes == sides):
            continue
        a, b = (evaluate(node, way) for node in nodes if node is not None)
        yield a, b
        if isinstance(nodes[1], Literal) and nodes[1].percent:
            yield a, nodes[1].value  # "10 / 50 × 100 = 20%"
    assert left.node is not None
    assert right.node is not None
    percent = any(literal.percent for literal in literals(right.node))
    hundred = any(literal.percent and literal.value == 100 for literal in literals(left.node))
    percents = all(literal.percent for literal in literals(left.node))  # "20% + 30% = 50", and not "50 + 10% = 60"
    if percent or hundred or (percents and additive(left.node) and additive(right.node)):
        yield evaluate(left.node, Way("unit")), evaluate(right.node, Way("unit"))


def _loosely(tokens: Sequence[Token], expression: Expression) -> Node | None:
    parser = Parser(tokens[: expression.end], expression.first, loose=True)
    try:
        node = parser.expression()
    except Unreadable:
        return None
    return node if parser.position == expression.end else None


def _loose_start(tokens: Sequence[Token], left: Expression, right: Node) -> bool:
    """Whether it holds when a minus in front is a dash or a bullet: "- 3 + 5 = 8"."""
    if tokens[left.first].text not in ("-", "–") or not tokens[left.first + 1].space:
        return False
    rest = expression_at(tokens, left.first + 1)
    return rest.end == left.end and rest.node is not None and evaluate(rest.node, Way()) == evaluate(right, Way())


def _opening(node: Node) -> Fraction:
    return evaluate(next(literals(node)), Way())


def _same(left: Fraction, right: Fraction, left_node: Node, right_node: Node) -> bool:
    if left == right:
        return True
    return _rounded(left, left_node, right, right_node) or _rounded(right, right_node, left, left_node)


def _rounded(exact: Fraction, source: Node, written: Fraction, node: Node) -> bool:
    """Whether ``written`` is ``exact`` to the decimals that it has, the last one rounded or cut off.

    Sums are rounded to hundredths at the coarsest: ".5 + .25 = .8" is an error.
    """
    if isinstance(node, Operation) and node.sign == "±":
        node = node.operands[0]
    if not isinstance(node, Literal):
        return False
    decimals = max(
        len(re.sub(r"[eE].*", "", part)) if (part := re.split(r"[.,]", node.text)[-1]) != node.text else 0, 0
    )
    places = decimals + (2 if node.percent and written != node.value else 0)
    needed = decimals_needed(exact)
    if (
        (not decimals and not node.percent)
        or (additive(source) and places < 2)
        or (needed is not None and needed <= places)
    ):
        return False
    last, difference = Fraction(1, 10**places), abs(exact - written)
    cut_off = difference < last and abs(written) < abs(exact) and written * exact >= 0
    return cut_off or 2 * difference <= last


def _check_units(left: Node, right: Node, a: Fraction, b: Fraction) -> None:
    """Refuse to say anything where units may explain the difference; where all are known, they are converted.

    Raises:
        Unreadable: the difference may be one of units, or it is none after conversion.
    """
    numbers = [*literals(left), *literals(right)]
    known = [converted(number.unit) for number in numbers]
    kinds = {unit[0] for unit in known if unit is not None}
    if additive(left) and additive(right) and None not in known and len(kinds) == 1:
        if evaluate(left, Way(), sizes=True) == evaluate(right, Way(), sizes=True):
            raise Unreadable
        return
    if b == 1 and isinstance(right, Literal) and not right.unit and _is_rate(left):
        raise Unreadable
    if isinstance(right, Literal) and not _counts(left) and b and a / b in conversions(right.unit):
        raise Unreadable  # "24 × 60 = 1 day" counts minutes
    first, second = ([number.unit for number in literals(side) if number.unit] for side in (left, right))
    if unlike(first, second, summed=additive(left) and additive(right)):
        raise Unreadable
    added = [number.unit for number in (*terms(left), *terms(right))]
    if excuse(added, [number.unit for number in numbers], a / b if b else None):
        raise Unreadable


def _check_habits(left: Node, right: Node, a: Fraction, b: Fraction) -> None:
    """Refuse to say anything of what people write with a sign of equality and do not mean as one.

    Raises:
        Unreadable: a share of something ("4/7 = $24"), or a step between two computations that was rounded.
    """
    if _is_share(left) and (isinstance(left, Literal) or _counts(right) or (isinstance(right, Operation) and b >= 1)):
        raise Unreadable
    if isinstance(left, Literal) and len(left.unit) > 1:
        raise Unreadable  # "then 60 kW would cost = …"
    operations = isinstance(left, Operation) and isinstance(right, Operation)
    decimals = any("." in literal.text or "," in literal.text for literal in literals(right))
    if operations and decimals and not (additive(left) and additive(right)) and abs(a - b) * 200 < abs(a):
        raise Unreadable


def _is_share(node: Node) -> bool:
    """A percentage, or a proper fraction of two plain numbers."""
    if isinstance(node, Literal):
        return node.percent
    top, bottom = node.operands[0], node.operands[-1]
    plain = isinstance(top, Literal) and isinstance(bottom, Literal) and not top.unit and not bottom.unit
    return node.sign == "/" and plain and abs(evaluate(node, Way())) < 1


def _is_rate(node: Node) -> bool:
    """One thing in another: "8 miles/1 hour", which a text that converts units says to be 1."""
    if isinstance(node, Literal) or node.sign != "/":
        return False
    nouns = [noun(side.unit) for side in node.operands if isinstance(side, Literal) and side.unit]
    return len(nouns) == 2 and nouns[0] != nouns[1]


def _counts(node: Node) -> bool:
    return any(literal.unit for literal in literals(node))
