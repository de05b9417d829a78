"""A program in a pseudo-terminal, as a person at a keyboard has it: what it shows is read, and keys are sent."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

ROWS, COLUMNS = 24, 80
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|[\x01\x02\x08]")  # moves of the cursor, colours, modes


class Terminal:
    """``text`` is what was shown since the last match of :meth:`wait_for`, without control sequences."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env={**os.environ, "TERM": "xterm", **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(other)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 90) -> str:
        """Read on until ``text`` matches; returns it up to the end of the match, and keeps the rest.

        Raises:
            TimeoutError: it did not come in time, or the program ended without it.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if match := re.search(pattern, self.text):
                shown, self.text = self.text[: match.end()], self.text[match.end() :]
                return shown
            if not self._read() and self.process.poll() is not None:
                break
        raise TimeoutError(f"no {pattern!r} in {self.text!r}")

    def _read(self) -> bool:
        """Take what is shown within a fifth of a second; False where that is nothing."""
        if not select.select([self._main], [], [], 0.2)[0]:
            return False
        try:
            data = os.read(self._main, 65536).decode(errors="replace")
        except OSError:  # the program has ended
            return False
        if "\x1b[6n" in data:  # where is the cursor?
            os.write(self._main, b"\x1b[1;1R")
        self.text += CONTROL.sub("", data)
        return True

    def send(self, keys: str) -> None:
        """Press keys; ``\\r`` is Enter."""
        os.write(self._main, keys.encode())

    def close(self) -> None:
        """End the program if it runs, and the terminal."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._main)
