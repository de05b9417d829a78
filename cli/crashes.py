"""What a crash means where memory is limited: told by a second process, as the one that crashed cannot.

MLX's CPU back end takes what the system's allocator gives without a look, and BLAS ends the process where it gets
nothing: neither says why. Under a limit of addresses (``ulimit -v``) a command therefore runs in a child, and its
parent waits, passes signals on, and ends as the child did, or learns here that it crashed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from mlx_rsgwm.core.signals import TOLD_TO_END

CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT}
PASSED_ON = {signal.SIGINT, *TOLD_TO_END}
PATIENCE = 15.0  # seconds without any work
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def address_limit() -> int | None:
    """Bytes of addresses that this process may have; None for no limit, or a system that keeps none."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY or sys.platform != "linux" else limit


@contextmanager
def crashes_told() -> Iterator[int | None]:
    """The body runs in a child where addresses are limited, and is given None there, as where nothing is limited.

    In the parent it runs only if that child crashed, and is given its limit; otherwise the parent ends as the child.
    """
    limit = address_limit()
    if limit is None:
        yield None
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD})
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield None
        finally:
            os.write(writing, b".")  # a library that ends the process passes this over
        return
    os.close(writing)
    status = _waited_for(child)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    crashed = os.WTERMSIG(status) in CRASHES if os.WIFSIGNALED(status) else not os.read(reading, 1)
    yield limit if crashed else _end_as(status)


def _waited_for(child: int) -> int:
    """The wait status of a child; signals from other processes are passed on, a terminal sends its own to both.

    One that stands still is ended: MLX also was seen to wait for ever for what had got no memory.
    """
    worked = -1
    while True:
        told = signal.sigtimedwait({*PASSED_ON, signal.SIGCHLD}, PATIENCE)
        if told is None:
            before, worked = worked, _work_of(child)
            if before == worked and _only_waits(child):
                os.kill(child, signal.SIGABRT)
        elif told.si_signo in PASSED_ON and told.si_code <= 0:
            os.kill(child, told.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status


def _work_of(process: int) -> int:
    """Ticks of processor time that a process has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _only_waits(process: int) -> bool:
    """Whether each of its threads waits for another, and none for a file, a terminal or the clock."""
    return all("futex" in path.read_text() for path in Path(f"/proc/{process}/task").glob("*/wchan"))


def _end_as(status: int) -> NoReturn:
    """End as a child did: with its exit code, or by the same signal."""
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))
