"""Numbers as people write them: found in text, read as exact fractions, written back in the same style.

Everything is :class:`fractions.Fraction`; no float ever decides whether an answer is right.
"""

from __future__ import annotations

import re
from fractions import Fraction

# An unsigned literal: thousands commas only in groups of three, a leading point allowed (".35").
LITERAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
MAX_DIGITS = 300  # longer ones are a model that got stuck; int() itself refuses beyond 4300

_WHOLE = re.compile(
    rf"(?P<sign>[-+]?)\s*[$€£]?\s*(?P<inner>[-+]?)(?:(?P<mixed>[0-9]{{1,6}})\s+(?=[0-9]+\s*/))?"
    rf"(?P<top>{LITERAL})(?:\s*/\s*(?P<bottom>{LITERAL}))?\s*(?:\\?%|percent)?"
)
_FRAC = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?[0-9.,]+)\s*\}|([0-9]))\s*(?:\{\s*(-?[0-9.,]+)\s*\}|([0-9]))")


def read_literal(text: str) -> Fraction | None:
    """Value of an unsigned literal matched by ``LITERAL``; None beyond ``MAX_DIGITS``."""
    return Fraction(text.replace(",", "")) if len(text) <= MAX_DIGITS else None


def unfrac(text: str) -> str:
    r"""Numeric LaTeX fractions as a/b: ``\frac{7}{25}``, ``\frac12`` (and dfrac, tfrac, cfrac)."""
    return _FRAC.sub(lambda found: f"{found[1] or found[2]}/{found[3] or found[4]}", text)


def parse_number(text: str) -> Fraction | None:
    """Value of a text that is one number and nothing else, or None.

    Signs, thousands commas, decimals, currency, a/b, mixed numbers and numeric LaTeX fractions are read. A percent
    sign is a unit like a dollar sign: "25%" is 25, as the gold answers of GSM8K write it.
    """
    cleaned = unfrac(text.replace("−", "-").replace("–", "-").replace("\\$", "$").strip())
    found = _WHOLE.fullmatch(cleaned)
    if found is None or (found["sign"] and found["inner"]):
        return None
    top = read_literal(found["top"])
    bottom = read_literal(found["bottom"]) if found["bottom"] else Fraction(1)
    if top is None or not bottom:
        return None
    value = Fraction(found["mixed"] or 0) + top / bottom
    return -value if "-" in (found["sign"], found["inner"]) else value


def decimals_needed(value: Fraction) -> int | None:
    """Digits after the point that write ``value`` exactly, or None when no finite number of them does."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None


def write_number(value: Fraction, like: str = "") -> str:
    """Exact text of ``value``: an integer, a finite decimal, else a/b.

    ``like`` is a literal whose style is kept: thousands commas, a missing leading zero, and two decimals for money
    ("5.00"). The value is never rounded.
    """
    digits = decimals_needed(value)
    if digits is None or digits > MAX_DIGITS:
        return f"{value.numerator}/{value.denominator}"
    shown_before = like.rpartition(".")[2] if "." in like else ""
    if len(shown_before) == 2 or shown_before.endswith("0"):
        digits = max(digits, len(shown_before))
    scaled = abs(value.numerator) * 10**digits // value.denominator
    whole, part = divmod(scaled, 10**digits)
    text = f"{whole:,}" if "," in like else str(whole)
    if digits:
        text = ("" if like.startswith(".") and whole == 0 else text) + "." + str(part).zfill(digits)
    return "-" + text if value < 0 else text


def plain_number(text: str) -> str:
    """``text`` without commas and units if it is a number ("$1,080" → "1080"), else stripped.

    A fraction stays one, in lowest terms ("2/4" → "1/2"); everything else becomes an integer or a decimal.
    """
    value = parse_number(text)
    if value is None:
        return text.strip()
    return str(value) if "/" in unfrac(text) else write_number(value)
