"""Runs commands in processes of their own that can be killed at an event, without paying for the imports each time.

    LD_PRELOAD=…:interpose.so python tests/faults/server.py

One JSON object a line in, one out: commands that are started together, and how they ended.
The server imports the package and forks for every command; nothing is computed
before the fork, since MLX's threads would not survive it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

PRELOADED = (
    "mlx.core", "mlx_lm", "mlx_lm.utils", "transformers", "mlx_rsgwm.cli.main", "mlx_rsgwm.recipes.run",
    "mlx_rsgwm.training.loop", "mlx_rsgwm.evaluation.runner", "mlx_rsgwm.converters.peft",
)  # fmt: skip


def serve() -> None:
    shim = ctypes.CDLL(os.environ["FAULTS_SHIM"])
    shim.watch.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_longlong]
    shim.events.restype = ctypes.c_long
    shim.written.restype = ctypes.c_longlong
    for name in PRELOADED:
        import_module(name)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        shim.watch(os.fsencode(task["root"]), task["kill_at"], task["room"])
        children = [started(arguments, Path(f"{task['log']}-{n}")) for n, arguments in enumerate(task["commands"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps({"codes": codes, "events": shim.events(), "written": shim.written()}), flush=True)
        shim.watch(b"", 0, -1)


def started(arguments: list[str], log: Path) -> int:
    """The id of a new process that runs a command."""
    child = os.fork()
    if child == 0:
        command(arguments, log)
    return child


def command(arguments: list[str], log: Path) -> None:
    """In the child: the command, its streams in files beside ``log``."""
    from mlx_rsgwm.cli.main import main

    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)  # the server's own was read from already
    sys.argv = ["rsgwm", *arguments]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
