r"""The many spellings of the same digits, signs and separators, folded into one for the readers of numbers.

Digits of other scripts and full-width forms become ASCII, as do their minus, decimal and thousands signs; ``½`` becomes
``1/2``, ``10³`` becomes ``10^3``; of LaTeX, only what dresses numbers is undone (``15{,}000``, ``\$``, ``\frac12``).
Nothing here decides what a number means: ``1.234`` and ``3,5`` come out as they went in.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

MAX_DIGITS = 300  # longer ones are a model that got stuck; int() itself refuses beyond 4300

_FRAC = re.compile(
    r"(?:(?P<integer>[0-9])\s*)?\\[dtc]?frac\s*(?:\{\s*(-?[0-9.,]+)\s*\}|([0-9]))\s*(?:\{\s*(-?[0-9.,]+)\s*\}|([0-9]))"
)
_NOT_ASCII = re.compile(r"[⁺⁻]?[⁰¹²³⁴-⁹]+|[^\x00-\x7f]")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_FOLDED = {
    "\u2212": "-", "\ufe63": "-", "\u2010": "-", "\u2011": "-", "\u2012": "–",
    "\u066b": ".", "\u066c": ",", "\u066a": "%", "\u060c": ", ", "\u3002": ". ", "\u3001": ", ", "\u0964": ". ",
    "\u2026": "...", "\u2044": "/", "\u2215": "/", "\u00b7": "×", "\u22c5": "×", "\u2219": "×", "\u2715": "×",
    "\u2716": "×", "\u2217": "×", "\u02da": "°", "\u00ba": "°",
}  # fmt: skip
_SPACES = set("\u00a0\u202f\u2007\u2008\u2009\u2004\u2005\u2006\u3000")  # all of them as the first
_INVISIBLE = set("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad") | {chr(c) for c in range(0x202A, 0x202F)}
_INVISIBLE |= {chr(c) for c in range(0x2066, 0x206A)}

_REPEATING = re.compile(
    r"(?P<integer>\d{1,20})?\.(?P<fixed>\d{0,20})(?:\\(?:overline|bar|dot)\s*\{(?P<period>\d{1,20})\}|\((?P<brackets>\d{1,6})\))"
)
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathbf|mathrm|mathit|mathsf|mbox|emph|underline|operatorname)\s*"
    r"\{([^{}]*)\}"
)
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\([$%#&_])", r"\1"),
        (r"(?<=\d),\\[!,;: ](?=\d)", ","),
        (r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", "\u00a0"),
        (r"(?<=\d)\\!(?=\d)", ""),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])", "×"),
        (r"\\div(?![a-zA-Z])", "÷"),
        (r"\\(?:pm|mp)(?![a-zA-Z])", "±"),
        (r"\\approx(?![a-zA-Z])", "≈"),
        (r"\\neq?(?![a-zA-Z])", "≠"),
        (r"\\sqrt(?![a-zA-Z])", "√"),
        (r"\^\s?\{?\s?\\circ\s?\}?|\\degree(?![a-zA-Z])", "°"),
        (r"\\(?:left|right|displaystyle|[lc]?dots)(?![a-zA-Z])", ""),
        (r"\\q?quad(?![a-zA-Z])", " "),
        (r"\\[()\[\],;:! ]|~", " "),
    )
)


@lru_cache(maxsize=4096)
def _folded(character: str) -> str:
    """What one character outside ASCII (or a run of superscript digits) stands for; most stand for themselves."""
    if character[-1] in "⁰¹²³⁴⁵⁶⁷⁸⁹":
        return "^" + character.translate(_SUPERSCRIPTS)
    if character in _FOLDED:
        return _FOLDED[character]
    if character in _SPACES:
        return "\u00a0"
    if character in _INVISIBLE:
        return ""
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if "\uff01" <= character <= "\uff5e":
        return chr(ord(character) - 0xFEE0)
    spelled = unicodedata.normalize("NFKC", character)
    return spelled.replace("\u2044", "/") if re.fullmatch("[0-9]+\u2044[0-9]+", spelled) else character


def fold_digits(text: str) -> str:
    """``text`` with digits, signs, spaces and fractions of every script in one spelling; LaTeX is left alone."""
    if text.isascii():
        return text

    def fold(match: re.Match[str]) -> str:
        plain = _folded(match[0])
        mixed = "/" in plain and len(plain) > 1 and match.start() and text[match.start() - 1].isdecimal()
        return " " + plain if mixed else plain  # "2½" is "2 1/2"

    return _NOT_ASCII.sub(fold, text)


def unfrac(text: str) -> str:
    r"""Numeric LaTeX fractions as a/b: ``\frac{7}{25}``, ``\frac12`` (dfrac, tfrac, cfrac); ``6\frac15`` as 6 1/5."""

    def plain(match: re.Match[str]) -> str:
        integer = f"{match['integer']} " if match["integer"] else ""
        return f"{integer}{match[2] or match[3]}/{match[4] or match[5]}"

    return _FRAC.sub(plain, text) if "frac" in text else text


def _repeating(match: re.Match[str]) -> str:
    integer, fixed, period = match["integer"] or "0", match["fixed"], match["period"] or match["brackets"]
    nines = 10 ** len(period) - 1
    value = int(integer) + Fraction(int(fixed or 0) * nines + int(period), 10 ** len(fixed) * nines)
    return f"{value.numerator}/{value.denominator}"


def undress_latex(text: str) -> str:
    r"""LaTeX's dress of numbers taken off: ``\$15,\!000``, ``15{,}000``, ``\text{ cm}``, ``0.\overline{3}``."""
    text = re.sub(r"\\text\{,\}|\{,\}", ",", text).replace("{.}", ".")
    text = _REPEATING.sub(_repeating, text)
    if "\\" not in text and "~" not in text:
        return text
    text = unfrac(text)
    for _ in range(2):  # \textbf{\text{B}}
        text = _WRAPPED.sub(r" \1 ", text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def fold(text: str) -> str:
    """Both foldings, as readers of numbers in running text want them."""
    return undress_latex(fold_digits(text))
