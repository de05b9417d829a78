"""Where addresses are limited a second process says what a crash means; any other end is the end of both."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a limit of addresses")
PROGRAM = """
import ctypes, os, resource, signal, sys, threading, time
from mlx_rsgwm.cli import crashes
if {limited}:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
crashes.PATIENCE = 0.3
with crashes.crashes_told() as limit:
    if limit is not None:
        print("told", limit)
        sys.exit(2)
    print("begun", flush=True)
    {act}
"""


def start(act, limited=True):
    program = PROGRAM.format(act=act, limited=limited)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@linux
@pytest.mark.parametrize(
    "act",
    ["os.abort()", "os.kill(os.getpid(), signal.SIGSEGV)", "ctypes.CDLL(None).exit(1)",
     "lock = threading.Lock(); lock.acquire(); lock.acquire()"],
    ids=["aborts", "reads what is not there", "is ended by a library", "waits for itself"],
)  # fmt: skip
def test_a_crash_is_told(act):
    told, _ = (child := start(act)).communicate(timeout=60)
    assert (child.returncode, told.split()) == (2, ["begun", "told", str(4 << 30)])


@linux
@pytest.mark.parametrize(
    ("act", "code"),
    [("pass", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("raise KeyError", 1),
     ("time.sleep(1.5)", 0)],
)  # fmt: skip
def test_any_other_end_is_the_commands_own(act, code):
    told, _ = (child := start(act)).communicate(timeout=60)
    assert (child.returncode, told) == (code, "begun\n")


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_once(number):
    act = f"signal.signal({number:d}, lambda *_: (time.sleep(0.5), sys.exit(7))); print(flush=True); time.sleep(60)"
    child = start(act)
    assert [child.stdout.readline(), child.stdout.readline()] == ["begun\n", "\n"]
    child.send_signal(number)
    assert child.wait(60) == 7


@linux
def test_who_is_killed_takes_the_command_along():
    child = start("print(os.getpid(), flush=True); time.sleep(60)")
    child.stdout.readline()
    command = int(child.stdout.readline())
    child.kill()
    child.wait()
    ends = time.monotonic() + 60
    while runs(command):
        assert time.monotonic() < ends
        time.sleep(0.05)


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_a_limit_there_is_one_process():
    child = start("print(os.getpid())", limited=False)
    assert child.communicate(timeout=60)[0] == f"begun\n{child.pid}\n"
