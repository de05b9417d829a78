"""Units in equations: which measure the same thing, and whether they excuse an equation that fails as it stands.

Only what is exact by definition is known; "1 month = 30 days" is not. Where units differ and are not known, nothing
is claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import product

_TABLE = {
    "time": {1: "second seconds sec secs s Sekunde Sekunden 秒",
             60: "minute minutes min mins Minute Minuten 分 分钟",
             3600: "hour hours hr hrs h Stunde Stunden heure heures hora horas 小时 時間",
             86400: "day days Tag Tage jour jours día días", 604800: "week weeks wk wks Woche Wochen"},
    "calendar": {1: "month months Monat Monate mois", 12: "year years Jahr Jahre", 120: "decade decades",
                 1200: "century centuries"},
    "data": {1: "bit bits", 8: "byte bytes"},
    "length": {1: "mm millimeters millimetres", 10: "cm centimeters centimetres centimeter centimetre",
               1000: "m meters metres meter metre Meter",
               10**6: "km kilometers kilometres kilometer kilometre Kilometer"},
    "imperial": {1: "inch inches", 12: "foot feet ft", 36: "yard yards yd yds", 63360: "mile miles"},
    "mass": {1: "mg milligrams", 1000: "g gram grams Gramm", 10**6: "kg kilogram kilograms kilo kilos Kilogramm",
             10**9: "tonne tonnes"},
    "weight": {1: "ounce ounces oz", 16: "pound pounds lb lbs", 32000: "ton tons"},
    "volume": {1: "ml mL milliliters millilitres", 1000: "l L liter liters litre litres Liter"},
    "measure": {1: "cup cups", 2: "pint pints", 4: "quart quarts", 16: "gallon gallons"},
    "money": {1: "¢ cent cents c penny pennies", 5: "nickel nickels", 10: "dime dimes", 25: "quarter quarters",
              100: "$ dollar dollars"},
    "euro": {1: "ct cts Cent Cents", 100: "€ euro euros Euro Euros"},
    "count": {2: "pair pairs couple couples", 12: "dozen dozens", 20: "score", 100: "hundred hundreds",
              1000: "thousand thousands k Tausend", 10**6: "million millions Millionen", 10**9: "billion billions"},
}  # fmt: skip
KNOWN = {
    word: (kind, factor) for kind, sizes in _TABLE.items() for factor, words in sizes.items() for word in words.split()
}
_GLUED_WORDS = "mm cm km mg kg lb lbs oz ft ml mL hr hrs min mins sec secs mph"
GLUED = set(_GLUED_WORDS.split())
# Words after a number that name no unit: what was done with the things, or which of them.
_BESIDE_WORDS = (
    "left remaining more total altogether each sold spent given lost gone away in of for the a an per now then today "
    "here there still only again all him her them"
)
# Measures of which nothing exact is known, or which are of several sizes.
_OTHER_MEASURE_WORDS = (
    "teaspoon teaspoons tsp tablespoon tablespoons tbsp kb mb gb tb kilobyte kilobytes megabyte megabytes gigabyte "
    "gigabytes terabyte terabytes fortnight fortnights quarter quarters semester semesters season seasons penny pence "
    "stone acre acres hectare hectares fluid bushel bushels barrel barrels calorie calories"
)
_OTHER_MEASURES = set(_OTHER_MEASURE_WORDS.split())
_BESIDE = set(_BESIDE_WORDS.split())

Unit = tuple[str, ...]


def measures(units: Iterable[Unit]) -> dict[str, set[int]]:
    """Sizes of the known units by what they measure."""
    sizes: dict[str, set[int]] = {}
    for word in (word for unit in units for word in unit):
        if word in KNOWN:
            kind, factor = KNOWN[word]
            sizes.setdefault(kind, set()).add(factor)
    return sizes


def converted(unit: Unit) -> tuple[str, int] | None:
    """What a unit measures and its size, when it is one known unit and nothing else ("500 m", not "60 km per hour")."""
    words = [word for word in unit if word not in ("and", "of")]
    return KNOWN.get(words[0]) if len(words) == 1 else None


def noun(unit: Unit) -> str:
    """The thing that is counted: the last word before "per" and the like, in the singular as far as English goes."""
    words: list[str] = []
    for word in unit:
        if word in ("per", "each", "/", "in", "of", "for", "from"):
            break
        words.append(word)
    named = [word.lower() for word in words if word.lower() not in _BESIDE and not word.endswith("ed")]
    word = named[-1] if named else ""
    for ending, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("s", "")):
        if word.endswith(ending) and len(word) > 3:
            return word.removesuffix(ending) + singular
    return word


def is_measure(word: str) -> bool:
    """Whether a word names a measure of something, not a thing that is counted."""
    return word in KNOWN or word.lower() in _OTHER_MEASURES


def unlike(left: Iterable[Unit], right: Iterable[Unit], summed: bool) -> bool:
    """Whether two sides of an equation count different things, so that units may explain the difference.

    Of a sum (``summed``) any two things, of a product only different measures: "4 friends × 3 = 12 cookies".
    """
    sides = [{_named(word) for unit in units for word in unit} - {None} for units in (left, right)]
    if not all(sides) or sides[0] & sides[1]:
        return False
    return summed or all(any(is_measure(word) for unit in units for word in unit) for units in (left, right))


def _named(word: str) -> object:
    """What a word of a unit names: the same for all spellings of a measure; None for words beside it."""
    if word in KNOWN:
        return KNOWN[word]
    return noun((word,)) or None


def conversions(unit: Unit) -> set[Fraction]:
    """By how many of another unit of its kind one of this is: "24 × 60 = 1 day" counts minutes and does not say so."""
    known = [KNOWN[word] for word in unit if word in KNOWN]
    return {
        Fraction(factor, other)
        for kind, factor in known
        for other in _TABLE[kind]
        if kind not in ("money", "euro", "count") and other < factor
    }


def excuse(terms: Sequence[Unit], units: Sequence[Unit], ratio: Fraction | None) -> bool:
    """Whether units may explain why an equation fails as it stands.

    Args:
        terms: units of the numbers that are added or subtracted as they are.
        units: of all numbers on both sides; () for one without.
        ratio: left by right side; None where one is zero.
    """
    nouns = {noun(unit) for unit in terms if unit} - {""}
    if len(nouns) > 1:
        return True
    sizes = measures(units)
    if "count" in sizes and (len(sizes["count"]) > 1 or any(not measures([unit]).get("count") for unit in units)):
        return True
    mixed = [factors for factors in sizes.values() if len(factors) > 1]
    if mixed and len(terms) > 1:
        return True
    steps = {Fraction(a, b) for factors in mixed for a, b in product(factors, factors)}
    return ratio in {a * b for a, b in product(steps, steps)}
