"""How long work tells its caller where it is, and how any text is made fit for a terminal.

Library code takes ``progress: Progress = SILENT`` and calls it; the command line passes one that draws bars, studies
one that prints lines.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]

# What moves the cursor, colours, or turns the order of writing round; half a character, which no terminal can show.
# Tabs and line feeds are text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with its control characters written out (``\\u001b``): names, templates and drafts are others' work.

    They are written as JSON does, so that a JSON text stays one with the same value.
    """
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shown_time(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Says nothing; subclasses show what they are told."""

    def message(self, text: str) -> None:
        """One line of news."""

    def warning(self, text: str) -> None:
        """One line on what the result is worth, which the command line prints with ``--quiet``, too."""
        self.message(text)

    def detail(self, text: str) -> None:
        """One line that only matters to who looks closely; where a whole recipe runs it is shown with ``--verbose``."""
        self.message(text)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """A piece of work of ``total`` units; the yielded function takes units done and a short note."""
        yield lambda units, note: None


SILENT = Progress()


class LineProgress(Progress):
    """Prints plain lines on standard error: the first step of a task, one about every tenth of it, and the last."""

    def message(self, text: str) -> None:
        """Print one line."""
        print(printable(text), file=sys.stderr, flush=True)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Report on ``total`` units of work; a task that ends early without an error says how far it came."""
        started = time.monotonic()
        done, shown, last_note = 0, -1, ""

        def show() -> None:
            nonlocal shown
            shown = done
            note = f", {last_note}" if last_note else ""
            self.message(f"{label}: {done}/{total}{note}, {time.monotonic() - started:.0f} s")

        def advance(units: int, note: str = "") -> None:
            nonlocal done, last_note
            done, last_note = done + units, note
            tenths = 10 * done // max(total, 1)
            if shown < 0 or done >= total > shown or tenths > 10 * shown // max(total, 1):
                show()

        yield advance
        if shown != done:
            show()
