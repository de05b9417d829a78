"""Standard streams that are there and take any text, whatever a shell, a service or a wrapper made of them."""

from __future__ import annotations

import fcntl
import io
import os
import sys
from typing import Any


class ProgressFile(io.FileIO):
    """Standard error. What it does not take, as its disk is full or its terminal gone, is lost, and the work goes on.

    A pipe that nobody reads any more still ends it, as for every program.
    """

    def write(self, data: Any) -> int:
        """The number of bytes that are dealt with."""
        try:
            written = super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def prepare_streams() -> None:
    """Standard streams that are there and take any text.

    One that was closed would be the number of the next file that is opened; nothing is read from it, and what is
    written to it is lost. So with one that cannot be written: a shell that itself had it closed reads its script there.
    A character that the terminal's encoding lacks is written out.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if not _is_open(number):
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        getattr(sys, name).reconfigure(errors="backslashreplace" if number else "surrogateescape")
    raw = io.BufferedWriter(ProgressFile(2, "wb", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def _is_open(number: int) -> bool:
    """Whether a descriptor is there, and for writing where it is written; what cannot be read is said when it is."""
    try:
        mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return False
    return number == 0 or mode != os.O_RDONLY
