"""Regular expressions of somebody else's file, answered in bounded time and as Python's ``re`` would.

``re`` goes back and tries again, which takes time exponential in a name's length for ``(a+)+$`` and a power of it for
``.*.*.*x``. An expression with few ways to match is given to ``re``; any other is followed through all of its ways at
once, as the set of places where each part of it may end (Thompson, Communications of the ACM 11, 1968).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

LONGEST_PATTERN = 1 << 18  # characters; ms-swift lists every module of a large model in one expression
LONGEST_NAME = 500  # characters; the longest name in a model that mlx-lm knows has about a hundred
FEW_WAYS = 20_000
MOST_STEPS = 1_000_000  # about a second
CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
PLACES = {
    "AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A", "AT_END": "$", "AT_END_STRING": r"\Z", "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
}  # fmt: skip
CATEGORIES = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}
FOLLOWED = {*CHARACTERS, "AT", "BRANCH", "SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"}


class Pattern:
    """A regular expression; :func:`compile_pattern` makes it.

    Raises:
        ValueError: it is none, is too long, or has too many ways to match and a part that cannot be followed at once.
        RsgwmError: when it is used, the name is too long, or following all ways takes more than about a second.
    """

    def __init__(self, text: str) -> None:
        shown = f"{text[:60]!r}{'…' if len(text) > 60 else ''}"
        if len(text) > LONGEST_PATTERN:
            raise ValueError(f"{shown} is {len(text)} characters long")
        try:
            self.compiled = re.compile(text)
            self.items = parser.parse(text)
            self.ways = {LONGEST_NAME: _ways(self.items, LONGEST_NAME)}
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{shown} is not a regular expression ({error})") from None
        if self.ways[LONGEST_NAME] > FEW_WAYS and (other := _kinds(self.items) - FOLLOWED):
            raise ValueError(
                f"{shown} could take forever ({', '.join(sorted(other)).lower()} among many ways to match)"
            )
        self.shown = shown

    def fullmatch(self, name: str) -> bool:
        """Whether all of ``name`` matches."""
        if self._few(name):
            return self.compiled.fullmatch(name) is not None
        return len(name) in _Run(self, name).ends({0})

    def match(self, name: str) -> bool:
        """Whether ``name`` begins with a match."""
        return self.compiled.match(name) is not None if self._few(name) else bool(_Run(self, name).ends({0}))

    def search(self, name: str) -> bool:
        """Whether a match is anywhere in ``name``."""
        if self._few(name):
            return self.compiled.search(name) is not None
        return bool(_Run(self, name).ends(set(range(len(name) + 1))))

    def _few(self, name: str) -> bool:
        if len(name) > LONGEST_NAME:
            raise RsgwmError(f"{name[:40]!r}… has {len(name)} characters, which no module's name has")
        if self.ways[LONGEST_NAME] > FEW_WAYS and len(name) not in self.ways:
            self.ways[len(name)] = _ways(self.items, len(name))
        return self.ways.get(len(name), 0) <= FEW_WAYS


@lru_cache(256)
def compile_pattern(text: str) -> Pattern:
    """The expression, parsed once.

    Raises:
        ValueError: as :class:`Pattern`.
    """
    return Pattern(text)


def _parts(kind: str, value: Any) -> list[Any]:
    """The expressions inside one part of an expression."""
    if kind == "BRANCH":
        return list(value[1])
    if kind.endswith("REPEAT") or kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return [value[-1]]
    return (
        [value] if kind == "ATOMIC_GROUP" else [item for item in value[1:] if item] if kind.endswith("EXISTS") else []
    )


def _kinds(items: Any) -> set[str]:
    """What an expression is made of."""
    kinds = set()
    for kind, value in items:
        kinds.add(str(kind))
        for part in _parts(str(kind), value):
            kinds |= _kinds(part)
    return kinds


def _ways(items: Any, length: int) -> float:
    """At most so many ways to match a name of ``length`` are tried one after the other; a bound, not a count."""
    total = 1.0
    for kind, value in items:
        inside = sum(_ways(part, length) for part in _parts(str(kind), value)) or 1.0
        if str(kind).endswith("REPEAT"):
            least, most = (min(int(count), length + 1) for count in value[:2])
            inside = (most - least + 1) * min(inside, 1e9) ** min(most, 30)
        total = min(total * inside, 1e30)
    return total


@lru_cache(4096)
def _small(text: str, flags: int) -> re.Pattern[str]:
    """An expression for one character, or for a place between two."""
    return re.compile(text, flags & (re.IGNORECASE | re.MULTILINE | re.DOTALL | re.ASCII))


def _character(kind: str, value: Any) -> str:
    """The expression for one character that a part stands for."""
    if kind == "ANY":
        return "."
    if kind in ("LITERAL", "NOT_LITERAL"):
        return f"[{'^' if kind.startswith('NOT') else ''}{_escaped(value)}]"
    inside = ""
    for item, detail in value:
        name = str(item)
        if name == "CATEGORY":
            negated, category = "_NOT_" in str(detail), CATEGORIES[str(detail).rpartition("_")[2]]
            inside += "\\" + (category.upper() if negated else category)
        else:
            inside += "^" if name == "NEGATE" else "-".join(map(_escaped, detail if name == "RANGE" else [detail]))
    return f"[{inside}]"


def _escaped(code: int) -> str:
    return f"\\U{code:08x}"


class _Run:
    """One name followed through an expression: sets of places in, sets of places out."""

    def __init__(self, pattern: Pattern, name: str) -> None:
        self.pattern, self.name, self.steps = pattern, name, 0
        self.looked: dict[tuple[int, int], bool] = {}

    def ends(self, starts: set[int]) -> set[int]:
        """Where a match that starts at one of ``starts`` may end."""
        try:
            return self._through(self.pattern.items, self.pattern.compiled.flags, starts)
        except RecursionError:
            raise RsgwmError(f"{self.pattern.shown} is nested too deeply") from None

    def _through(self, items: Any, flags: int, places: set[int]) -> set[int]:
        for kind, value in items:
            self.steps += len(places) + 1
            if self.steps > MOST_STEPS:
                raise RsgwmError(f"{self.pattern.shown} takes too long for {self.name[:60]!r}")
            places = self._part(str(kind), value, flags, places)
            if not places:
                break
        return places

    def _part(self, kind: str, value: Any, flags: int, places: set[int]) -> set[int]:
        if kind in CHARACTERS:
            fits = _small(_character(kind, value), flags).match
            return {place + 1 for place in places if fits(self.name, place)}
        if kind == "AT":
            return {place for place in places if _small(PLACES[str(value)], flags).match(self.name, place)}
        if kind == "BRANCH":
            return set().union(*(self._through(part, flags, places) for part in value[1]))
        if kind == "SUBPATTERN":
            return self._through(value[3], (flags | value[1]) & ~value[2], places)
        if kind.startswith("ASSERT"):
            wanted = kind == "ASSERT"
            return {place for place in places if self._looks(value, flags, place) == wanted}
        least, most, inner = value
        return self._repeated(least, most, inner, flags, places)

    def _repeated(self, least: int, most: int, inner: Any, flags: int, places: set[int]) -> set[int]:
        for _ in range(min(int(least), len(self.name) + 2)):  # by then nothing is left, or nothing changes
            places = self._through(inner, flags, places)
        reached, newest = set(places), places
        for _ in range(min(int(most) - int(least), len(self.name) + 1)):
            newest = self._through(inner, flags, newest) - reached
            if not newest:
                break
            reached |= newest
        return reached

    def _looks(self, value: Any, flags: int, place: int) -> bool:
        """Whether what a look ahead or behind asks for is there."""
        direction, inner = value
        key = id(inner), place
        if key not in self.looked:
            start = place if direction > 0 else place - inner.getwidth()[0]
            ends = self._through(inner, flags, {start}) if start >= 0 else set()
            self.looked[key] = bool(ends) if direction > 0 else place in ends
        return self.looked[key]
