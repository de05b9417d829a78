"""What is no file, or no text, where a command reads one: every path of every command, by click's own list of them.

What stands inside folders in a file's place is in ``tests/malformed``.
"""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

from mlx_rsgwm.cli.options.paths import FilePath, NewPath
from tests.outside import fed
from tests.outside.commands import SOUND, command_line, key_of, valued
from tests.outside.test_odd_values import ENDLESS, KEEPS, SLOW

SAMPLE = 80
SECONDS, MEGABYTES = 2.0, 300
NAMES_FILES = {"recipe", "files", "--base", "name", "--task", "--recipe", "--data"}  # texts that may be paths
SUFFIXES = ("", ".jsonl", ".safetensors", ".gguf", ".yaml", ".json")
TEXT = '{"question": "What is 1 + 1?", "answer": "2"}\n'


def bind(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's name has a hundred characters at most
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(before)


def make_sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 30)


STANDING = {
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": bind,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "folder": lambda path: path.mkdir(),
    "gigabyte": make_sparse,
    "empty": lambda path: path.touch(),
    "nul": lambda path: path.write_bytes(TEXT[:20].encode() + b"\0" + TEXT[20:].encode()),
    "mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode()),
    "utf-16": lambda path: path.write_bytes(TEXT.encode("utf-16")),
}
NEVER_READ = ("fifo", "device", "socket", "loop", "dangling")
# What is not read in every command: folders of data sets by generated tasks, a base that is only named.
WRITTEN = {("audit", "--plan")}
NOT_ALWAYS_READ = {"--questions", "--base", "--drafts-file"}


@pytest.fixture(scope="module")
def standing(work):
    folder = work / "standing"
    folder.mkdir()
    for what, make in STANDING.items():
        for suffix in SUFFIXES:
            make(folder / f"{what}{suffix}")
    return folder


def cases(commands):
    return [
        (command, key_of(parameter), f"standing/{what}{suffix}")
        for command in commands
        for parameter in valued(command)
        if (command, key_of(parameter)) not in WRITTEN
        if (isinstance(parameter.type, FilePath) and not isinstance(parameter.type, NewPath))
        or key_of(parameter) in NAMES_FILES
        for what in STANDING
        for suffix in SUFFIXES
    ]


def failures(tried, outcomes, problems):
    lines = [command_line(*case) for case in tried]
    wrong = []
    for (command, key, value), (_, ended) in zip(tried, outcomes(lines), strict=True):
        if (command, key) in KEEPS and Path(value).stem == "empty":
            ended["changed"] = []  # as a run that was killed before its first line left it
        if command in ENDLESS and ended["code"] == 130:
            continue  # it was taken, and served until it was told to stop
        told = problems(ended, MEGABYTES)
        if ended["code"] == 2 and ended["busy"] > SECONDS:
            told.append(f"{ended['busy']:.1f} s")
        never = Path(value).stem in NEVER_READ
        if never and ended["code"] != 2 and key not in NOT_ALWAYS_READ:
            told.append(f"exit {ended['code']}")
        if told:
            wrong.append((command, key, value, *told))
    return wrong


def test_paths_are_found():
    found = {case[:2] for case in cases(SOUND)}
    assert len(found) >= 60
    assert {("audit", "--data"), ("audit", "--merged"), ("merge", "--plan"), ("train", "--config")} <= found
    assert {("hub push", "--certificate"), ("convert check", "peft")} <= found


def test_a_sample_of_what_stands_in_a_paths_place(standing, outcomes, problems):
    tried = random.Random(11).sample(cases([name for name in SOUND if name not in SLOW]), SAMPLE)
    wrong = failures(tried, outcomes, problems)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in SOUND if name != "lm-eval"])
def test_all_that_stands_in_a_paths_place(command, standing, outcomes, problems):
    there = cases([command])
    wrong = failures(tried := fed.share(there, command), outcomes, problems)
    fed.keep("what is no file, or no text", command, len(tried), len(there), len(wrong))
    assert not wrong, "\n".join(map(str, wrong))
