"""The errors a user may see: one readable line each, mapped to an exit code by the command line.

``cli/main.py`` (``explain``) turns these, and errors of options and of the system, into exit codes. Everything else
that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LONGEST = 1500  # characters of a message; what a damaged file held may be quoted in it


class RsgwmError(Exception):
    """Bad input: says what is wrong, where, and what to do, in one line. Exit code 2."""

    exit_code = 2

    def __init__(self, message: object) -> None:
        line = " ".join(str(message).splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 300]} … {line[-290:]}")


class AdapterError(RsgwmError):
    """An adapter folder that cannot be read, is damaged, or does not fit the base model."""


class CheckFailed(RsgwmError):
    """A check that was asked for (parity, a gate) did not pass. Exit code 3."""

    exit_code = 3


def raise_problems(where: str, problems: Iterable[str], error: type[RsgwmError] = RsgwmError) -> None:
    """Raise one error that names ``where`` and lists every problem; do nothing when there is none."""
    listed = list(problems)
    if listed:
        shown = listed if len(listed) <= 8 else [*listed[:8], f"and {len(listed) - 8} more"]
        raise error(f"{where}: " + "; ".join(shown))


def range_problems(settings: object, rules: Mapping[str, tuple[bool, str]]) -> list[str]:
    """What is wrong with the attributes of ``settings``: of each name whether it holds, and what must hold of it."""
    return [f"{name} = {getattr(settings, name)!r} is not {rule}" for name, (holds, rule) in rules.items() if not holds]


def grouped(problems: Iterable[tuple[str, str]]) -> list[str]:
    """Problems of places, such as ``("line 3", "no answer")``; what is the same of several is said once, with the
    first three of them and how many more there are."""
    places: dict[str, list[str]] = {}
    for place, problem in problems:
        places.setdefault(problem, []).append(place)
    return [
        f"{', '.join(where[:3])}{f' and {len(where) - 3} more' if len(where) > 3 else ''}: {problem}"
        for problem, where in places.items()
    ]
