"""The cores of this process, and threads on them that sleep while there is nothing to do."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np


@cache
def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores() - 1))  # the caller is one more


def on_all_cores(work: Callable[[int, int], None], count: int, least: int = 1) -> None:
    """``work(first, last)`` on shares of ``count`` things, ``least`` or more in each, on all cores."""
    share = max(least, -(-count // cores()))
    others = [_threads().submit(work, first, min(first + share, count)) for first in range(share, count, share)]
    work(0, min(share, count))
    for other in others:
        other.result()


class _BlasThreads:
    """How many threads NumPy's own OpenBLAS had before the first of those who want one asked for it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._asking = 0
        self._before = 1

    def ask(self, library: ctypes.CDLL) -> None:
        with self._lock:
            if not self._asking:
                self._before = library.scipy_openblas_get_num_threads64_()
                library.scipy_openblas_set_num_threads64_(1)
            self._asking += 1

    def leave(self, library: ctypes.CDLL) -> None:
        with self._lock:
            self._asking -= 1
            if not self._asking:
                library.scipy_openblas_set_num_threads64_(self._before)


_BLAS_THREADS = _BlasThreads()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """NumPy's own OpenBLAS on one thread inside: more would spin beside work that has the other cores. Several threads
    may ask for it at a time."""
    library = numpys_openblas()
    if library is None:
        yield
        return
    _BLAS_THREADS.ask(library)
    try:
        yield
    finally:
        _BLAS_THREADS.leave(library)


@cache
def numpys_openblas() -> ctypes.CDLL | None:
    """The OpenBLAS inside NumPy's Linux wheel; None where NumPy has another BLAS."""
    for path in Path(np.__file__).parent.with_name("numpy.libs").glob("libscipy_openblas64_*.so"):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "scipy_openblas_set_num_threads64_"):
            return library
    return None
