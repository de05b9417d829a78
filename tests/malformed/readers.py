"""Reads damaged files, as a script: what becomes of each, in limited memory and time.

Each line of standard input names a reader and a mutant's number (``recipe 17``), a kept file (``recipe bomb``) or what
stands in the file's place (``recipe @fifo``).
Before each it prints ``begin`` and the line, after it one line of JSON, so that whoever started it knows which one
ended the process. Memory is limited and every read has some seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from audited_files import AUDITED  # noqa: E402
from mutants import mutate  # noqa: E402
from sound_files import READERS as SOUND  # noqa: E402

from mlx_rsgwm.core.errors import RsgwmError  # noqa: E402

SECONDS = 5.0
BLOCKED = 200.0  # on the wall, for what waits for ever: enough for a process that gets a fortieth of a processor
MEMORY = 6 << 30  # of addresses, most of them of libraries; a header that asks for more is to be refused before
SEEDS = HERE / "seeds"
READERS = {**SOUND, **AUDITED}


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def make_large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 30)


# What may stand in a file's place: given its path, where nothing is, and the sound file's bytes.
STANDING: dict[str, Callable[[Path, bytes], object]] = {
    "@fifo": lambda path, data: os.mkfifo(path),
    "@device": lambda path, data: path.symlink_to("/dev/zero"),
    "@socket": lambda path, data: bind(path),
    "@loop": lambda path, data: path.symlink_to(path.name),
    "@folder": lambda path, data: path.mkdir(),
    "@dangling": lambda path, data: path.symlink_to("nowhere"),
    "@gigabyte": lambda path, data: make_large(path),
    "@empty": lambda path, data: path.touch(),
    "@nul": lambda path, data: path.write_bytes(data[: len(data) // 2] + bytes(1) + data[len(data) // 2 :]),
    "@mark": lambda path, data: path.write_bytes(b"\xef\xbb\xbf" + data),
    "@utf-16": lambda path, data: path.write_bytes(data.decode("latin-1").encode("utf-16")),
}


class TooLong(BaseException):
    """A read took longer than it may."""


def outcome(read: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    """``read``, ``refused`` or ``failed``, and what was said."""

    def stop(signum: int, frame: object) -> None:
        raise TooLong(f"longer than {SECONDS:.0f} s")

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time: the machine may be busy with other things
    signal.setitimer(signal.ITIMER_REAL, BLOCKED)
    try:
        read(folder)
    except RsgwmError as error:
        line = str(error)
        sound = line.strip() and "\n" not in line and "\r" not in line and len(line) < 2000
        return ("refused" if sound else "failed"), line if sound else f"not one short line: {line[:300]!r}"
    except BaseException as error:  # whatever else: that is what is looked for
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {str(error)[:200]} ({Path(frame.filename).name}:{frame.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read", ""


def limit_memory() -> None:
    """Refuse addresses beyond ``MEMORY``, where the system knows such a limit (macOS takes it and does not keep it)."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(lines: list[str]) -> None:
    """Read each input: lines of a reader's name and a mutant's number or the name of a kept file."""
    with tempfile.TemporaryDirectory() as work:
        made: dict[str, Path] = {}
        for line in lines:
            name, chosen = line.split()
            reader, sound = READERS[name], Path(work) / name
            if name not in made:
                sound.mkdir()
                reader.make(sound)
                made[name] = shutil.copytree(sound, Path(work) / f"{name}-copy")
                reader.read(made[name])  # must be read, and imports what it needs
                limit_memory()
            data = (sound / reader.file).read_bytes()
            folder = Path(work) / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sound, folder)
            damaged = b""
            if chosen in STANDING:
                (folder / reader.file).unlink()
                STANDING[chosen](folder / reader.file, data)
            else:
                kept = SEEDS / name / chosen
                damaged = mutate(reader.kind, data, int(chosen)) if chosen.isdigit() else kept.read_bytes()
                (folder / reader.file).write_bytes(damaged)
            print(f"begin {line}", flush=True)
            before, started = peak_memory(), time.process_time()
            verdict, text = outcome(reader.read, folder)
            busy = time.process_time() - started
            found = {"reader": name, "input": chosen, "verdict": verdict, "text": text, "busy": busy}
            found["sha256"] = hashlib.sha256(damaged).hexdigest()
            print(json.dumps({**found, "grown": peak_memory() - before}), flush=True)


if __name__ == "__main__":
    main(sys.stdin.read().splitlines())
