"""What the slow tests feed to commands, all of it or a share, and the table in docs/reliability.md that counts it.

RSGWM_SHARE=20 feeds every twentieth case; RSGWM_FED names the file of JSON in which counts are kept. ``make slow`` sets
the latter, and calls

    python -m tests.outside.fed    writes the table into the page from docs/fed.json
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.faults.tally import DOCS, PAGE, commit, put_into

COUNTS = DOCS / "fed.json"
BEGIN, END = "<!-- fed: made by `make slow` -->\n", "<!-- end of fed -->\n"
HERE = Path.cwd()  # some tests go elsewhere
Case = TypeVar("Case")


def share(cases: Sequence[Case], name: str) -> list[Case]:
    """Every case, or as RSGWM_SHARE says every so manieth; from which on depends on the name of what is tried."""
    step = int(os.environ.get("RSGWM_SHARE", "1"))
    return list(cases[zlib.crc32(name.encode()) % step :: step])


def at_most(count: int) -> int:
    """So many random ones, or the share of them that RSGWM_SHARE says."""
    return count // int(os.environ.get("RSGWM_SHARE", "1"))


def keep(fed: str, tried_by: str, count: int, of: int, wrong: int) -> None:
    """Replace what is known of one part of what is fed: how many were tried of how many, and how many went wrong."""
    if not (name := os.environ.get("RSGWM_FED")):
        return
    file = HERE / name
    known = json.loads(file.read_text()) if file.exists() else {}
    known.setdefault(fed, {})[tried_by] = {"tried": count, "of": of, "wrong": wrong, "at": commit()}
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def table(known: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The counts as Markdown, each thing that is fed a row."""
    lines = [["fed", "to", "tried", "there are", "wrong", "counted at"], ["---", "---:", "---:", "---:", "---:", "---"]]
    for fed, parts in sorted(known.items()):
        sums = [str(sum(part[name] for part in parts.values())) for name in ("tried", "of", "wrong")]
        commits = dict.fromkeys(part["at"] for part in parts.values() if part["at"])
        lines.append([fed, str(len(parts)), *sums, ", ".join(commits)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(put_into(PAGE.read_text(), BEGIN, table(json.loads(COUNTS.read_text())), END))
