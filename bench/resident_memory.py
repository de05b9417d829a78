"""What a piece of work costs: its seconds, and the resident memory that it adds at its peak."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 2**20


def resident() -> float:
    """This process's resident memory in MB; where the system does not say, its peak so far."""
    return _status("VmRSS") or _highest()


def forget_peak() -> None:
    """Let :func:`peak` count from now on, on Linux; elsewhere it is the peak of the whole process."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> float:
    """The highest resident memory since :func:`forget_peak`, in MB."""
    return _status("VmHWM") or _highest()


def _status(name: str) -> float:
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")), 0.0)


def _highest() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MB if sys.platform == "darwin" else 1024)


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of ``work`` on the wall and of the processors, the memory it added at its peak in MB, and its result."""
    forget_peak()
    before, busy, started = resident(), time.process_time(), time.perf_counter()
    result = work()
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return {"seconds": seconds, "cpu_seconds": busy, "mb": peak() - before, "before": before, "result": result}
