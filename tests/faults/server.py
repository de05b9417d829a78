"""Runs commands in processes of their own that can be killed at an event, without paying for the imports each time.

    LD_PRELOAD=…:interpose.so python tests/faults/server.py

One JSON object a line in, one out: commands that are started together, and how they ended. With ``states``, a folder,
every state of the watched folder in which a kill could leave it is kept there (``states.py``).
The server imports the package, and what earlier commands had to import, and forks for every command; nothing is
computed before the fork, since MLX's threads would not survive it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from matplotlib.figure import Figure

from mlx_rsgwm.cli.commands import COMMANDS
from mlx_rsgwm.cli.startup import hide_torch
from tests.faults.states import Recorder

PRELOADED = (
    "mlx.core", "mlx_lm", "mlx_lm.utils", "mlx_lm.models.llama", "transformers", "transformers.models.llama",
    "math_verify", "scipy.stats", "matplotlib.pyplot", "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg", "PIL.features", "pydantic.dataclasses", "pdb", "mlx_rsgwm.models.tokenizer",
    "mlx_rsgwm.evaluation.chosen_questions", "mlx_rsgwm.recipes.run", "mlx_rsgwm.training.loop",
    "mlx_rsgwm.evaluation.runner", "mlx_rsgwm.converters.peft.bulk", "mlx_rsgwm.studies.control_study",
    "mlx_rsgwm.studies.merge_sweep", "mlx_rsgwm.studies.paper_tables",
)  # fmt: skip


def serve() -> None:
    shim = ctypes.CDLL(os.environ["FAULTS_SHIM"])
    shim.watch.argtypes = [
        ctypes.c_char_p, ctypes.c_long, ctypes.c_longlong, ctypes.c_int, ctypes.c_int, ctypes.c_longlong
    ]  # fmt: skip
    shim.events.restype = ctypes.c_long
    shim.written.restype = ctypes.c_longlong
    shim.peeks.restype = ctypes.c_long
    hide_torch(["train"])  # as every command does that computes without it
    for name in (*PRELOADED, *(place.partition(":")[0] for place, _ in COMMANDS.values())):
        import_module(name)
    Figure.draw = lambda figure, renderer: None  # blank pictures: drawing is most of some commands' work, and no file's
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        signals = task["signal"], task["times"], task["step"]
        shim.watch(os.fsencode(task["root"]), task["kill_at"], task["room"], *signals)
        shim.count_peeks(os.fsencode(task["dead"]))
        recorder = Recorder(Path(task["root"]), Path(task["states"])) if task["states"] else None
        if recorder:
            shim.hold()
        logs = [Path(f"{task['log']}-{number}") for number in range(len(task["commands"]))]
        children = [started(*each, task["memory"]) for each in zip(task["commands"], logs, strict=True)]
        if recorder:
            codes = [recorded(child, shim, recorder) for child in children]
        else:
            codes = [ended(child) for child in children]
        counts = {"events": shim.events(), "written": shim.written(), "peeks": shim.peeks()}
        print(json.dumps({"codes": codes, **counts}), flush=True)
        shim.watch(b"", 0, -1, 0, 0, 0)
        for log in logs:
            import_what_was_imported(log.with_suffix(".modules"))


def import_what_was_imported(file: Path) -> None:
    """Import the modules that a command found missing; one that was killed does not tell."""
    if file.exists():
        for name in file.read_text().split():
            if name.partition(".")[0] == "torch":  # which no command needs that is tried here
                continue
            with suppress(ImportError):
                import_module(name)
        file.unlink()
    gc.freeze()  # a collection in a child would copy every page of what it inherits


def ended(child: int) -> int:
    """The exit code of a process, which is let go on whenever it was stopped."""
    while True:
        status = os.waitpid(child, os.WUNTRACED)[1]
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
        os.kill(child, signal.SIGCONT)


def recorded(child: int, shim: ctypes.CDLL, recorder: Recorder) -> int:
    """The exit code of a process that is held at every event until the folder was looked at."""
    while True:
        if shim.is_held(20):
            recorder.keep(shim.events())
            shim.go()
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


def started(arguments: list[str], log: Path, memory: int) -> int:
    """The id of a new process that runs a command, with ``memory`` more bytes of addresses; 0 for no limit."""
    child = os.fork()
    if child == 0:
        if memory:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + memory,) * 2)
        command(arguments, log)
    return child


def command(arguments: list[str], log: Path) -> None:
    """In the child: the command, its streams in files beside ``log``."""
    from mlx_rsgwm.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and that is inherited
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)  # the server's own was read from already
    sys.argv = ["rsgwm", *arguments]
    code, before = 1, set(sys.modules)
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
        log.with_suffix(".modules").write_text("\n".join(sys.modules.keys() - before))
        os._exit(code)


if __name__ == "__main__":
    serve()
