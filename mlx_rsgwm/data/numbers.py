"""Numbers as people write them: found in text, read as exact fractions, written back in the same style.

Everything is :class:`fractions.Fraction`; no float ever decides whether an answer is right. What could be two numbers
("3,5" is one in German and two in a list) is read only where the caller says which it is.
"""

from __future__ import annotations

import re
from fractions import Fraction

from mlx_rsgwm.data.digits import MAX_DIGITS as MAX_DIGITS
from mlx_rsgwm.data.digits import fold
from mlx_rsgwm.data.digits import unfrac as unfrac

# An unsigned literal as worked solutions write it: thousands commas only in groups of three, ".35" allowed.
LITERAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
CURRENCY = "[$€£¥₹₩₽₺₫₴₦₱¢฿]"
# Any run of digits that may be one number; ``read_numeral`` says whether it is. A space or an apostrophe groups
# thousands only if all of them do. Every pattern here is meant for text that ``fold`` has folded.
_GROUPED = (
    r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?: [0-9]{3})+|(?:\u00a0[0-9]{3})+|(?:['’][0-9]{3})+)(?![0-9])(?:[.,][0-9]+)?"
)
NUMERAL = rf"(?:{_GROUPED}|[0-9]+(?:[.,_][0-9]+)*|\.[0-9]+)"
POWER_OF_TEN = (
    r"(?:[eE](?P<e>[-+]?[0-9]{1,4})(?![\w.]\w)"
    r"|\s?[×xX*]\s?10\s?(?:\^|\*\*)\s?\{?\s?(?P<exponent>[-+–]?[0-9]{1,4})(?:\s?\})?)"
)

_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_COMMAS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?")
_POINTS = re.compile(r"[1-9][0-9]{0,2}(?:(?:\.[0-9]{3}){2,}(?:,[0-9]+)?|\.[0-9]{3},[0-9]+)")
_GAPS = re.compile(r"[0-9]{1,3}(?:[ \u00a0'’_][0-9]{3})+(?:[.,][0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[0-9]+,[0-9]+")
_WHOLE = re.compile(
    rf"(?P<sign>[-+–]?)\s*{CURRENCY}?\s*(?P<inner>[-+]?)(?:(?P<mixed>[0-9]{{1,6}})\s+(?=[0-9]+\s*/))?"
    rf"(?P<top>{NUMERAL})(?:{POWER_OF_TEN}|\s*/\s*(?P<bottom>{NUMERAL}))?\s*(?:\\?%|percent|{CURRENCY})?"
)


def read_literal(text: str) -> Fraction | None:
    """Value of an unsigned literal matched by ``LITERAL``; None beyond ``MAX_DIGITS``."""
    return Fraction(text.replace(",", "")) if len(text) <= MAX_DIGITS else None


def read_numeral(text: str, decimal_comma: bool = False) -> Fraction | None:
    """Value of an unsigned run of digits and separators in any style that has one reading, else None.

    ``1,234.5``, ``1.234.567,8``, ``12,34,567`` (lakh), ``1 234``, ``1'234``; with ``decimal_comma`` also ``3,5``.
    """
    if len(text) > MAX_DIGITS:
        return None
    if _PLAIN.fullmatch(text):
        return Fraction(text)
    if _COMMAS.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if _POINTS.fullmatch(text):
        return Fraction(text.replace(".", "").replace(",", "."))
    if _GAPS.fullmatch(text):
        return Fraction(re.sub(r"[ \u00a0'’_]", "", text).replace(",", "."))
    if decimal_comma and _DECIMAL_COMMA.fullmatch(text):
        return Fraction(text.replace(",", "."))
    return None


def power_of_ten(exponent: str | None) -> Fraction | None:
    """Ten to an exponent as text, None beyond ``MAX_DIGITS`` digits; one without an exponent."""
    power = int((exponent or "0").replace("–", "-"))
    return Fraction(10) ** power if abs(power) <= MAX_DIGITS else None


def parse_number(text: str, decimal_comma: bool = False) -> Fraction | None:
    """Value of a text that is one number and nothing else, or None.

    Signs, thousands, decimals, currency, a/b, mixed numbers, powers of ten and LaTeX's forms of these are read. A
    percent sign is a unit like a dollar sign: "25%" is 25, as the gold answers of GSM8K write it.
    """
    if len(text) > 4 * MAX_DIGITS:
        return None
    match = _WHOLE.fullmatch(fold(text).strip())
    if match is None or (match["sign"] and match["inner"]):
        return None
    top = read_numeral(match["top"], decimal_comma)
    bottom = read_numeral(match["bottom"], decimal_comma) if match["bottom"] else Fraction(1)
    scale = power_of_ten(match["e"] or match["exponent"])
    if top is None or scale is None or not bottom:
        return None
    value = Fraction(match["mixed"] or 0) + top * scale / bottom
    return -value if match["sign"] in ("-", "–") or match["inner"] == "-" else value


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
    integer, part = divmod(scaled, 10**digits)
    text = f"{integer:,}" if "," in like else str(integer)
    if digits:
        text = ("" if like.startswith(".") and integer == 0 else text) + "." + str(part).zfill(digits)
    return "-" + text if value < 0 else text


def plain_number(text: str) -> str:
    """``text`` without commas and units if it is a number ("$1,080" → "1080"), else stripped.

    A fraction stays one, in lowest terms ("2/4" → "1/2"); everything else becomes an integer or a decimal.
    """
    value = parse_number(text)
    if value is None:
        return text.strip()
    return str(value) if "/" in fold(text) else write_number(value)
