"""Counts of what was tried and how it ended, and the table of docs/reliability.md that shows them.

python tests/faults/tally.py    writes the table into the page from docs/reliability.json; `make faults` calls it
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
COUNTS, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"
BEGIN, END = "<!-- counts: made by `make faults` -->\n", "<!-- end of counts -->\n"
# How one trial ended. The first two are right: the same command did the work, or found it finished.
OUTCOMES = ("again", "finished", "lost", "wrong", "left over")
RIGHT = OUTCOMES[:2]
TRIALS = ("kills", "sizes", "races", "signals and clocks", "memory limits")
HEAD = ["command", "killed at", "disk full at", *TRIALS[2:], *OUTCOMES[2:], "counted at"]

Known = dict[str, dict[str, dict[str, Any]]]  # command, kind of trial, what is known of it


class Tally:
    """Counts by command and kind of trial, in a file of JSON where one is named."""

    def __init__(self, file: str | None) -> None:
        self._file = Path(file) if file else None

    def keep(self, command: str, trial: str, outcomes: Sequence[str], **more: int) -> None:
        """Replace what is known of one command's trials; an outcome is one of OUTCOMES, or begins so with a colon."""
        if self._file is None:
            return
        counts = Counter(outcome.partition(":")[0] for outcome in outcomes)
        assert set(counts) <= set(OUTCOMES)
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        told = {"tried": len(outcomes), **more, **{name: counts[name] for name in OUTCOMES}, "at": commit()}
        known.setdefault(command, {})[trial] = told
        self._file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def commit() -> str:
    """The commit that is tried, shortened; empty outside of a repository."""
    if shutil.which("git") is None:
        return ""
    asked = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=DOCS, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


def table(known: Known) -> str:
    """The counts as Markdown, a command a row, and their sums."""
    rows = [_row(command, known[command]) for command in sorted(known)]
    sums = {
        trial: {
            name: sum(trials[trial][name] for trials in known.values() if trial in trials)
            for name in ("tried", *OUTCOMES)
        }
        for trial in TRIALS
    }
    for name, count in (("events", _events), ("states", _states)):
        sums["kills"][name] = sum(count(trials["kills"]) for trials in known.values() if "kills" in trials)
    lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *rows, _row("all", sums)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(command: str, trials: dict[str, dict[str, Any]]) -> list[str]:
    tried = [str(trials[trial]["tried"]) if trial in trials else "–" for trial in TRIALS]
    kills = trials.get("kills", {})
    if kills:
        tried[0] = f"{kills['tried']} of {_events(kills)} events, {_states(kills)} states"
    wrong = [str(sum(trial[name] for trial in trials.values())) for name in OUTCOMES[2:]]
    commits = dict.fromkeys(trial["at"] for trial in trials.values() if trial.get("at"))
    return [command, *tried, *wrong, ", ".join(commits)]


def _events(kills: dict[str, Any]) -> int:
    return kills.get("events", kills["tried"])


def _states(kills: dict[str, Any]) -> int:
    """Different states of the folder that kills left, each of which was gone on from."""
    return kills.get("states", kills["tried"])


def with_table(page: str, known: Known) -> str:
    """The page with the counts in their place."""
    return put_into(page, BEGIN, table(known), END)


def put_into(page: str, begin: str, text: str, end: str) -> str:
    """The page with a text between two of its lines."""
    before, _, rest = page.partition(begin)
    return before + begin + "\n" + text + "\n" + end + rest.partition(end)[2]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(COUNTS.read_text())))
