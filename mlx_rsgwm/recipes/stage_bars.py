"""One bar a stage: whatever a stage's work reports moves the bar of that stage, and no other is drawn.

A stage says of how many pieces its work is (the two merges of a pair, the drafts and readings of a calibration); each
is an equal part of the bar.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_rsgwm.core.progress import SILENT, Advance, Progress

WHOLE = 100  # units of a stage's bar


class StageBars(Progress):
    """Shows stages on ``inner``; outside a stage it is ``inner``. ``details``: whether details are shown, too."""

    def __init__(self, inner: Progress = SILENT, details: bool = False) -> None:
        self._inner, self._details = inner, details
        self._bar: Advance | None = None
        self._pieces, self._finished, self._shown, self._depth = 1, 0, 0, 0

    def message(self, text: str) -> None:
        """One line of news."""
        self._inner.message(text)

    def warning(self, text: str) -> None:
        """One line on what the result is worth."""
        self._inner.warning(text)

    def detail(self, text: str) -> None:
        """One line for who asked for details."""
        if self._details:
            self._inner.detail(text)

    @contextmanager
    def stage(self, label: str, pieces: int) -> Iterator[None]:
        """A stage with ``pieces`` tasks one after the other; what they leave of the bar is filled at its end."""
        with self._inner.task(label, WHOLE) as bar:
            self._bar, self._pieces, self._finished, self._shown = bar, max(1, pieces), 0, 0
            bar(0, "")
            try:
                yield
                self._show(1.0, "")
            finally:
                self._bar = None

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """A piece of the stage under way; a task within a task does not move the bar."""
        if self._bar is None:
            with self._inner.task(label, total) as advance:
                yield advance
            return
        done, outermost = 0, self._depth == 0
        self._depth += 1

        def advance_piece(units: int, note: str = "") -> None:
            nonlocal done
            done += units
            if outermost:
                told = note if self._pieces == 1 else f"{label} {done}/{total}"
                self._show((self._finished + min(1.0, done / max(1, total))) / self._pieces, told)

        try:
            yield advance_piece
        finally:
            self._depth -= 1
            self._finished += outermost

    def _show(self, share: float, note: str) -> None:
        assert self._bar is not None
        reached = max(self._shown, min(WHOLE, int(WHOLE * share)))
        self._bar(reached - self._shown, note)
        self._shown = reached
