"""Names of commands that changed: they work for one more release, with a line on standard error.

To be deleted with the release after 0.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_rsgwm.cli.commands import members

# What was said, and what is said now; the longest match counts.
COMMANDS_BEFORE = {
    "train-pool": "pool train",
    "merge-sweep": "pool sweep",
    "loss": "adapter loss",
    "importance collect": "adapter importance",
    "importance": "adapter importance",
    "grams collect": "adapter grams",
    "grams": "adapter grams",
    "plot": "report curves",
    "controls": "report controls",
    "tables": "report tables",
    "push": "hub push",
    "pull": "hub pull",
}


def with_new_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in today's names, and a note for each name that was another one."""
    for count in (2, 1):
        before = " ".join(arguments[:count])
        if len(arguments) >= count and before in COMMANDS_BEFORE:
            now = COMMANDS_BEFORE[before]
            return [*now.split(), *arguments[count:]], [_note(before, now)]
    if list(arguments[:1]) == ["report"] and any(_is_run(word) for word in arguments[1:2]):
        return ["report", "write", *arguments[1:]], [_note("report RUN", "report write RUN")]
    return list(arguments), []


def _is_run(word: str) -> bool:
    """Whether ``report`` is followed by what it took when it was a command itself: a folder, or its options."""
    return word not in (*members("report"), "--help", "-h") and (word.startswith("-") or Path(word).is_dir())


def _note(before: str, now: str) -> str:
    return f"note: `rsgwm {before}` is now `rsgwm {now}`; the old name goes with the next release"
