"""What the tests of what comes from outside share: a folder of work, and whoever runs commands in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

from tests.outside.commands import make_work

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def work(tiny_base, tmp_path_factory):
    """What every sound command line names; made once, and the same after every command."""
    folder = tmp_path_factory.mktemp("outside") / "a" / "b"  # so that `..` is nobody else's
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        make_work(folder, tiny_base)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def outcomes(work, tmp_path_factory):
    """``outcomes(command lines)``: each with how it ended, in children; one that dies is followed by another."""
    home = tmp_path_factory.mktemp("home")
    places = {name: str(home / name) for name in ("HOME", "RSGWM_CACHE", "HF_HOME")}
    offline = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PYTHONPATH": str(HERE.parent.parent)}

    def run(lines: list[list[str]], seconds: float = 8) -> Iterator[tuple[list[str], dict]]:
        waiting = list(lines)
        while waiting:
            with open(home / "errors", "w") as errors:
                child = subprocess.Popen(
                    [sys.executable, str(HERE / "runner.py"), str(work)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env={**os.environ, **places, **offline},
                )  # fmt: skip
            while waiting:
                words = waiting.pop(0)
                yield words, (ended := one(child, words, seconds))
                if ended["code"] in (130, -1, "died"):
                    break
            child.stdin.close()
            child.wait()

    def one(child, words, seconds):
        timer = Timer(60 * seconds + 900, child.kill)  # beyond the runner's own limits; the first waits for the imports
        timer.start()
        child.stdin.write(
            json.dumps({"words": [*words, *["--quiet"] * (words[0] != "help")], "seconds": seconds}) + "\n"
        )
        child.stdin.flush()
        printed = child.stdout.readline()
        printed = child.stdout.readline() if printed == "begin\n" else printed
        timer.cancel()
        if printed:
            return json.loads(printed)
        told = (home / "errors").read_text()[-400:]
        nothing = {"raised": "", "seconds": 0.0, "busy": 0.0, "grown": 0, "left": [], "changed": []}
        return {**nothing, "code": "died", "stderr": told}

    return run


@pytest.fixture(scope="session")
def problems():
    """``problems(command, ended, megabytes)``: what is wrong with how a command ended; empty where nothing is."""

    def judge(ended: dict, megabytes: int = 600, codes: tuple = (0, 2, 3)) -> list[str]:
        told = [line for line in ended["stderr"].splitlines() if not line.startswith(("note: ", "warning: "))]
        refused = ended["code"] == 2
        wrong = {
            f"code {ended['code']}": ended["code"] not in codes,
            f"raised {ended['raised'][:200]}": ended["raised"],
            "a traceback": "Traceback" in ended["stderr"],
            f"{len(told)} lines": refused and len(told) != 1,
            f"left {ended['left'][:3]}": refused and ended["left"],
            f"changed {ended['changed'][:3]}": ended["changed"],
            f"{ended['grown'] >> 20} MB": ended["grown"] > megabytes << 20,
            f"a line of {len(told[-1]) if told else 0} characters": refused and told and len(told[-1]) > 2000,
        }
        return [text for text, is_so in wrong.items() if is_so] + (
            [ended["stderr"][-300:]] if any(wrong.values()) else []
        )

    return judge
