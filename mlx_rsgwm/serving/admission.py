"""Who comes in next: models take turns, the first of each before its others, while rows and memory last."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from mlx_rsgwm.core.machine import free_memory
from mlx_rsgwm.serving.jobs import Job
from mlx_rsgwm.serving.library import ServedModel
from mlx_rsgwm.serving.rows import Row

USUAL_BYTES = 4 << 30  # where the system does not say what is free


@dataclass(frozen=True)
class Limits:
    """What the engine takes on: rows that are written at a time, requests that wait, bytes of key–value caches
    (None: half of the memory that is free once the base is there)."""

    rows: int = 32
    queue: int = 64
    cache_bytes: int | None = None

    def memory(self) -> int:
        """Bytes of all caches, of rows under way and of texts that stay known."""
        return self.cache_bytes or (free_memory() or USUAL_BYTES) // 2


class Waiting:
    """Rows that are to be written and have not come in; those of one request come in together.

    ``most``: bytes that the caches of all rows under way may take.
    """

    def __init__(self, limits: Limits, bytes_a_token: int, most: int) -> None:
        self._limits, self._bytes = limits, bytes_a_token
        self._most = most
        self._lines: dict[ServedModel, deque[tuple[Job, list[Row]]]] = {}

    def __bool__(self) -> bool:
        return any(self._lines.values())

    def add(self, job: Job, rows: list[Row], first: bool = False) -> None:
        """Let rows of a request wait behind others of its model; before them where the request has come in already."""
        line = self._lines.setdefault(job.model, deque())
        if first:
            line.appendleft((job, rows))
        else:
            line.append((job, rows))

    def leave(self, job: Job) -> None:
        """Nothing of a request is wanted any more."""
        line = self._lines.get(job.model, deque())
        self._lines[job.model] = deque(entry for entry in line if entry[0] is not job)

    def next(self, under_way: Collection[Row]) -> list[tuple[Job, list[Row]]]:
        """The requests that come in now beside the rows ``under_way``; one at least where there are none."""
        count, taken = len(under_way), self._bytes * sum(row.longest for row in under_way)
        entering: list[tuple[Job, list[Row]]] = []
        while line := next((line for line in self._lines.values() if line), None):
            job, rows = line[0]
            more = self._bytes * sum(row.longest for row in rows)
            fits = count + len(rows) <= self._limits.rows and taken + more <= self._most
            if not fits and (entering or under_way):
                break
            entering.append(line.popleft())
            count, taken = count + len(rows), taken + more
            self._lines[job.model] = self._lines.pop(job.model)  # its model's next turn is after all others'
        self._lines = {model: line for model, line in self._lines.items() if line}
        return entering
