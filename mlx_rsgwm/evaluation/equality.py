"""Whether two answers mean the same: exact numbers first, then folded text, then mathematics by math-verify.

Two answers that are both plain numbers are settled by their exact values; math-verify is asked only about the rest.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.digits import fold_digits
from mlx_rsgwm.data.numbers import parse_number, unfrac
from mlx_rsgwm.evaluation.answer_forms import Amount, convertible, in_base_unit, read_amount, read_power, written

SECONDS = 5  # for math-verify to parse or compare; beyond that the answers count as different
LONGEST = 2000  # characters of an answer that math-verify is asked about
RUNAWAY = re.compile(r"(.{1,40}?)\1{19,}", re.DOTALL)  # a model that got stuck repeats itself
_LOOKS_MATHEMATICAL = re.compile(r"[\\^_=+*/<>(){}\[\]|]|\d")


def canonical(value: str) -> str:
    """One spelling for equal answers: the exact value of a number, its unit if it has one, else folded text.

    Mathematics is written without spaces and LaTeX dress; words keep their spaces.
    """
    number = parse_number(value)
    if number is not None:
        return _exact(number)
    amount = read_amount(value)
    if amount is not None and amount.value is not None:
        return f"{_exact(amount.value)} {amount.unit}".strip(" °")
    text = written(value)
    return _canonical_mathematics(value) if text is None else text


def _exact(number: Fraction) -> str:
    return f"{number.numerator}/{number.denominator}"


def _canonical_mathematics(value: str) -> str:
    text = unfrac(unicodedata.normalize("NFKC", fold_digits(value)).replace("−", "-"))
    text = re.sub(r"\\(?:left|right|displaystyle|[!,;: ])", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(\\sqrt)\s*([0-9a-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"\s+", "", text.replace("$", "").replace("\\%", "").replace("%", ""))
    text = re.sub(r"^[a-zA-Z]=(?=.)", "", text)  # "x=5" answers "5"
    text = text.strip("\"'“”‘’").rstrip(".").casefold()
    text = re.sub(r"^\(([a-j])\)$", r"\1", text)  # the letter of an option
    number = parse_number(text)
    return text if number is None else _exact(number)


def is_correct(value: str | None, gold: str) -> bool:
    """True when ``value`` means the same as ``gold``."""
    if value is None or _differ_in_form(value, gold):
        return False
    answer, expected = canonical(value), canonical(gold)
    if answer == expected or not answer or not expected:
        return answer == expected and bool(answer)
    if parse_number(value) is not None and parse_number(gold) is not None:
        return False
    if "," in value + gold and "." in value + gold:  # "3,5" and "3.5"; two numbers in a list are no decimal
        left, right = parse_number(value, decimal_comma=True), parse_number(gold, decimal_comma=True)
        if left is not None and left == right:
            return True
    amounts = read_amount(value), read_amount(gold)
    if any(amount is not None and amount.value is not None for amount in amounts):
        return _same_amount(value, gold, *amounts)
    if written(value) is not None or written(gold) is not None:
        return False
    return _could_be_mathematics(value, gold) and same_mathematics(value, gold)


def _could_be_mathematics(value: str, gold: str) -> bool:
    if len(value) > LONGEST or RUNAWAY.search(value):  # math-verify would use up its time limit on it
        return False
    return bool(_LOOKS_MATHEMATICAL.search(gold) and _LOOKS_MATHEMATICAL.search(value))


def _same_amount(value: str, gold: str, value_amount: Amount | None, gold_amount: Amount | None) -> bool:
    """Whether amounts are equal; one side may leave the unit out, but not a word that multiplies ("5 million")."""
    if (
        value_amount is not None
        and gold_amount is not None
        and value_amount.value is not None
        and gold_amount.value is not None
    ):
        if "" in (value_amount.unit, gold_amount.unit) or value_amount.unit == gold_amount.unit:
            return value_amount.value == gold_amount.value
        return convertible(value_amount.unit, gold_amount.unit) and in_base_unit(value_amount) == in_base_unit(
            gold_amount
        )
    other = value if gold_amount is not None and gold_amount.value is not None else gold
    amount = gold_amount if gold_amount is not None and gold_amount.value is not None else value_amount
    assert amount is not None
    number = parse_number(other)
    number = read_power(other) if number is None else number
    if number is not None:
        return number == amount.value
    if re.search(r"\^|\*\*", fold_digits(other)):  # math-verify would leave out an exponent that belongs to no amount
        return False
    return written(other) is None and _could_be_mathematics(value, gold) and same_mathematics(value, gold)


def _differ_in_form(value: str, gold: str) -> bool:
    """Whether two answers name different variables, units or currencies, or one is a point and the other a list."""
    variables = [re.match(r"\s*\$?\s*([a-zA-Z])\s*=(?!.*=)", text) for text in (value, gold)]
    if variables[0] and variables[1] and variables[0][1].casefold() != variables[1][1].casefold():
        return True
    value_amount, gold_amount = read_amount(value), read_amount(gold)
    if (
        value_amount
        and gold_amount
        and value_amount.unit
        and gold_amount.unit
        and value_amount.unit != gold_amount.unit
        and not (
            None not in (value_amount.value, gold_amount.value) and convertible(value_amount.unit, gold_amount.unit)
        )
        and "°" not in (value_amount.unit, gold_amount.unit)
    ):
        return True
    brackets = [_bracket(value), _bracket(gold)]
    return "?" not in brackets and "(" in brackets and brackets[0] != brackets[1]


def _bracket(text: str) -> str:
    """The bracket around a list of values: ``(`` of a point or an open interval, ``{`` of a set, empty without one."""
    bare = re.sub(r"\\(?:left|right)|[\s$\\]", "", text)
    if "," not in bare or "=" in bare or re.search(r"cup|begin|text|[0-9],[0-9]{3}(?![0-9])", bare):
        return "?"
    enclosed = re.fullmatch(r"([(\[{])[^()\[\]{}]*[)\]}]", bare)
    if enclosed is not None:
        return enclosed[1]
    return "" if re.fullmatch(r"[-0-9.,/]+", bare) else "?"


@lru_cache(maxsize=4096)
def same_mathematics(value: str, gold: str) -> bool:
    """math-verify's verdict on two LaTeX or plain expressions (equal sets, intervals, matrices, simplified forms)."""
    math_verify = load_math_verify()
    verdict: bool = math_verify.verify(
        parse_mathematics(_in_math_mode(gold)), parse_mathematics(_in_math_mode(value)), timeout_seconds=_seconds()
    )
    return verdict


def parse_mathematics(text: str) -> list[Any]:
    """What math-verify reads in a text: a SymPy value and the string it came from, or an empty list."""
    math_verify = load_math_verify()
    parsed: list[Any] = math_verify.parse(text, parsing_timeout=_seconds())
    return parsed


def load_math_verify() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import math_verify
    except ImportError:
        raise RsgwmError("math-verify is not installed; run: pip install 'math-verify[antlr4_13_2]'") from None
    return math_verify


def _in_math_mode(text: str) -> str:
    text = fold_digits(text)  # math-verify drops a superscript exponent: "10²" would be 10
    return text if "$" in text or "\\(" in text or "\\boxed" in text else f"${text}$"


def _seconds() -> int | None:
    # math-verify's time limit is a signal, and only the main thread may set one.
    return SECONDS if threading.current_thread() is threading.main_thread() else None
