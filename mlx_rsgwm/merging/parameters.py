"""A parameter of a merge method with what it may be: the one place that ranges are written and checked in."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

LARGEST = 1e9  # where a range has no end of its own; float32 and counts lose nothing below it


@dataclass(frozen=True)
class Parameter:
    """A method's parameter: its default, what it means, and its range or choices. None: it has to be found out."""

    default: Any
    meaning: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    choices: tuple[Any, ...] = ()
    integer: bool = False

    def problem(self, name: str, value: Any) -> str | None:
        """Why ``value`` cannot be; None when it can."""
        if not isinstance(value, (str, int, float)):
            return f"{name} must be a number or a name, found {brief(value)}"
        if self.choices:
            return None if value in self.choices else f"{name} must be one of {_listed(self.choices)}, found {value!r}"
        if self.low is None and self.high is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"{name} must be a number, found {value!r}"
        if self.integer and value % 1:
            return f"{name} must be a whole number, found {value!r}"
        low, high = (-LARGEST if self.low is None else self.low), (LARGEST if self.high is None else self.high)
        above = value > low if self.open_low else value >= low
        below = value < high if self.open_high else value <= high
        if above and below:
            return None
        ends = f"{'(' if self.open_low else '['}{low:g}, {high:g}{')' if self.open_high else ']'}"
        return f"{name} must be in {ends}, found {value}"


def _listed(choices: tuple[Any, ...]) -> str:
    return ", ".join(str(choice) for choice in choices)
