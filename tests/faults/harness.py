"""One command on fresh folders: what it makes when nothing happens, and what after something did."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.temporary import boot
from tests.faults.catalogue import Kind
from tests.faults.states import Recorder, State, key_of, read_states, restore, writers
from tests.faults.tally import RIGHT

KILLED = -9
DIGITS = 64  # bytes by which a run is shorter than another, seconds in manifests having fewer digits
FULL = ("cannot write", "cannot create", "too large for the disk", "disk space", "no space left")


@dataclass
class Harness:
    """``expected``: hashes of what it makes; ``events``, ``written``: its changes to files and bytes of them;
    ``warnings``: lines that it says anyway. ``store``: where states of ``place`` are kept. ``keys``: of every event,
    those of the states in which a kill at it leaves the folder; ``states``: by key, each of them once. ``outcomes``: by
    key, how it went on from a state."""

    server: Any
    kind: Kind
    work: Path
    base: Path
    place: Path
    store: Path
    expected: dict[str, str] = field(default_factory=dict)
    events: int = 0
    written: int = 0
    warnings: int = 0
    keys: dict[int, list[str]] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    def once(self, **how):
        return self.server.run(self.kind.arguments(self.work, self.base, self.place), self.place, **how)

    def fresh(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.kind.prepare(self.work, self.place)

    def made(self) -> dict[str, str]:
        return {name: files.sha256_file(self.place / name) for name in self.kind.written}

    def learn(self, states: bool = False) -> None:
        """Run it whole, twice: it must make the same bytes, or no kill could be told from chance. With ``states`` the
        first run is held at every event, and what a kill would leave there is kept."""
        for recording in (states, False):
            self.fresh()
            ended = self.once(states=self.store / "events" if recording else None)
            assert ended.code == 0, ended.stderr
            assert not self.expected or self.expected == self.made()
            self.expected, self.events, self.written = self.made(), ended.events, ended.written
            self.warnings = len(ended.stderr.strip().splitlines())
        assert not self.left_over()
        for event, state in read_states(self.store / "events") if states else ():
            self.states.setdefault(key := key_of(state), state)
            self.keys.setdefault(event, []).append(key)

    def left_over(self) -> list[str]:
        return [str(path.relative_to(self.place)) for path in self.place.rglob(".*")]

    def now(self) -> State:
        """The state of its folder now."""
        return Recorder(self.place, self.store / "now").state()

    def kill(self, event: int) -> str:
        """How it went on after a kill before the change ``event``: an outcome of ``tally``, and what was wrong."""
        self.fresh()
        killed = self.once(kill_at=event)
        if killed.code != KILLED:
            return f"wrong: event {event}: not killed but {killed.code}: {killed.stderr[-300:]}"
        return self.again(f"event {event}")

    def from_states_of(self, event: int) -> str:
        """How it goes on from what a kill at ``event`` leaves: before the change and, of a write, in its middle."""
        told = []
        for key in self.keys[event]:
            if key not in self.outcomes:
                restore(self.states[key], self.store / "events", self.place)
                self.again(f"event {event}")
            told.append(self.outcomes[key])
        return next((outcome for outcome in told if outcome not in RIGHT), told[-1])

    def fill(self, room: int) -> str:
        """How it went on after the disk was full after ``room`` bytes, and there was room again."""
        self.fresh()
        full = self.once(room=room)
        lines = full.stderr.strip().splitlines()
        if full.code == 0 and room >= self.written - DIGITS and self.made() == self.expected:
            return "again"  # it was room enough this time
        if full.code != 2 or not any(said in lines[-1] for said in FULL):
            return f"wrong: {room} bytes: exit {full.code}: {full.stderr[-400:]}"
        if len(lines) > 1 + self.warnings:
            return f"wrong: {room} bytes: {len(lines)} lines: {full.stderr[-400:]}"
        again = self.again(f"{room} bytes")
        return f"wrong: {room} bytes: a full disk left what passes for finished" if again == "finished" else again

    def again(self, after: str) -> str:
        """Run it again, unless it was from the same state: the same bytes as undisturbed, or the one line that they are
        there; nothing is left over, and nothing half written is read."""
        state = self.now()
        key = key_of(state)
        if key not in self.outcomes:
            self.outcomes[key] = self._again(after, {pid for name in state for pid in writers(name)})
        return self.outcomes[key]

    def _again(self, after: str, dead: set[str]) -> str:
        assert len(dead) <= 1, "two processes were writing"
        again = self.once(dead="".join(f".{pid}-{boot()}" for pid in dead))
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
        if again.peeks:
            return f"wrong: {after}: what was half written is read"
        return "again" if again.code == 0 else "finished"
