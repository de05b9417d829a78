"""Where expressions stand in a text, and whether what is around one leaves it as it is.

"Twice 3 + 4", "Day 1 - 5", "3 + 4 = 8 is wrong", "2-4 people", "11 am": words and signs beside an expression can make
it something else than a plain sum, and then nothing is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_rsgwm.data.arithmetic_parser import Literal, Node, Parser, TooLong, Unreadable, literals
from mlx_rsgwm.data.arithmetic_tokens import Token
from mlx_rsgwm.data.arithmetic_units import is_measure


@dataclass(frozen=True)
class Expression:
    """An expression in the text from token ``first`` up to ``end``; ``node`` is None where it cannot be read."""

    first: int
    node: Node | None
    end: int


# In front of an expression these words change its value, or make its first number a name.
_CHANGING_WORDS = (
    "twice double triple thrice half halb hälfte moitié mitad metà doble doppelt of von de du di product quotient sqrt "
    "root log ln sin cos tan sec max min gcd lcm negative minus than by from to not"
)
_CHANGING = set(_CHANGING_WORDS.split())
_SO = {"so", "then", "thus", "therefore", "hence", "also", "and", "that"}
_ARTICLES = {"the", "her", "his", "their", "its", "those", "these"}
_TOTALS = {"total", "sum", "cost", "price", "amount", "number", "value"}
_NAMED_WORDS = (
    "day days week weeks month year years step page pages chapter question problem part grade room no number item "
    "level round game group table figure section lesson row column case phase stage team class person exercise "
    "jan january feb february mar march apr april may june july aug august sep sept september oct october nov "
    "november dec december étape schritt tag paso día шаг день"
)
_NAMED = set(_NAMED_WORDS.split())
# What stands right after an equation and takes it back or limits it.
_TAKEN_BACK = re.compile(
    r"\s*(?:[,(\[]\s*)?(?:\?|(?:which |that |this )?(?:is|was) (?:wrong|false|incorrect|not)\b"
    r"|(?:is|was|would|could|ca|wo)n['’]t\b|(?:can ?not|would) be\b|(?:wrong|false|incorrect|falsch|faux)\b"
    r"|(?:\.{2,}|…)\s*\d|(?:and|with) (?:a )?(?:remainder|rest)\b|with \d+ (?:\w+ )?left\b"
    r"|\\?p?mod(?:ulo)?\b|remainder\b|rem\b|rest\b|reste\b|resto\b|остаток\b|余|r\s?\d|rounded|rounding|round\b|approx|about"
    r"|or so|gerundet|arrondi|more than|less than|fewer than|times (?:more|less|as)|\(mod"
    r"|(?:in )?(?:binary|octal|hex\w*|base)\b|on average\b|roughly\b|circa\b|ca\b|redondeado"
    r"|(?:(?:with|and) )?\d+ (?:\w+ )?(?:remain(?:s|ing|der)?|left over|leftover|over)\b"
    r"|(?:a|p)\.?m\b|o['’]clock|!\s?[=+*/-]|:\s?\d|\.\(|\.\\|squared|cubed|to the)",
    re.IGNORECASE,
)
_LISTED = re.compile(r"[(\[{].*,.*[)\]}]", re.DOTALL)
OTHER_SYSTEM = re.compile(
    r"\b(?:binary|hexadecimal|octal|modulo|mod|base[- ]?(?:\d+|two|eight|ten|sixteen))\b", re.IGNORECASE
)
_NOT_STATED = re.compile(r"\b(?:not true|false that|wrong that|incorrect|suppose|instead of|is it)\b", re.IGNORECASE)
_SUPPOSED = re.compile(r"\b(?:if|assum(?:e|ing)|imagine|pretend|say)(?: that)?,?\s*$", re.IGNORECASE)
_HEXADECIMAL = re.compile(r"(?<![\d.,])0×[0-9a-fA-F]|(?<![\d.,])0[xXbBoO][0-9a-fA-F]")
_CLOCK = {"am", "pm", "a.m", "p.m", "o'clock", "o’clock", "uhr"}


def break_at(tokens: Sequence[Token], index: int) -> bool:
    """Whether a line ends at ``index``."""
    return index < len(tokens) and tokens[index].kind == "newline"


def before_break(tokens: Sequence[Token], index: int) -> int:
    """The index of the line's end just before ``index``, where there is one; else ``index``."""
    return index - 1 if index and tokens[index - 1].kind == "newline" else index


