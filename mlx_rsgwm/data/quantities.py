"""Quantities in running text: numbers with sign, currency and scale, and what looks like a number but is none.

Every function here reads text that :func:`~mlx_rsgwm.data.digits.fold` has folded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from mlx_rsgwm.data.ideographs import IDEOGRAPHS, read_ideographs
from mlx_rsgwm.data.number_words import NUMBER_WORDS, read_words, scale_after
from mlx_rsgwm.data.numbers import CURRENCY, MAX_DIGITS, NUMERAL, POWER_OF_TEN, power_of_ten, read_numeral, write_number


@dataclass(frozen=True)
class Quantity:
    """A number in a text, from its sign to its scale. ``value`` is None for a date, a time, a ratio, a range and for
    digits that could be two numbers; ``fraction`` says that it was written a/b."""

    start: int
    end: int
    value: Fraction | None
    fraction: bool = False
    plain: Fraction | None = None  # the value without a word that multiplies it ("4" of "4 million")

    @property
    def text(self) -> str:
        """Canonical spelling; only for a quantity with a value."""
        assert self.value is not None
        return str(self.value) if self.fraction else write_number(self.value)


_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|"
    r"Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_NO_NUMBER = re.compile(
    rf"(?<![\w.])(?:[0-9]{{4}}-[0-9]{{1,2}}-[0-9]{{1,2}}|[0-9]{{4}}/[0-9]{{1,2}}/[0-9]{{1,2}}"
    rf"|[0-9]{{1,2}}([/.])[0-9]{{1,2}}\1[0-9]{{2,4}}|{_MONTH}\s[0-9]{{1,2}}(?:st|nd|rd|th)?(?:,?\s[0-9]{{4}})?"
    rf"|[0-9]{{1,2}}(?:st|nd|rd|th|\.)?\s{_MONTH}(?:,?\s[0-9]{{4}})?"
    rf"|[0-9]+(?:(?::| : )[0-9]+)+(?:\s?[ap]\.?m\b\.?)?|[0-9]+(?:/[0-9]+){{2,}}"
    rf"|[0-9]{{1,2}}\s?[ap]\.?m\b\.?|0[bB][01]+|0[xX](?=[0-9]*[a-fA-F])[0-9a-fA-F]+|{NUMERAL}\s?±\s?{NUMERAL})(?![0-9])"
)
_RANGE = re.compile(rf"({NUMERAL})(?:-|\s?[–—~～〜到至]\s?)(?:{CURRENCY}\s?)?({NUMERAL})(?![0-9/]|\s?=)")
_CODE = re.compile(r"(?:USD|EUR|GBP|INR|JPY|CNY|RMB|CHF|CAD|AUD|Rs\.?|kr\.?|R)\s?$")
_NUMBER = re.compile(
    rf"(?:(?P<mixed>[0-9]{{1,6}})(?:[ \u00a0]| and |&)(?=[0-9]+/[0-9]))?(?P<top>{NUMERAL})"
    rf"(?:{POWER_OF_TEN}|\s?/\s?(?P<bottom>{NUMERAL})(?![/]?[0-9])|(?:\^|\*\*)\{{?\s?(?P<power>[-+]?[0-9]{{1,3}})(?:\s?\}})?)?"
)
# A minus is a sign only where no number or word stands before it ("10-5" ends in 5) and no space after it.
_SIGN = re.compile(
    rf"(?:(?:(?<![\w)\]}}.%°])|(?<=[是为為は等于於到约約]))(?P<sign>[-+–]|±\s?)(?:{CURRENCY}\s?)?|{CURRENCY}\s?(?P<inner>-)?)$"
)
_SIGN_WORD = re.compile(
    r"(?<![\w-])(?:negative|minus|moins|menos|meno|минус|माइनस|ऋण|السالب|سالب|负|マイナス)\s?(?:[$€£]\s?)?$",
    re.IGNORECASE,
)
_SYMBOLIC = re.compile(r"\s(?:squared|cubed|factorial)\b|\s?(?:√|π|\\pi\b)|[abnpqtuvwxyz](?![\w²³])(?!\s?[0-9])")
_SUBTRACTED = re.compile(r"[0-9)][\w%$.,)]*\s+(?:[^\W\d]+\s+)?$")
_BELOW_ZERO = re.compile(
    r"\s?(?:°\s?[CF]?|degrees?(?: (?:Celsius|Fahrenheit|C|F))?)?\s?below (?:zero|freezing)\b", re.IGNORECASE
)
_AND_PART = re.compile(r"\s(?:and|&)\s(?:an?\s|one[ -])?(half|third|quarter)\b", re.IGNORECASE)
# A hundredth of the money before it: "17 dollars and 50 cents", "17 рублей 50 копеек"; 元 has tenths, too.
_CENTS = re.compile(
    r"(?P<money>\s?(?:dollars?|euros?|pounds?|bucks?|francs?|franken|pesos?|rea(?:l|is)|rupees?|rou?bles?|руб\w*\.?|"
    r"złot\w+|zł|kron\w+|kr\.?)(?![^\W\d]))?,?\s(?:(?:and|und|et|y|e|con|en|i|och|og|и)\s)?(?P<cents>[0-9]{1,2})\s"
    r"(?:cents?|pence|centimes?|rappen|céntimos?|centavos?|centesim[io]|kope[ec]?ks?|копе\w+|коп\.?|grosz\w*|öre|øre|"
    r"pais[ae])(?![^\W\d])",
    re.IGNORECASE,
)
_JIAO = re.compile(r"\s?[元块塊](?P<jiao>[0-9])[角毛](?:(?P<fen>[0-9])分)?")
_MONEY_WORD = re.compile(
    rf"\s?(?:{CURRENCY}|(?:EUR|USD|GBP|INR|CHF|euros?|dollars?|pesos|reais|rupees|rublos|pounds|Kronen|kronor|kroner|руб\w*|Franken)\b)",
    re.IGNORECASE,
)  # fmt: skip
_COMMA_WORDS = re.compile(
    r"\b(?:Antwort|Ergebnis|insgesamt|réponse|résultat|respuesta|resultado|risposta|risultato|resposta|antwoord|svaret?|"
    r"ответ|результат|odpowiedź|vastaus|cevap)\b|\b(?:der|die|das|und|ist|sind|kostet|les|des|une|sont|est|los|las|una|"
    r"cuesta|gli|della|het|een|och|är|это|как)\b",
    re.IGNORECASE,
)
_POINT_WORDS = re.compile(r"\b(?:the|is|of|and|so|she|he|are|has|answer|total)\b", re.IGNORECASE)
_PART_VALUES = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}


def writes_decimal_commas(text: str) -> bool:
    """Whether a text is in a language that writes 3,5 for three and a half, as far as its small words tell."""
    sample = text[-4000:]
    return len(_COMMA_WORDS.findall(sample)) > len(_POINT_WORDS.findall(sample))


def quantities(text: str, decimal_commas: bool = False) -> list[Quantity]:
    """Every quantity of a folded text, in order.

    ``decimal_commas``: the text's language writes them (:func:`writes_decimal_commas`). Then "1.234" and "1,234" have
    no one value, unless money says so; elsewhere the comma groups thousands, and "3,5" is three and a half in either.
    """
    text = re.sub(r"\bRs\.(?=\s?[0-9])", "Rs ", text)
    blocked = [Quantity(match.start(), match.end(), None) for match in _NO_NUMBER.finditer(text)]
    blocked += [_range(match) for match in _RANGE.finditer(text) if _is_range(text, match)]
    blocked.sort(key=lambda quantity: quantity.start)
    return list(_merged(text, blocked, decimal_commas))


def _merged(text: str, blocked: list[Quantity], decimal_commas: bool) -> Iterator[Quantity]:
    position, index = 0, 0
    while (match := _NUMBER.search(text, position)) is not None:
        while index < len(blocked) and blocked[index].end <= match.start():
            index += 1
        if index < len(blocked) and blocked[index].start < match.end():
            quantity: Quantity | None = blocked[index]
        else:
            quantity = _quantity(text, match, decimal_commas)
        position = match.end() if quantity is None else max(quantity.end, match.end())
        if quantity is not None:
            yield quantity


def _is_range(text: str, match: re.Match[str]) -> bool:
    low, high = read_numeral(match[1], True), read_numeral(match[2], True)
    before = text[max(0, match.start() - 4) : match.start()]
    return (
        low is not None
        and high is not None
        and low < high
        and not re.search(r"[-+*/×÷^=√_]\s?$|(?<![A-Za-z'’])[A-Za-z]\s?$|[A-Za-z]$", before)
    )


def _range(match: re.Match[str]) -> Quantity:
    return Quantity(match.start(), match.end(), None)


def _quantity(text: str, match: re.Match[str], decimal_commas: bool) -> Quantity | None:
    """The quantity at a match of ``_NUMBER``, or None where its digits belong to a name, an ordinal or an exponent."""
    before = text[max(0, match.start() - 24) : match.start()]
    if (
        re.search(r"[^\W\d]-?$|[_^]$|\^\{$|√\s?\{?$", before)
        and not _CODE.search(before)
        and not _is_ideograph(before.rstrip("-")[-1:])
    ):
        return None
    if re.match(r"(?:st|nd|rd|th|er|ère|ème|º|ª)\b|[A-EG-JO-UW-Z](?![\w²³/])|_\w", text[match.end() : match.end() + 4]):
        return None
    sign = _SIGN.search(before)
    start = match.start() - (len(sign[0]) if sign else 0)
    money = bool(re.search(rf"{CURRENCY}\s?-?$|(?:USD|EUR|GBP|INR|Rs\.?)\s?$", before))
    value, fraction = _value(text, match, decimal_commas, money), bool(match["bottom"] or match["mixed"])
    end = match.end()
    if (sign and (sign["sign"] or "").startswith("±")) or (re.match(r"!\s?[.)=+*,]", text[end : end + 3])):
        value = None
    if _SYMBOLIC.match(text, end) or (match["power"] is None and re.match(r"\s?(?:\^|\*\*)", text[end : end + 2])):
        value = None  # "2√3", "3x", "2^n"
    word = _SIGN_WORD.search(before)
    negative = bool(sign and (sign["sign"] in ("-", "–") or sign["inner"]))
    if word and not _SUBTRACTED.search(before[: word.start()]):
        negative, start = True, match.start() - len(before) + word.start()
    quantity = _scaled(text, Quantity(start, end, value, fraction), money)
    if _BELOW_ZERO.match(text, quantity.end):
        negative = True
    if negative and quantity.value is not None:
        quantity = replace(quantity, value=-quantity.value)
    return quantity


def _is_ideograph(character: str) -> bool:
    return character >= "\u0900"  # scripts without spaces between words and numbers, whose letters name no variables


def _value(text: str, match: re.Match[str], decimal_commas: bool, money: bool) -> Fraction | None:
    top_text = match["top"]
    money = money or bool(_MONEY_WORD.match(text, match.end()))
    grouped = top_text.count(" ") == 1 and not decimal_commas and not money
    # "3 250 ml": three bottles of 250 ml, or 3,250 ml? No bottle is of 000 ml.
    if grouped and not re.search(r" 0", top_text) and re.match(r"\s+[^\W\d]|-", text[match.end() : match.end() + 3]):
        return None
    if not decimal_commas and re.fullmatch(r"[0-9]+,0{4,}", top_text):
        return None  # a slip of the thousands
    if decimal_commas and re.fullmatch(r"[1-9][0-9]{0,2}[.,][0-9]{3}", top_text):
        top = Fraction(re.sub(r"[.,]", "", top_text)) if money else None
    else:
        top = read_numeral(top_text, decimal_comma=True)
    opened, closed = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
    if top is None or ("," in top_text and opened + closed in ("()", "[]", "{}", "(]", "[)") and top.denominator > 1):
        return None  # "(3,4)" is a point
    if match["power"]:
        return _power(top, int(match["power"]))
    bottom = read_numeral(match["bottom"], decimal_comma=True) if match["bottom"] else Fraction(1)
    scale = power_of_ten(match["e"] or match["exponent"])
    if not bottom or scale is None:
        return None
    part = top * scale / bottom
    return Fraction(match["mixed"]) + part if match["mixed"] else part


def _power(base: Fraction, exponent: int) -> Fraction | None:
    digits = len(str(base.numerator)) + len(str(base.denominator))
    if digits * abs(exponent) > MAX_DIGITS or (not base and exponent < 0):
        return None
    return base**exponent


def _scaled(text: str, quantity: Quantity, money: bool) -> Quantity:
    """The quantity with what follows it: "and a half", "million", "dollars and 50 cents"."""
    value = quantity.value
    if value is None:
        return quantity
    part = _AND_PART.match(text, quantity.end)
    if part is not None and value.denominator == 1:
        value = value + _PART_VALUES[part[1].lower()]
        quantity = replace(quantity, value=value, end=part.end(), fraction=value.denominator % 3 == 0)
    scale = scale_after(text, quantity.end, money)
    if scale is not None:
        quantity = replace(quantity, value=value * scale[0], end=scale[1], plain=value)
        value = value * scale[0]
    cents, jiao = _CENTS.match(text, quantity.end), _JIAO.match(text, quantity.end)
    if cents is not None and (money or cents["money"]):
        quantity = replace(quantity, value=value + Fraction(int(cents["cents"]), 100), end=cents.end())
    elif jiao is not None:
        hundredths = int(jiao["jiao"] + (jiao["fen"] or "0"))
        quantity = replace(quantity, value=value + Fraction(hundredths, 100), end=jiao.end())
    return quantity


def word_quantities(text: str) -> list[Quantity]:
    """Quantities in words ("twenty-five", "minus two and a half"); "one" and "half" of something are none."""
    numbers = []
    for match in NUMBER_WORDS.finditer(text):
        if match[0].lower() in ("one", "half", "third", "quarter", "second") and re.match(
            r"\s+(?:of|can|could|must|would|should|who|which|that|needs?|has)\b", text[match.end() : match.end() + 8]
        ):
            continue
        value = read_words(match[0])
        before = text[max(0, match.start() - 24) : match.start()]
        if value is not None and _SIGN_WORD.search(before):
            value = -value
        numbers.append(Quantity(match.start(), match.end(), value, value is not None and value.denominator % 3 == 0))
    for match in IDEOGRAPHS.finditer(text):
        value = read_ideographs(match)
        if value is not None and _SIGN_WORD.search(text[max(0, match.start() - 24) : match.start()]):
            value = -value
        numbers.append(Quantity(match.start("number"), match.end("number"), value))
    return sorted(numbers, key=lambda number: number.start)
