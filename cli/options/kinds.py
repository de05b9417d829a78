"""Types of options: files and folders, closed sets, ranges, and numbers that may be left to the program."""

from __future__ import annotations

import math
import re
from typing import Any

import click

from mlx_rsgwm.cli.options.paths import NEW_FILE as NEW_FILE
from mlx_rsgwm.cli.options.paths import NEW_PATH as NEW_PATH
from mlx_rsgwm.cli.options.paths import PATH as PATH  # beside their neighbours for those who take several
from mlx_rsgwm.cli.options.paths import SOURCE as SOURCE
from mlx_rsgwm.core.nearest import advice

LARGEST_COUNT = 2**31 - 1  # of anything that is counted here; beyond, arrays cannot have such an axis
DIGITS = re.compile(r"[-+]?[0-9]+")
DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")  # Python's float takes ٣ and 1_000, too


class Whole(click.IntRange):
    """A whole number, written in digits alone, that is no larger than anything here can be."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not DIGITS.fullmatch(value.strip()):
            self.fail(f"{value[:40]!r} is not a whole number", param, ctx)
        if isinstance(value, str) and self.max is None and len(value.strip().lstrip("+-0")) > len(str(LARGEST_COUNT)):
            self.fail(f"{value[:12]}… has {len(value)} digits; the most is {LARGEST_COUNT}", param, ctx)
        number = super().convert(value, param, ctx)
        if self.max is None and number > LARGEST_COUNT:
            self.fail(f"{number} is more than {LARGEST_COUNT}", param, ctx)
        return number


class Number(click.FloatRange):
    """A finite number, in digits: NaN is in no range, and click finds it in every one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not DECIMAL.fullmatch(value.strip()):
            self.fail(f"{value[:40]!r} is not a finite number{_hint(value, param)}", param, ctx)
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number

    def _describe_range(self) -> str:
        # click's words for a range without ends are x<=None
        return "any" if self.min is None and self.max is None else super()._describe_range()


def _hint(text: str, param: click.Parameter | None) -> str:
    """What to type instead of a number with commas, or in per cent."""
    if text.endswith("%") and DECIMAL.fullmatch(text[:-1].strip()):
        return f"; write {float(text[:-1]) / 100:g}"
    parts = [part.strip()[:12] for part in text.split(",")]
    if len(parts) == 1 or not all(DECIMAL.fullmatch(part) for part in parts):
        return ""
    if isinstance(param, click.Option) and param.multiple:
        return "; write " + " ".join(f"{param.opts[0]} {part}" for part in parts[:4])
    return f"; write {'.'.join(parts)}" if len(parts) == 2 else ""


COUNT = Whole(0)
POSITIVE = Whole(1)
TIMES = Whole(1, 10_000)  # of what is done over and over, with a result kept of each
SHARE = Number(0, 1)
INSIDE = Number(0, 1, min_open=True, max_open=True)
ANY_NUMBER = Number()


class OneOf(click.Choice):
    """One of a few names; a wrong one is answered with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = [str(choice) for choice in self.choices]
        if str(value) not in names:
            self.fail(f"{value!r} is not one of its values; {advice(str(value), names)}", param, ctx)
        return super().convert(value, param, ctx)


class AutoShare(click.ParamType):
    """A number in [0, 1], or ``auto``, which is handed on as it is."""

    name = "auto|number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "auto":
            return "auto"
        if isinstance(value, str) and not DECIMAL.fullmatch(value.strip()):
            self.fail(f"{value[:40]!r} is neither auto nor a number in [0, 1]", param, ctx)
        number = float(value)
        if not 0 <= number <= 1:
            self.fail(f"{value[:40]} is not in [0, 1]", param, ctx)
        return number


class NamedValue(click.ParamType):
    """``NAME=VALUE``; handed on as the text that it is, once both sides are there."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name, equals, _ = str(value).partition("=")
        if not name or not equals:
            self.fail(f"wants NAME=VALUE, found {value!r}", param, ctx)
        return str(value)


class Percentages(click.ParamType):
    """Shares in per cent with commas between them, ``1,2,5``, as a tuple of shares, ascending; 0 for none."""

    name = "PERCENT[,PERCENT…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if parts == ["0"]:
            return ()
        if not all(DECIMAL.fullmatch(part) and 0 < float(part) <= 100 for part in parts):
            self.fail(f"{str(value)[:40]!r} is no list of per cents above 0 and up to 100, such as 1,2,5", param, ctx)
        return tuple(sorted({round(float(part) / 100, 9) for part in parts}))


class StoredFormat(click.ParamType):
    """``BITS[,group,mode]`` as a :class:`~mlx_rsgwm.models.quantisation.QuantFormat`."""

    name = "BITS[,GROUP,MODE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from mlx_rsgwm.core.errors import RsgwmError
        from mlx_rsgwm.models.quantisation import QuantFormat

        if isinstance(value, QuantFormat):
            return value
        try:
            return QuantFormat.parse(str(value))
        except RsgwmError as error:
            self.fail(str(error).removeprefix("quantisation: "), param, ctx)


AUTO_SHARE = AutoShare()
PERCENTAGES = Percentages()
PAIR = NamedValue()
FORMAT = StoredFormat()
