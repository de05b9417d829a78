"""How long work tells its caller where it is, without knowing what a terminal is.

Library code takes ``progress: Progress = SILENT`` and calls it; the command line passes one that draws bars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]


class Progress:
    """Says nothing; subclasses show what they are told."""

    def message(self, text: str) -> None:
        """One line of news."""

    def warning(self, text: str) -> None:
        """One line on what the result is worth, which the command line prints with ``--quiet``, too."""
        self.message(text)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """A piece of work of ``total`` units; the yielded function takes units done and a short note."""
        yield lambda units, note: None


SILENT = Progress()
