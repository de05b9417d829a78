"""Ctrl-C and ``kill``: handled for a block of code, or put off until a step of it is done.

Python delivers signals to the main thread alone; in any other, and off it, nothing here changes anything.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

TOLD_TO_END = (signal.SIGTERM, signal.SIGHUP)  # kill, a system that goes down; a terminal or connection that is closed
Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def handled(signals: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Have ``handler`` take these signals while the body runs; what took them before does so again afterwards.

    SIGHUP stays ignored where it is, under ``nohup``.
    """
    if current_thread() is not main_thread():
        yield
        return
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    previous = {number: signal.signal(number, handler) for number in signals if number not in ignored}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@dataclass
class Interruption:
    """Whether the process was asked to end."""

    requested: bool = False


@contextmanager
def deferred_interrupts() -> Iterator[Interruption]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait for the end of a step; a second one interrupts at once.

    A second SIGHUP does not: a shell and the system may both send it when a terminal is closed.
    """
    interruption = Interruption()

    def request(signum: int, frame: FrameType | None) -> None:
        if interruption.requested and signum != signal.SIGHUP:
            raise KeyboardInterrupt
        interruption.requested = True

    with handled((signal.SIGINT, *TOLD_TO_END), request):
        yield interruption
