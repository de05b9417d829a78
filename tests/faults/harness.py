"""One command on fresh folders: what it makes when nothing happens, and what after something did."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from tests.faults.catalogue import Kind

KILLED = -9
FULL = ("cannot write", "cannot create", "too large for the disk", "disk space", "no space left")


@dataclass
class Harness:
    """``expected``: hashes of what it makes; ``events``, ``written``: its changes to files and bytes of them;
    ``warnings``: lines that it says anyway."""

    server: Any
    kind: Kind
    work: Path
    base: Path
    place: Path
    expected: dict[str, str] = field(default_factory=dict)
    events: int = 0
    written: int = 0
    warnings: int = 0

    def once(self, **how):
        return self.server.run(self.kind.arguments(self.work, self.base, self.place), self.place, **how)

    def fresh(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.kind.prepare(self.work, self.place)

    def made(self) -> dict[str, str]:
        return {name: files.sha256_file(self.place / name) for name in self.kind.written}

    def learn(self) -> None:
        """Run it whole, twice: it must make the same bytes, or no kill could be told from chance."""
        for _ in range(2):
            self.fresh()
            ended = self.once()
            assert ended.code == 0, ended.stderr
            assert not self.expected or self.expected == self.made()
            self.expected, self.events, self.written = self.made(), ended.events, ended.written
            self.warnings = len(ended.stderr.strip().splitlines())
        assert not self.left_over()

    def left_over(self) -> list[str]:
        return [str(path.relative_to(self.place)) for path in self.place.rglob(".*")]

    def kill(self, event: int) -> str:
        """How it went on after a kill before the change ``event``: an outcome of ``tally``, and what was wrong."""
        self.fresh()
        killed = self.once(kill_at=event)
        if killed.code != KILLED:
            return f"wrong: event {event}: not killed but {killed.code}: {killed.stderr[-300:]}"
        return self.again(f"event {event}")

    def fill(self, room: int) -> str:
        """How it went on after the disk was full after ``room`` bytes, and there was room again."""
        self.fresh()
        full = self.once(room=room)
        lines = full.stderr.strip().splitlines()
        if full.code != 2 or not any(said in lines[-1] for said in FULL):
            return f"wrong: {room} bytes: exit {full.code}: {full.stderr[-400:]}"
        if len(lines) > 1 + self.warnings:
            return f"wrong: {room} bytes: {len(lines)} lines: {full.stderr[-400:]}"
        again = self.again(f"{room} bytes")
        return f"wrong: {room} bytes: a full disk left what passes for finished" if again == "finished" else again

    def again(self, after: str) -> str:
        """Run it again: the same bytes as undisturbed, or the one line that they are there; nothing is left over."""
        again = self.once()
        lines = again.stderr.strip().splitlines()
        if again.code not in (0, 2) or (again.code == 2 and len(lines) > 1 + self.warnings):
            return f"wrong: {after}: then exit {again.code}: {again.stderr[-300:]}"
        missing = [name for name in self.kind.written if not (self.place / name).is_file()]
        if missing:
            return f"lost: {after}: then exit {again.code} without {missing}: {again.stderr[-300:]}"
        if self.made() != self.expected:
            return f"wrong: {after}: then exit {again.code}, other bytes: {again.stderr[-300:]}"
        if self.left_over():
            return f"left over: {after}: {self.left_over()}"
        return "again" if again.code == 0 else "finished"