def after_break(tokens: Sequence[Token], index: int) -> int:
    """``index`` or, where a line ends there and the text goes on, the next."""
    return index + 1 if break_at(tokens, index) and index + 1 < len(tokens) else index


def find_expressions(tokens: Sequence[Token]) -> list[Expression]:
    """The expressions of a text, in order, each as long as it can be."""
    expressions, index = [], 0
    while index < len(tokens):
        token = tokens[index]
        begins = token.kind in ("number", "money", "open") or token.text in ("√", "\\frac") or _is_sign(tokens, index)
        if not begins:
            index += 1
            continue
        expression = expression_at(tokens, index)
        if expression.end > index:
            expressions.append(expression)
        index = max(expression.end, index + 1)  # what begins with a bracket of the sentence or a bullet begins after it
    return expressions


def _is_sign(tokens: Sequence[Token], index: int) -> bool:
    if tokens[index].text not in ("-", "–", "+") or tokens[index].kind != "op":
        return False
    before = tokens[index - 1] if index else None
    return before is None or before.kind in ("newline", "equals", "stop", "compare", "open")


def expression_at(tokens: Sequence[Token], index: int) -> Expression:
    """The longest expression from ``index`` on; its value is None where it is too long to be parsed."""
    parser = Parser(tokens, index)
    try:
        return Expression(index, parser.expression(), parser.position)
    except TooLong:
        return Expression(index, None, parser.position)
    except Unreadable:
        return Expression(index, None, index if tokens[index].kind in ("open", "money", "op") else parser.position)


def may_begin(tokens: Sequence[Token], expression: Expression) -> bool:
    """Whether what stands before an expression leaves it as it is."""
    if not expression.first:
        return True
    before = tokens[expression.first - 1]
    earlier = tokens[expression.first - 2] if expression.first > 1 else None
    if (
        before.kind == "newline"
        and earlier is not None
        and (earlier.kind == "op" or (tokens[expression.first].kind == "op" and earlier.kind in ("number", "close")))
    ):
        return False  # the second line of an expression
    if before.kind in ("newline", "equals", "open"):
        return before.kind != "open" or earlier is None or earlier.kind != "word" or before.space
    if before.kind == "compare":
        return True
    if before.kind == "stop":
        named = expression.first > 2 and tokens[expression.first - 3].kind == "word"
        colon = before.text == ":" and earlier is not None and earlier.kind == "number" and before.space and not named
        return (tokens[expression.first].space and not colon) or before.text in "“„«'\"（，。、*#|；：,"
    if tokens[expression.first].kind == "open" and before.kind == "word" and not tokens[expression.first].space:
        return False  # a function: "floor(17/5)"
    if before.kind == "word" and earlier is not None and earlier.kind == "number" and is_measure(before.text):
        return not _starts_with_a_measure(expression)  # "2 hours 30 minutes + …"
    if before.kind in ("close", "percent", "number"):
        return before.text == ")" and tokens[expression.first].space and tokens[expression.first].kind != "open"
    if before.text == "*" and (earlier is None or earlier.kind == "newline"):
        return True  # a bullet
    if before.kind != "word" or (isinstance(expression.node, Literal) and before.text.lower() not in _SO):
        return False
    return _word_may_precede(tokens, expression, before, earlier)


def _starts_with_a_measure(expression: Expression) -> bool:
    first = next(literals(expression.node), None) if expression.node is not None else None
    return first is not None and any(is_measure(word) for word in first.unit)


def _word_may_precede(tokens: Sequence[Token], expression: Expression, before: Token, earlier: Token | None) -> bool:
    word = before.text.rstrip(".").lower()
    if word in _ARTICLES and earlier is not None:
        return earlier.text.lower() not in _CHANGING
    if word in _CHANGING:
        return word in ("of", "de", "von", "di") and earlier is not None and earlier.text.lower() in _TOTALS
    letter = (
        len(word) == 1 and word.isalpha() and word < "\u0900" and word not in ("a", "y", "e", "o", "i", "и", "у", "в")
    )
    counted = earlier is not None and earlier.kind == "number" and word in ("and", "und", "et", "y", "e")
    return not (word in _NAMED or letter or (counted and tokens[expression.first + 1].text == "/"))


