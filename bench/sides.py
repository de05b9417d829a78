"""A bench's sides, each in a process of its own: its own libraries, threads and memory, asked for trials in turns.

Two frameworks in one process share what was preloaded for one of them. OpenBLAS, which MLX needs on Linux, takes the
place of the library that torch brings and makes torch two to four times slower than it is.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError

# What is set for MLX's CPU back end (Makefile), and would change the library or the threads of anything else.
FOR_MLX = (
    "LD_PRELOAD", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip
ENDS_WITHIN = 10.0  # seconds that a side gets to end by itself


class SideProcess:
    """An object that lives in another process; ``call`` runs one of its methods there."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name, self._connection = name, connection
        self.facts: dict[str, Any] = self._answer()

    def call(self, method: str, *arguments: Any) -> Any:
        """``side.method(*arguments)``, both picklable.

        Raises:
            RsgwmError: what the method raised, or that the process died; any other error as a RuntimeError with its
                traceback.
        """
        self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            done, value = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RsgwmError(f"the process of {self.name} died (out of memory?); try smaller settings") from None
        if done:
            return value
        raise value


@contextmanager
def side_process(
    name: str, make: Callable[..., Any], *arguments: Any, without_mlx: bool = True
) -> Iterator[SideProcess]:
    """Start ``make(*arguments)``, a function of a module, in a new process; its ``facts`` come back first.

    ``without_mlx``: without what :data:`FOR_MLX` names; else with this process's environment.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
    with _environment(dict.fromkeys(FOR_MLX) if without_mlx else {}):
        process.start()
    there.close()
    try:
        yield SideProcess(name, here)
    finally:
        here.close()
        process.join(ENDS_WITHIN)
        if process.is_alive():
            process.terminate()
            process.join()


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: make the side, then answer calls until the other end closes."""

    def answer(work: Callable[[], Any]) -> bool:
        try:
            connection.send((True, work()))
        except RsgwmError as error:
            connection.send((False, error))
        except Exception:  # whatever it is, the asking process shows it and ends
            connection.send((False, RuntimeError(traceback.format_exc())))
            return False
        return True

    sides = []

    def start() -> Any:
        sides.append(make(*arguments))
        return sides[0].facts

    if not answer(start) or not sides:
        return
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        if not answer(lambda: getattr(sides[0], method)(*given)):  # noqa: B023 - called before the next turn
            return


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables set, or unset where None, for the length of a block: a new process inherits them."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


def loaded_blas() -> str:
    """The file names of the BLAS libraries that this process has loaded by preloading, or "none preloaded"."""
    preloaded = [part for part in os.environ.get("LD_PRELOAD", "").split(":") if part]
    names = [os.path.basename(part) for part in preloaded if os.path.exists(part)]
    return ", ".join(names) or "none preloaded"
