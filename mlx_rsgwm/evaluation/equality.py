"""Whether two answers mean the same: exact numbers first, then folded text, then mathematics by math-verify.

Two answers that are both plain numbers are settled by their exact values; math-verify is asked only about the rest.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from typing import Any

from mlx_rsgwm.data.numbers import parse_number, unfrac
from mlx_rsgwm.errors import RsgwmError

SECONDS = 5  # for math-verify to parse or compare; beyond that the answers count as different
_LOOKS_MATHEMATICAL = re.compile(r"[\\^_=+*/<>(){}\[\]|]|\d")


def canonical(value: str) -> str:
    """One spelling for equal answers: the exact value of a number, else folded text without spaces and LaTeX dress."""
    number = parse_number(value)
    if number is not None:
        return f"{number.numerator}/{number.denominator}"
    text = unfrac(value.replace("−", "-"))
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
    return text if number is None else f"{number.numerator}/{number.denominator}"


def is_correct(value: str | None, gold: str) -> bool:
    """True when ``value`` means the same as ``gold``."""
    if value is None:
        return False
    ours, theirs = canonical(value), canonical(gold)
    if ours == theirs or not ours or not theirs:
        return ours == theirs and bool(ours)
    if parse_number(value) is not None and parse_number(gold) is not None:
        return False
    if "," in value + gold and "." in value + gold:  # "3,5" and "3.5"; two numbers in a list are no decimal
        left, right = parse_number(value, decimal_comma=True), parse_number(gold, decimal_comma=True)
        if left is not None and left == right:
            return True
    return bool(_LOOKS_MATHEMATICAL.search(gold) and _LOOKS_MATHEMATICAL.search(value)) and same_mathematics(
        value, gold
    )


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
    found: list[Any] = math_verify.parse(text, parsing_timeout=_seconds())
    return found


def load_math_verify() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import math_verify
    except ImportError:
        raise RsgwmError("math-verify is not installed; run: pip install 'math-verify[antlr4_13_2]'") from None
    return math_verify


def _in_math_mode(text: str) -> str:
    return text if "$" in text or "\\(" in text or "\\boxed" in text else f"${text}$"


def _seconds() -> int | None:
    # math-verify's time limit is a signal, and only the main thread may set one.
    return SECONDS if threading.current_thread() is threading.main_thread() else None
