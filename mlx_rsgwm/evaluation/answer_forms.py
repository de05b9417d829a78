"""What form an answer has: a number with a unit, something compared as it is written, or mathematics.

Only mathematics may be rearranged. Versions, addresses, times, dates, ratios and words are right only as they are
written (folded case, single spaces), and "10 g" is not "10 kg"; math-verify by itself drops units and reads "3.11.40"
as a product.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from mlx_rsgwm.data.digits import fold_digits
from mlx_rsgwm.data.number_words import scale_after
from mlx_rsgwm.data.numbers import parse_number

_SPELLINGS = {
    "km": "kilometer kilometre", "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre",
    "mi": "mile", "ft": "foot feet", "in": "inch inche", "yd": "yard", "kg": "kilogram kilo kilogramme",
    "g": "gram gramme", "mg": "milligram", "t": "tonne", "lb": "pound", "oz": "ounce", "l": "liter litre L",
    "ml": "milliliter millilitre", "h": "hour hr", "min": "minute", "s": "second sec", "ms": "millisecond",
    "d": "day", "wk": "week", "yr": "year", "mph": "", "km/h": "kph kmh", "%": "percent",
    "$": "dollar usd us$", "€": "euro eur", "£": "gbp", "¥": "yen jpy", "₹": "rupee inr", "¢": "cent",
    "°c": "celsius", "°f": "fahrenheit", "K": "kelvin", "W": "watt", "kw": "kilowatt", "Mw": "megawatt",
    "J": "joule", "N": "newton", "V": "volt", "A": "ampere amp", "hz": "hertz", "b": "byte", "gb": "gigabyte",
    "Mb": "megabyte",
}  # fmt: skip
_UNITS = {word: unit for unit, words in _SPELLINGS.items() for word in words.split()}
_UNITS |= {
    "mile per hour": "mph",
    "kilometer per hour": "km/h",
    "per cent": "%",
    "degree celsius": "°c",
    "degree fahrenheit": "°f",
}
# Units of one quantity by exact factors. Metric and imperial stay apart: their conversions are rarely exact in a draft.
_BASE_UNITS: dict[str, tuple[str, Fraction]] = {
    unit: (base, Fraction(factor))
    for base, factors in {
        "mm": {"mm": 1, "cm": 10, "m": 10**3, "km": 10**6},
        "in": {"in": 1, "ft": 12, "yd": 36, "mi": 63360},
        "mg": {"mg": 1, "g": 10**3, "kg": 10**6, "t": 10**9},
        "oz": {"oz": 1, "lb": 16},
        "ml": {"ml": 1, "l": 10**3},
        "ms": {"ms": 1, "s": 10**3, "min": 60_000, "h": 3_600_000, "d": 86_400_000, "wk": 604_800_000},
        "¢": {"¢": 1, "$": 100},
    }.items()
    for unit, factor in factors.items()
}
_SYMBOL = (
    r"(?:[kKMGTdcmµnp]?(?:m|g|s|[lL]|W|Hz|Pa|V|A|J|N|B|b|bit|bps|Wh|cal|eV)|KM|KG|CM|hz|gb|mb|kb|tb|h|d|t|K|min|hrs?|sec|"
    r"mi|ft|in|yds?|lbs?|oz|mph|kmh|kph|rpm|ha|°\s?[CF]|°|%|[$€£¥₹¢])(?:\s?\^\s?\{?[23]\}?)?"
)
_UNIT = re.compile(
    rf"(?P<symbol>{_SYMBOL}(?:\s?/\s?{_SYMBOL})?)"
    r"|(?P<words>[^\W\d_][^\W\d_'’-]*(?:[ '’/-]+[^\W\d_][^\W\d_'’-]*){0,4})"
)
# "m s^-1" is "m/s".
_NEGATIVE_POWER = re.compile(rf"({_SYMBOL})\s?[·⋅*]?\s?([a-zA-Z]{{1,3}})\s?\^\s?\{{?\s?-([123])\s?\}}?(?![0-9])")
_PREFIXED = re.compile(r"M(?:[mgslLWVAJNBb]|Hz|Pa|Wh|eV|bps|bit)(?![a-zA-Z])")
_AMOUNT = re.compile(r"[-+–]?\s*(?:[0-9][0-9.,_ /'’]*[0-9]|[0-9]|\.[0-9]+)")
_SCIENTIFIC = re.compile(
    r"\s?[×*x·]\s?10\s?(?:\^|\*\*)\s?\{?\s?[-+]?[0-9]{1,3}\s?\}?(?![0-9])|[eE][-+]?[0-9]{1,3}(?![0-9])"
)
_POWER = re.compile(r"\s?(?:\^|\*\*)\s?\{?\s?([-+]?[0-9]{1,2})\s?\}?(?![0-9])")
_MONEY = re.compile(r"(?:(?P<sign>[-–])\s?)?(?P<currency>(?:US|CA|AU|A|C)?\$|[€£¥₹])\s?")
_LATEX_AMOUNT = re.compile(r"(?P<amount>.*(?:[0-9})]|\\pi))\s*\\(?:text|mbox|mathrm|textrm)\s*\{(?P<unit>[^{}]*)\}")
_DRESS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")

_AS_WRITTEN = re.compile(
    r"v?[0-9]+(?:\.[0-9]+){2,}\S*|v[0-9]+(?:\.[0-9]+)*|[0-9]{1,4}([-/])[0-9]{1,2}\1[0-9]{1,4}"
    r"|[0-9]+\s?:\s?[0-9]+(?:\s?:\s?[0-9]+)*(?:\s?[ap]\.?m\.?)?|[0-9]{1,2}\s?[ap]\.?m\.?|[0-9]+(?:-[0-9]+)+"
    r"|(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}|[0-9]+(?:\.[0-9]+){3}(?::[0-9]+|/[0-9]+)?",
    re.IGNORECASE,
)
_FUNCTIONS = (
    "and|or|sin|cos|tan|cot|sec|csc|log|exp|sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|mod|gcd|lcm|max|min|infty|infinity|"
    "inf|alpha|beta|gamma|delta|theta|lambda|sigma|omega|phi|for|all|real|where|union"
)
_WORD = re.compile(rf"(?<![\w\\^_{{])(?!(?:{_FUNCTIONS})(?![^\W\d_]))[^\W\d_]{{3,}}", re.IGNORECASE)


@dataclass(frozen=True)
class Amount:
    """A value with its unit. ``value`` is None where the amount is no plain number but ``formula``."""

    value: Fraction | None
    formula: str
    unit: str


def unit_name(text: str) -> str:
    """One spelling for a unit ("kilometres" is km). Case counts where it tells mega from milli."""
    text = re.sub(r"\s+of\b.*", "", re.sub(r"\s+", " ", text.strip(" .")))
    if len(text) == 1:
        return _UNITS.get(text, text)
    mega = _PREFIXED.match(text)
    bits = re.fullmatch(r"[kKMGT]b(?:ps)?", text)
    folded = ("M" + text[1:].casefold()) if mega else text.casefold()
    folded = re.sub(r"[\s{}]", "", folded) if re.search(r"[\^/°]", folded) else folded
    if bits and not text.endswith("ps"):
        return text.upper().replace("B", "bit")
    words = [re.sub(r"(?<=[a-z]{2})(?<!siu)s$", "", word) for word in folded.split(" ")]
    folded = " ".join(words) if folded not in ("ms", "gs") else folded
    folded = re.sub(r"^degrees?$", "°", folded)
    return _UNITS.get(folded, folded)


def read_amount(text: str) -> Amount | None:
    r"""A text that is an amount with a unit, a scale word or a currency ("$5 million", ``18\pi\text{ cm}``)."""
    latex = _LATEX_AMOUNT.fullmatch(re.sub(r"\s*\^\s*\{?([23])\}?$", "", text.strip(" $.")))
    if latex and latex["unit"].strip():
        unit = latex["unit"] + "".join(re.findall(r"(\^\{?[23]\}?)\s*\.?$", text.strip(" $.")))
        if _UNIT.fullmatch(latex["unit"].strip()):
            number = parse_number(latex["amount"])
            number = read_power(latex["amount"]) if number is None else number
            return Amount(number, latex["amount"].strip(), unit_name(unit))
    text = _NEGATIVE_POWER.sub(
        lambda match: f"{match[1]}/{match[2]}" + (f"^{match[3]}" if match[3] != "1" else ""), plain_text(text)
    )
    money = _MONEY.match(text)
    sign = (money["sign"] or "") if money else ""
    rest = text[money.end() :] if money else text
    match = _AMOUNT.match(rest)
    number = parse_number(sign + match[0]) if match else None
    if match is None or number is None:
        return None
    powered = _powered(rest, sign, match, number)
    if powered is not None:
        value, tail = powered[0], rest[powered[1] :].strip()
        unit = _UNIT.fullmatch(tail)
        if value is None or unit is None or (unit["symbol"] is None and len(tail) < 3):
            return None
        return Amount(value, "", unit_name(tail))
    scale = scale_after(rest, match.end(), money is not None)
    if scale is None and money:
        letter = re.match(r"\s?(m|k)(?![^\W_])", rest[match.end() :], re.IGNORECASE)
        scale = (10**6 if letter[1] in "mM" else 10**3, match.end() + letter.end()) if letter else None
    end = match.end() if scale is None else scale[1]
    number = number if scale is None else number * scale[0]
    tail = rest[end:].strip()
    if not tail:
        return Amount(number, "", unit_name(money["currency"]) if money else "") if money or scale else None
    unit = _UNIT.fullmatch(tail)
    if unit is None or (unit["symbol"] is None and not rest[end : end + 1].isspace() and len(tail) < 3):
        return None  # "5xy" is mathematics
    if unit["symbol"] is None and len(tail) < 3:
        return None
    return Amount(number, "", unit_name(tail))


def _powered(text: str, sign: str, match: re.Match[str], number: Fraction) -> tuple[Fraction | None, int] | None:
    """The value of a number with an exponent ("10⁻²", "5 × 10⁻²") and where it ends, or None without an exponent."""
    scientific = _SCIENTIFIC.match(text, match.end())
    if scientific is not None:
        return parse_number(sign + match[0] + scientific[0].replace("·", "×")), scientific.end()
    power = _POWER.match(text, match.end())
    if power is None:
        return None
    exponent = int(power[1])
    readable = number >= 0 and len(match[0]) <= 9 and (number != 0 or exponent >= 0)
    return number**exponent if readable else None, power.end()


def read_power(text: str) -> Fraction | None:
    """The value of a text that is a number with an exponent and nothing else ("10⁻²")."""
    text = plain_text(text)
    match = _AMOUNT.match(text)
    number = parse_number(match[0]) if match else None
    powered = _powered(text, "", match, number) if match is not None and number is not None else None
    return powered[0] if powered is not None and powered[1] == len(text) else None


def convertible(unit: str, other: str) -> bool:
    """Whether one unit is an exact multiple of the other (metres and centimetres, dollars and cents)."""
    return unit in _BASE_UNITS and other in _BASE_UNITS and _BASE_UNITS[unit][0] == _BASE_UNITS[other][0]


def in_base_unit(amount: Amount) -> Fraction | None:
    """The value in the smallest unit of its kind; only for a unit that :func:`convertible` knows."""
    return None if amount.value is None else amount.value * _BASE_UNITS[amount.unit][1]


def plain_text(text: str) -> str:
    """One spelling of a text that is compared as written: compatibility forms, LaTeX dress and spaces folded."""
    text = unicodedata.normalize("NFKC", fold_digits(text))
    text = _DRESS.sub(r" \1 ", text) if "\\" in text else text
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])", "°", text)
    text = re.sub(r"\\([$%#&_])", r"\1", text).replace("\\!", "").replace("\\ ", " ")
    if text.count("$") == 2 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1]
    text = text.translate({0x2019: "'", 0x2018: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-", 0x2212: "-"})
    text = re.sub(r"\s+", " ", text).strip(" \"'").rstrip(".").strip(" \"'")
    return re.sub(r"(?<=[^\W\d_]),\s*(?=[^\W\d_])", ", ", text)


def written(text: str) -> str | None:
    """The folded text where it may only be compared as written; None for what could be mathematics."""
    plain = plain_text(text)
    if re.search(r"\\[a-zA-Z]", plain):
        return None
    if _AS_WRITTEN.fullmatch(plain):
        plain = re.sub(r"\s?([ap])\.?m\.?$", r" \1m", plain, flags=re.IGNORECASE)
        return re.sub(r"\s?:\s?", ":", plain).casefold()
    glued = " " not in plain and re.search(r"[=^*]|[+/](?=.)", plain)
    if not glued and _WORD.search(plain) and not re.search(r"[=^]", plain):
        return re.sub(rf"(?<=[0-9])\s*(?={_SYMBOL}(?![^\W_]))", " ", plain).casefold()
    if re.fullmatch(r"[^\W\d_]+(?:[+#]+|[0-9.]*|-[0-9][\w.]*)", plain) and re.search(r"[A-Z]{2}|[a-z]{3}|[+#]$", plain):
        return plain.casefold()
    return None
