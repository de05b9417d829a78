"""Numbers in words: English up to the billions, other languages' words for thousands and millions after digits.

"twenty-five", "two and a half million", "a dozen", "three quarters"; and what "2.5 million" or "5k" multiply by.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_UNITS = {word: value for value, word in enumerate(_SMALL)}
_UNITS |= {
    word: 10 * tens
    for tens, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2)
}
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "lakh": 10**5, "crore": 10**7,
}  # fmt: skip
_PARTS = {
    "half": Fraction(1, 2), "halves": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4),
    "fourth": Fraction(1, 4), "fifth": Fraction(1, 5), "sixth": Fraction(1, 6), "seventh": Fraction(1, 7),
    "eighth": Fraction(1, 8), "tenth": Fraction(1, 10),
}  # fmt: skip

# After digits: "5 dozen", "1,5 Millionen", "3万".
_AFTER_DIGITS: dict[str, int] = {word + ending: value for word, value in _SCALES.items() for ending in ("", "s")}
_AFTER_DIGITS |= {
    "mn": 10**6, "mln": 10**6, "bn": 10**9, "tn": 10**12, "lakhs": 10**5, "crores": 10**7, "lac": 10**5, "lacs": 10**5,
    "tausend": 10**3, "millionen": 10**6, "mio": 10**6, "milliarde": 10**9, "milliarden": 10**9, "mrd": 10**9,
    "dutzend": 12, "mille": 10**3, "milliard": 10**9, "milliards": 10**9, "douzaine": 12, "douzaines": 12,
    "millón": 10**6, "millones": 10**6, "docena": 12, "docenas": 12, "mila": 10**3, "milione": 10**6, "milioni": 10**6,
    "miliardi": 10**9, "milhão": 10**6, "milhões": 10**6, "miljoen": 10**6, "miljard": 10**9, "miljoner": 10**6,
    "тысяч": 10**3, "тысячи": 10**3, "миллион": 10**6, "миллиона": 10**6, "миллионов": 10**6, "млн": 10**6,
    "млрд": 10**9,
    "тыс": 10**3,
}  # fmt: skip
_GLUED = {"万": 10**4, "萬": 10**4, "億": 10**8, "亿": 10**8, "千": 10**3, "百万": 10**6, "만": 10**4, "억": 10**8}
_SCALE = re.compile(
    r"(?P<glued>百?[万萬]|[億亿千만억])|[ \u00a0-]?(?P<word>"
    + "|".join(sorted(_AFTER_DIGITS, key=len, reverse=True))
    + r")\b\.?|(?P<kilo>[kK])(?![\w²³^/])|(?P<letter>[MB])(?![\w²³^/])",
    re.IGNORECASE,
)

_WORD = "|".join(sorted((*_UNITS, *_SCALES, *_PARTS, *(f"{part}s" for part in _PARTS)), key=len, reverse=True))
NUMBER_WORDS = re.compile(
    rf"(?<![\w-])(?:an?[ \u00a0-])?(?:{_WORD})"
    rf"(?:(?:[ \u00a0-]|,[ ]|[ ]and[ ](?:an?[ ])?|[ ]an?[ ])(?:{_WORD})){{0,20}}(?![\w-])",
    re.IGNORECASE,
)


def scale_after(text: str, position: int, money: bool) -> tuple[int, int] | None:
    """What stands after digits and multiplies them, as (factor, end of the word): "million", "dozen", "k".

    ``money``: whether a currency stood before; only then a glued M, m or capital B is a million or a billion.
    """
    match = _SCALE.match(text, position)
    if match is None:
        return None
    if match["glued"]:
        return _GLUED[match["glued"]], match.end()
    if match["kilo"]:
        return 10**3, match.end()
    if match["letter"]:
        factor = {"M": 10**6, "m": 10**6, "B": 10**9}.get(match["letter"])
        return (factor, match.end()) if money and factor else None
    return _AFTER_DIGITS[match["word"].lower()], match.end()


def could_become_scale(text: str) -> bool:
    """Whether a text that was cut off after a number could have gone on to multiply it ("3 mill")."""
    tail = text.strip().lower()
    return any(word.startswith(tail) for word in _AFTER_DIGITS)


def read_words(text: str) -> Fraction | None:
    """Value of number words that ``NUMBER_WORDS`` matched, or None for more than one number or an ordinal."""
    total, group, smallest_scale = Fraction(0), Fraction(0), 10**15
    words = re.sub(r"[,\u00a0-]", " ", text.lower()).split()
    for before, word in zip(("", *words), words, strict=False):
        if word in ("a", "an", "and"):
            continue
        if word in _UNITS:
            value = _UNITS[word]
            if group % 100 and not (
                group.denominator == 1 and group % 10 == 0 and group % 100 >= 20 and 0 < value < 10
            ):
                return None  # "two three"
            group += value
        elif word in _SCALES:
            scale = _SCALES[word]
            if scale in (12, 100):
                group = (group or Fraction(1)) * scale
            elif scale >= smallest_scale:
                return None
            else:
                total, group, smallest_scale = total + (group or Fraction(1)) * scale, Fraction(0), scale
        else:
            part = _PARTS.get(word) or _PARTS[word.removesuffix("s")]
            if before in _UNITS:
                group *= part  # "three quarters"
            elif before in ("a", "an", "") and (before or word == "half"):
                group += part  # "two and a half"; "the third" is an ordinal
            else:
                return None
    return total + group