def may_end(text: str, tokens: Sequence[Token], expression: Expression) -> bool:
    """Whether what stands after an expression leaves it as it is."""
    ends = {expression.end, _without_unit(tokens, expression)}  # a word that takes back may have been read as a unit
    if _goes_on_in_units(tokens, expression) or any(_TAKEN_BACK.match(text, tokens[end - 1].end) for end in ends):
        return False
    if expression.end >= len(tokens):
        return True
    after = tokens[expression.end]
    last = tokens[expression.end - 1].kind
    if after.kind in ("op", "other", "command", "percent"):
        return False
    if after.kind in ("number", "money") and last != "word":
        return False
    if after.kind == "open" and (not after.space or last == "close"):
        return False
    return not (after.kind == "word" and not after.space and after.text.isascii())


def _without_unit(tokens: Sequence[Token], expression: Expression) -> int:
    """Where the expression ends without the words after its last number."""
    end = expression.end
    while end - 1 > expression.first and tokens[end - 1].kind == "word":
        end -= 1
    return end


def _goes_on_in_units(tokens: Sequence[Token], expression: Expression) -> bool:
    """Whether its last number begins a measure in several units: "= 3 hours 15 minutes", "1 foot and 4 inches"."""
    if not is_measure(tokens[expression.end - 1].text):
        return False
    rest = tokens[expression.end : expression.end + 3]
    if rest and rest[0].text.lower() in ("and", "und", "et", "y", "e", ","):
        rest = rest[1:]
    return len(rest) > 1 and rest[0].kind == "number" and is_measure(rest[1].text)


def unmeant(text: str, tokens: Sequence[Token], left: Expression, right: Expression) -> bool:
    """Whether the line or the units say that no usual sum is meant: other bases, clocks, ranges, codes."""
    start, end = tokens[left.first].start, tokens[right.end - 1].end
    line = text[text.rfind("\n", 0, start) + 1 : start]
    if (
        OTHER_SYSTEM.search(line[-200:])
        or _NOT_STATED.search(line[-200:])
        or re.match(r"[^\n.;]{0,40}\b(?:in binary|in base|mod \d)", text[end:])
    ):
        return True
    listed = [side for expression in (left, right) if _LISTED.fullmatch(side := _written(text, tokens, expression))]
    if len(listed) == 2 or any(side[0] != "(" for side in listed):
        return True  # intervals and points: "[-11 + 1, 3 + 1] = [-10, 4]"
    units = {
        word.lower()
        for expression in (left, right)
        if expression.node
        for literal in literals(expression.node)
        for word in literal.unit
    }
    if (
        units & _CLOCK
        or (units & {"more", "less"} and "than" in units)
        or units & {"remainder", "rest", "rounded", "mod"}
    ):
        return True
    if _SUPPOSED.search(line[-200:]) or _HEXADECIMAL.search(re.sub(r" *× *", "×", text[start:end])):
        return True
    return any(_is_range(text, tokens, expression) for expression in (left, right))


def _written(text: str, tokens: Sequence[Token], expression: Expression) -> str:
    return text[tokens[expression.first].start : tokens[expression.end - 1].end]


def _is_range(text: str, tokens: Sequence[Token], expression: Expression) -> bool:
    """ "2-4 people", "pages 5–10", "5/10/2024"."""
    written = _written(text, tokens, expression)
    if re.fullmatch(r"\d{1,2}/\d{1,2}/(?:19|20)\d\d", written) or re.match(r"\d{3}-\d{4}\b", written):
        return True
    match = re.match(r"(\d+)[-–](\d+)(?![\d.,/*×+])", written)
    named = expression.first > 0 and tokens[expression.first - 1].kind == "word"
    lone = match is not None and not re.search(r"[+×*÷/]", written)
    return lone and match is not None and int(match[1]) < int(match[2]) and (named or len(written) > match.end())
