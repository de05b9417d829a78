"""Runs command lines, one after the other in one process, and says how each ended; a script.

    python tests/outside/runner.py WORK

Each line of standard input is a JSON object: ``words`` and ``seconds``. Before each it prints ``begin``, after it
one line of JSON, so that whoever started it knows which one ended the process or never came back. After
``seconds`` of processor time a command gets what Ctrl-C sends. What it wrote is looked at and removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

# Of processor time, as the machine may be busy with other things; and on the wall, for what waits for ever: a process
# that gets a fortieth of a processor is given all of the former before the latter.
LIMITS = ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, 40))
# What commands import: the first must not pay for all, and an interrupt must not leave a module half imported.
PRELOADED = (
    "mlx.core", "mlx_lm", "mlx_lm.utils", "transformers.models.auto.tokenization_auto", "mlx_rsgwm.recipes.run",
    "mlx_rsgwm.training.loop", "mlx_rsgwm.evaluation.runner", "mlx_rsgwm.converters.peft", "datasets",
    "mlx_rsgwm.evaluation.report.folder",
)  # fmt: skip


DEVICES = ("/dev/null", "/dev/zero", "/dev/full")  # odd values name them, and root may put files in their places


def peak_memory() -> int:
    """The most bytes that this process has had in memory since :func:`forget_peak`, where the system tells."""
    for line in Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every name below a folder, and devices, with what a change of it would change."""
    names = {}
    for device in filter(os.path.exists, DEVICES):
        status = os.lstat(device)
        names[device] = (status.st_ino, status.st_mode, 0)
    for place, below, held in os.walk(folder):
        for name in (*below, *held):
            status = os.lstat(os.path.join(place, name))
            names[os.path.join(place, name)] = (status.st_ino, status.st_mode, status.st_size)
    return names


def once(words: list[str], seconds: float) -> dict[str, Any]:
    """How one command line ended."""
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    forget_peak()
    idle, started, busy = peak_memory(), time.monotonic(), time.process_time()
    for name, timer, limit in LIMITS:
        signal.signal(name, signal.default_int_handler)
        signal.setitimer(timer, limit * seconds)
    try:
        done = CliRunner().invoke(rsgwm, words)
        code, errors = done.exit_code, done.stderr
        raised = repr(done.exception) if done.exception and not isinstance(done.exception, SystemExit) else ""
    except BaseException as error:  # an interrupt outside of the command, among others
        code, errors, raised = -1, "", repr(error)
    finally:
        for _, timer, _ in LIMITS:
            signal.setitimer(timer, 0)
    return {
        "code": code, "stderr": errors[-3000:], "raised": raised, "seconds": time.monotonic() - started,
        "busy": time.process_time() - busy, "grown": peak_memory() - idle,
    }  # fmt: skip


def main() -> None:
    work = Path(sys.argv[1])
    for name in PRELOADED:
        import_module(name)
    for line in sys.stdin:
        task = json.loads(line)
        os.chdir(work)
        before = tree(work)
        print("begin", flush=True)
        ended = once(task["words"], task["seconds"])
        os.chdir(work)
        after = tree(work)
        ended["left"] = sorted(before.keys() ^ after.keys())
        both = before.keys() & after.keys()
        ended["changed"] = sorted(name for name in both if before[name] != after[name] and not os.path.isdir(name))
        print(json.dumps(ended), flush=True)
        restore(after.keys() - before.keys())
        if ended["code"] in (130, -1):  # what was interrupted may be an import, half done
            break


def restore(more: set[str]) -> None:
    """Remove what a command wrote, so that the next one finds what this one did."""
    for name in sorted(more):
        if os.path.isdir(name) and not os.path.islink(name):
            shutil.rmtree(name, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


if __name__ == "__main__":
    main()
