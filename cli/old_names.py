"""Names of commands and options that changed: they work for one more release, with a line on standard error.

To be deleted with the release after 0.2, together with :func:`also_positional` where commands use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.commands import full_name, members
from mlx_rsgwm.cli.console import show
from mlx_rsgwm.cli.options.paths import PATH
from mlx_rsgwm.inference.draft import DRAFTS

# What was said, and what is said now; the longest match counts.
COMMANDS_BEFORE = {
    "train-pool": "pool train",
    "merge-sweep": "pool sweep",
    "loss": "adapter loss",
    "importance collect": "adapter importance",
    "importance": "adapter importance",
    "grams collect": "directions collect",
    "grams": "directions collect",
    "adapter grams": "directions collect",
    "plot": "report curves",
    "controls": "report controls",
    "tables": "report tables",
    "push": "hub push",
    "pull": "hub pull",
}

# By today's name of the command. What ends in "=" takes the value behind it.
OPTIONS_BEFORE = {
    "data build": {"--data": "--questions"},
    "data negatives": {
        "--from": "--adapter",
        "--attempts": "--draft-count",
        "--drafts": "--draft-count",
        "--data": "--questions",
    },
    "train": {"--data": "--corpus", "--max-tokens": "--max-seq-length"},
    "pool train": {"--data": "--corpus", "--max-tokens": "--max-seq-length"},
    "pool sweep": {"--eval": "--task", "--data": "--questions"},
    "adapter loss": {"--batch-size": "--batch-rows", "--max-tokens": "--max-seq-length"},
    "adapter importance": {"--data": "--corpus", "--max-tokens": "--max-seq-length"},
    "directions collect": {"--data": "--corpus", "--batch-size": "--batch-rows", "--max-tokens": "--max-seq-length"},
    "merge": {"--tau": "--set tau=", "--signal": "--set signal=", "--space": "--set space="},
    "ask": {"--batch-size": "--batch-rows"},
    "calibrate": {"--data": "--questions", "--method": "--curve"},
    "eval": {"--data": "--questions", "--limit": "--items", "--train-data": "--corpus"},
    "report controls": {"--data": "--questions", "--limit": "--items", "--drafts": "--draft-count"},
    "report tables": {"--limit": "--items"},
    "lm-eval": {"--limit": "--items"},
    "doctor": {"--check": "--exit-code"},
    "convert to-gguf": {"--dtype": "--outtype"},
    "parity": {"--certificate": "--out"},
    "hub pull": {"--peft": "--keep-peft"},
    "bench latency": {"--rows": "--batch-size", "--pool": "--pool-size"},
}
# Names that are another option's today: what is said now, and which values are meant by the former name.
VALUES_BEFORE: dict[tuple[str, str], tuple[str, Callable[[str], bool]]] = {
    ("data negatives", "--questions"): ("--items", str.isdigit),
    ("eval", "--drafts"): ("--draft-count", str.isdigit),
    ("calibrate", "--drafts"): ("--drafts-file", lambda value: value not in DRAFTS),
}
EXPERIMENTS = ("--mode", "--verify-template", "--template-mismatch")  # hidden in ask and chat; eval has them


def with_new_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in today's names, and a note for each name that was another one."""
    words, notes = _with_new_command(list(arguments))
    end = words.index("--") if "--" in words else len(words)
    command = full_name(words)
    renamed: list[str] = []
    options = iter(words[:end])
    for word in options:
        name, equals, value = word.partition("=")
        now: str | None = OPTIONS_BEFORE.get(command, {}).get(name)
        if (command, name) in VALUES_BEFORE:
            now, is_former = VALUES_BEFORE[command, name]
            value = value or next(options, "")
            renamed += [now if is_former(value) else name, value]
            notes += [_note(name, now)] * is_former(value)
        elif now is None:
            renamed.append(word)
            if command in ("ask", "chat") and name in EXPERIMENTS:
                notes.append(f"note: {name} leaves `rsgwm {command}` with the next release; `rsgwm eval` keeps it")
        else:
            notes.append(_note(name, now))
            if now.endswith("="):
                flag, prefix = now.split()
                renamed += [flag, prefix + (value if equals else next(options, ""))]
            else:
                renamed.append(f"{now}{equals}{value}")
    return renamed + words[end:], notes


def _with_new_command(words: list[str]) -> tuple[list[str], list[str]]:
    for count in (2, 1):
        before = " ".join(words[:count])
        if len(words) >= count and before in COMMANDS_BEFORE:
            now = COMMANDS_BEFORE[before]
            return [*now.split(), *words[count:]], [_note(f"rsgwm {before}", f"rsgwm {now}")]
    if words[:1] == ["report"] and any(_is_run(word) for word in words[1:2]):
        return ["report", "write", *words[1:]], [_note("rsgwm report RUN", "rsgwm report write RUN")]
    return words, []


def _is_run(word: str) -> bool:
    """Whether ``report`` is followed by what it took when it was a command itself: a folder, or its options."""
    return word not in (*members("report"), "--help", "-h") and (word.startswith("-") or Path(word).is_dir())


def _note(before: str, now: str) -> str:
    return f"note: `{before}` is now `{now}`; the old name goes with the next release"


class _Hidden(click.Argument):
    """An argument that help does not show."""

    def get_usage_pieces(self, ctx: click.Context) -> list[str]:
        return []


def also_positional(name: str, unless: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let the required option ``name`` (``out``) be given as the last argument, too, as it was until 0.1.

    It is not required where the option ``unless`` is given.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*arguments: Any, old_place: Path | None, **options: Any) -> None:
            if old_place is not None and options[name] is None:
                options[name] = old_place
                show(_note(f"{name.upper()}` as an argument, `{old_place}", f"--{name} {old_place}"), err=True)
            elif old_place is not None:
                raise click.UsageError(f"got {old_place} beside --{name} {options[name]}")
            elif options[name] is None and not options.get(unless):
                raise click.UsageError(f"missing option --{name}")
            function(*arguments, **options)

        return click.argument("old_place", required=False, type=PATH, cls=_Hidden)(command)

    return decorate
