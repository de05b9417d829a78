"""Every state in which a kill can leave a folder, taken while one undisturbed command runs.

A command that is killed at an event leaves the files that were written before it. So one run that is held at every
event (``interpose.c``) shows the states of all kills at once, and each different one is gone on from once.

Two states are the same where all names and all bytes are, but for what is half written, whose names are those of
:mod:`mlx_rsgwm.core.temporary`: who wrote it, which is in the name; its bytes; and what is half written inside of it.
Bytes that nobody reads make no difference: what is read of them by the command that goes on from a state is counted,
and is a fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.temporary import NAME

RACY = 0.1  # seconds: a file that was changed so shortly before it is looked at may change again without a new time

# By name below the folder: kind, mode, and a link's target, or a file's inode, time in nanoseconds and SHA-256.
State = dict[str, list[Any]]


class Recorder:
    """Keeps states of the folder ``root`` in the folder ``store``: each a line of JSON, and files by their hashes."""

    def __init__(self, root: Path, store: Path) -> None:
        self._root, self._store = root, store
        self._known: dict[tuple[int, ...], str] = {}  # hashes of files that did not change since
        store.mkdir(exist_ok=True)

    def keep(self, event: int) -> None:
        """Keep the state that there is now, in which a kill at ``event`` leaves the folder."""
        with open(self._store / "states.jsonl", "a") as lines:
            lines.write(json.dumps([event, self.state()]) + "\n")

    def state(self) -> State:
        state: State = {}
        for folder, below, names in os.walk(self._root):
            for name in (*below, *names):
                path = os.path.join(folder, name)
                state[os.path.relpath(path, self._root)] = self._entry(path, os.lstat(path))
        return state

    def _entry(self, path: str, status: os.stat_result) -> list[Any]:
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            return ["folder", mode, ""]
        if stat.S_ISLNK(status.st_mode):
            return ["link", mode, os.readlink(path)]
        return ["file", mode, status.st_ino, status.st_mtime_ns, self._hashed(path, status)]

    def _hashed(self, path: str, status: os.stat_result) -> str:
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if stamp in self._known:
            return self._known[stamp]
        data = Path(path).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if not (self._store / digest).exists():
            (self._store / digest).write_bytes(data)
        if time.time() - status.st_ctime > RACY:
            self._known[stamp] = digest
        return digest


def read_states(store: Path) -> Iterator[tuple[int, State]]:
    """Event and state, in the order in which they were kept."""
    with open(store / "states.jsonl") as lines:
        yield from map(json.loads, lines)


def restore(state: State, store: Path, root: Path) -> None:
    """Make the folder ``root`` what it was; names of one file are again names of one file."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    first: dict[int, Path] = {}
    for name, (kind, mode, *rest) in state.items():  # a folder comes before what is in it
        path = root / name
        if kind == "folder":
            path.mkdir(mode)
        elif kind == "link":
            path.symlink_to(rest[0])
        elif rest[0] in first:
            os.link(first[rest[0]], path)
        else:
            first[rest[0]] = path
            path.write_bytes((store / rest[2]).read_bytes())
            path.chmod(mode)
            os.utime(path, ns=(rest[1], rest[1]))


def names_in(state: State) -> list[tuple[str, str]]:
    """Every name that tells states apart, and its kind."""
    return sorted((_without_writer(name), kind) for name, (kind, *_) in state.items() if sum(_half_written(name)) < 2)


def key_of(state: State) -> str:
    """The same for two states that are the same."""
    told = sorted(
        (_without_writer(name), "" if any(_half_written(name)) else entry[-1])
        for name, entry in state.items()
        if sum(_half_written(name)) < 2
    )
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def writers(name: str) -> set[str]:
    """The ids of the processes that were writing the file of this name; none where it was finished."""
    return {match["pid"] for part in name.split("/") if (match := NAME.fullmatch(part))}


def _half_written(name: str) -> list[bool]:
    return [NAME.fullmatch(part) is not None for part in name.split("/")]


def _without_writer(name: str) -> str:
    parts = name.split("/")
    for place, part in enumerate(parts):
        if match := NAME.fullmatch(part):
            parts[place] = part[: match.start("pid")] + part[match.end("start") :].lstrip("-0123456789")
    return "/".join(parts)
