"""Long work under pressure: stopped and woken, told to end once and twice, a clock that is set, memory that ends.

Whatever comes, what was finished stays, and the same command again ends in the bytes of an undisturbed run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mlx_rsgwm.core import files
from mlx_rsgwm.training.state import TrainingRun
from tests.faults.catalogue import KINDS
from tests.faults.small_work import run

DAY = 24 * 3600
LONG = ["merge", "train", "eval", "ask", "run"]  # what takes long at full size
QUICK = {"train": 1, "merge": 1}  # at how many events in the default tests


def spread(found, count):
    """So many events evenly through those of a command."""
    return [1 + (found.events - 1) * place // (count + 1) for place in range(1, count + 1)]


def stopped(found, event, **how):
    """How a command went on that was told to end at ``event``: an outcome of ``tally``."""
    found.fresh()
    ended = found.once(kill_at=event, **how)
    lines = ended.stderr.strip().splitlines()
    if ended.code == 0:  # it was through before it heard
        return "finished" if found.made() == found.expected else f"wrong: event {event}: other bytes"
    if ended.code != 130 or len(lines) > 1 + found.warnings or "interrupted" not in lines[-1]:
        return f"wrong: event {event}: exit {ended.code}: {ended.stderr[-400:]}"
    return found.again(f"event {event}")


def undisturbed(found, event, **how):
    """What differs from an undisturbed run in one that was disturbed at ``event`` and was not to notice."""
    found.fresh()
    ended = found.once(kill_at=event, **how)
    if ended.code != 0 or found.made() != found.expected:
        return f"event {event}: exit {ended.code}, or other bytes: {ended.stderr[-400:]}"
    return f"event {event}: {found.left_over()}" if found.left_over() else ""


def check(name, found, events, tally=None):
    told = [stopped(found, event, number=number) for event in events for number in (signal.SIGTERM, signal.SIGINT)]
    twice = [stopped(found, event, number=signal.SIGINT, times=2) for event in events]
    assert [outcome for outcome in told + twice if outcome not in ("again", "finished")] == []
    unnoticed = [undisturbed(found, event, number=signal.SIGSTOP) for event in events]
    unnoticed += [undisturbed(found, event, step=step) for event in events for step in (-DAY, 400 * DAY)]
    assert [wrong for wrong in unnoticed if wrong] == []
    if tally is not None:
        tally.keep(name, "signals and clocks", [*told, *twice, *["again"] * len(unnoticed)])


SET_CLOCK = """
import ctypes, sys, time
shim = ctypes.CDLL(sys.argv[1])
room, number, times, step = ctypes.c_longlong, ctypes.c_int, ctypes.c_int, ctypes.c_longlong
shim.watch.argtypes = [ctypes.c_char_p, ctypes.c_long, room, number, times, step]
shim.watch(sys.argv[2].encode(), 1, -1, 9, 1, -86400)
before, steady = time.time(), time.monotonic()
open(sys.argv[2] + "/a", "w").close()
print(round((before - time.time()) / 3600), round(time.monotonic() - steady))
"""


def test_the_clock_on_the_wall_is_set_at_the_event(shim, tmp_path):
    program = [sys.executable, "-c", SET_CLOCK, shim, tmp_path]
    ended = subprocess.run(program, env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True)
    assert ended.stdout.split() == ["24", "0"], ended.stderr


@pytest.mark.parametrize("name", list(QUICK))
def test_signals_and_clocks_at_a_few_events(harness, name):
    found = harness(name)
    check(name, found, spread(found, QUICK[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_signals_and_clocks(harness, tally, name):
    """At eight events, or as few as RSGWM_MOST_EVENTS says."""
    found = harness(name)
    check(name, found, spread(found, min(8, int(os.environ.get("RSGWM_MOST_EVENTS", 8)))), tally)


# What MLX says of memory that it did not get: the Metal allocator, a command buffer on Metal, the CUDA allocator.
NO_MEMORY = [
    MemoryError("std::bad_alloc"),
    RuntimeError(
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size"
    ),
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallback)"),
    RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_memory_that_ends_in_training_loses_no_step_that_was_saved(work, tiny_base, tmp_path, monkeypatch, error):
    kind = KINDS["train"]
    for name in ("whole", "short"):
        (tmp_path / name).mkdir()
    assert run(*kind.arguments(work, tiny_base, tmp_path / "whole")).exit_code == 0
    step = TrainingRun.step

    def short(self, keep_sum):
        if self.done == 5:
            raise error
        return step(self, keep_sum)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "step", short)
        ended = run(*kind.arguments(work, tiny_base, tmp_path / "short"))
    assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "out of memory" in ended.stderr
    assert "--batch-size" in ended.stderr
    assert list((tmp_path / "short/out/checkpoints").glob("step-*"))
    assert run(*kind.arguments(work, tiny_base, tmp_path / "short")).exit_code == 0
    for name in kind.written:
        assert files.sha256_file(tmp_path / "short" / name) == files.sha256_file(tmp_path / "whole" / name)
    assert not list((tmp_path / "short").rglob(".*"))
