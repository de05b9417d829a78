"""What the tests of failing machines share: small work of every kind, and a server whose commands can be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults import small_work
from tests.faults.catalogue import KINDS
from tests.faults.harness import Harness
from tests.faults.small_work import run
from tests.faults.tally import Tally

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-9: killed), and what it wrote to standard error.

    ``events`` are the changes to the watched folder, ``written`` the bytes written there, ``peeks`` how often something
    half written was read.
    """

    code: int
    stderr: str
    events: int
    written: int
    peeks: int


class Server:
    """Runs commands, each a process of its own, with every change below a folder counted (``server.py``)."""

    def __init__(self, shim: Path, logs: Path, hub: Path) -> None:
        preload = ":".join(filter(None, [os.environ.get("LD_PRELOAD", ""), str(shim)]))
        threads = dict.fromkeys(("BLIS_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        offline = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parents[1])}
        self._log = logs / "log"
        self._process = subprocess.Popen(
            [sys.executable, HERE / "server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, **offline, "LD_PRELOAD": preload, "FAULTS_SHIM": str(shim)},
        )
        assert json.loads(self._process.stdout.readline())["ready"]

    def run(self, command: list, root: Path, **how: Any) -> Ended:
        """Run a command; ``kill_at``: before which change below ``root`` (1 is the first, 0 none) it is killed;
        ``room``: after how many written bytes the disk is full (-1: never). ``number``: another signal than SIGKILL,
        ``times``: at how many events from there on; ``step``: seconds that the clock is off from there on, without a
        signal. ``memory``: how many bytes of addresses it may have beside those it starts with. ``states``: a folder
        for every state in which a kill could leave ``root``. ``dead``: what the names have whose reading is counted."""
        return self.together([command], root, **how)[0]

    def together(
        self,
        commands: list[list],
        root: Path,
        kill_at: int = 0,
        room: int = -1,
        number: int = signal.SIGKILL,
        times: int = 1,
        step: int = 0,
        memory: int = 0,
        states: Path | None = None,
        dead: str = "",
    ) -> list[Ended]:
        """Commands that are started at once; their events and bytes are counted as one."""
        task = {
            "commands": [[*map(str, command), "--quiet"] for command in commands],
            "root": str(root),
            "kill_at": kill_at,
            "room": room,
            "signal": int(number),
            "times": times,
            "step": step,
            "memory": memory,
            "states": str(states or ""),
            "dead": dead,
            "log": str(self._log),
        }
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return [
            Ended(
                code,
                Path(f"{self._log}-{number}.err").read_text(),
                answer["events"],
                answer["written"],
                answer["peeks"],
            )
            for number, code in enumerate(answer["codes"])
        ]

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that stands between a program and its files, compiled."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("what stands between a program and its files needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "interpose.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "interpose.c", "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def server(shim, work, tmp_path_factory):
    """A server of commands that can be killed at an event."""
    running = Server(shim, tmp_path_factory.mktemp("log"), work / "hub")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def work(tiny_base, tmp_path_factory):
    """Corpora, a pool of two adapters, its drafter and verifier, questions, a recipe."""
    from mlx_rsgwm.data.corpus import make_rows, save_corpus
    from mlx_rsgwm.data.select import select_questions
    from mlx_rsgwm.data.template import TEMPLATES
    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.training.config import TrainConfig
    from mlx_rsgwm.training.loop import train

    folder = tmp_path_factory.mktemp("work")
    base = load_base(str(tiny_base), dtype="float32")
    config = TrainConfig(rank=4, alpha=8.0, keys=("self_attn.q_proj", "self_attn.v_proj"), learning_rate=1e-2)
    for task in ("change", "groups"):
        rows = make_rows(select_questions(task, "train", 16, 0, None).questions, 8, 8, 0)
        corpus = save_corpus(folder / "corpus" / task, rows, TEMPLATES["plain"], {"seed": 0})
        train(base, corpus, config).save(folder / "pool" / task)
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(6)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "tiny",
        "base": str(tiny_base),
        "data": {"tasks": ["change", "groups"], "rows": 24, "verify_share": 0.5, "calibration_items": 2},
        "train": {"rank": 4, "alpha": 8, "batch_size": 4, "learning_rate": 1e-2},
        "loop": {"attempts": 2, "max_tokens": 6, "threshold": "auto"},
        "evaluate": {"items": 3, "timed": 0},
        "export": {"parity": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for role in ("draft", "verify"):
        done = run("merge", folder / "pool/change", folder / "pool/groups", "--role", role, "--out", folder / role)
        assert done.exit_code == 0, done.stderr
    for name, out in (("to-peft", "draft-peft"), ("to-gguf", "draft.gguf")):
        done = run("convert", name, folder / "draft", "--out", folder / out)
        assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def harness(server, work, tiny_base, tmp_path):
    """Of a name in the catalogue, the harness that knows what its command makes; with ``states``, what kills leave."""
    (tmp_path / "states").mkdir()

    def of(name: str, states: bool = False) -> Harness:
        for needed in KINDS[name].needs:
            small_work.make(needed, work, tiny_base)
        made = Harness(server, KINDS[name], work, tiny_base, tmp_path / "place", tmp_path / "states")
        made.learn(states)
        return made

    return of


@pytest.fixture(scope="session")
def tally():
    """Counts of what was tried, for docs/reliability.md; kept where RSGWM_TALLY names a file (`make faults`)."""
    return Tally(os.environ.get("RSGWM_TALLY"))
