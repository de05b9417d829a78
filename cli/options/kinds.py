"""Types of options: files and folders, closed sets, ranges, and numbers that may be left to the program."""

from __future__ import annotations

import difflib
from typing import Any

import click

from mlx_rsgwm.cli.options.paths import PATH as PATH  # beside their neighbours for those who take several
from mlx_rsgwm.cli.options.paths import SOURCE as SOURCE

COUNT = click.IntRange(0)
POSITIVE = click.IntRange(1)
SHARE = click.FloatRange(0, 1)
INSIDE = click.FloatRange(0, 1, min_open=True, max_open=True)


class OneOf(click.Choice):
    """One of a few names; a wrong one is answered with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = [str(choice) for choice in self.choices]
        if str(value) not in names:
            near = difflib.get_close_matches(str(value), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
            self.fail(f"{value!r} is not one of its values; {hint}", param, ctx)
        return super().convert(value, param, ctx)


class AutoShare(click.ParamType):
    """A number in [0, 1], or ``auto``, which is handed on as it is."""

    name = "auto|number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "auto":
            return "auto"
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither auto nor a number in [0, 1]", param, ctx)
        if not 0 <= number <= 1:
            self.fail(f"{value} is not in [0, 1]", param, ctx)
        return number


class Pair(click.ParamType):
    """``NAME=VALUE``; handed on as the text that it is, once both sides are there."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name, equals, _ = str(value).partition("=")
        if not name or not equals:
            self.fail(f"wants NAME=VALUE, found {value!r}", param, ctx)
        return str(value)


AUTO_SHARE = AutoShare()
PAIR = Pair()
