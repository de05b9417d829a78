"""What answering costs: the time of single questions, and the energy, where the platform tells without privileges.

Linux shows energy under ``/sys/class/powercap`` (Intel and AMD, RAPL) where that may be read. macOS tells only root, by
``powermetrics``; there and elsewhere energy is None.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.evaluation.journal import EvaluationJournal, Timing
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.inference.loop import DraftVerify

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One package's energy counter: it counts microjoules and starts again at ``limit``."""

    path: Path
    limit: int

    def read(self) -> int:
        """Microjoules so far."""
        return int(self.path.read_text())


def counters(root: Path = POWERCAP) -> list[Counter]:
    """The readable counters of whole processor packages; empty where the platform does not tell."""
    readable = []
    for folder in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
        if folder.name.count(":") != 1:
            continue  # cores and memory of a package, which its own counter already holds
        with suppress(OSError, ValueError):
            counter = Counter(folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
            counter.read()
            readable.append(counter)
    return readable


def joules(known: list[Counter], before: list[int]) -> float | None:
    """Joules since ``before`` (a reading of each counter), one wrap of a counter allowed for; None without counters."""
    if not known:
        return None
    total = 0
    for counter, start in zip(known, before, strict=True):
        now = counter.read()
        total += now - start if now >= start else now + counter.limit - start
    return total / 1e6


def with_latency(
    pipeline: DraftVerify,
    records: Sequence[ItemRecord],
    timed: int,
    progress: Progress,
    journal: EvaluationJournal | None,
    run: str,
) -> list[ItemRecord]:
    """The records, ``timed`` of them (spread evenly over the list) with latency and energy.

    What the ``journal`` holds for ``run`` is not measured again; what is measured goes into it.
    """
    rows = list(records)
    indices = sorted({round(step * len(records) / timed) for step in range(timed)} - {len(records)})
    # Side by side, the first draft waits for the others; alone it is what a user of the drafter would wait for.
    alone = pipeline.with_config(replace(pipeline.config, attempts=1, mode="sequential"))
    known = journal.timings if journal else {}
    if any((run, records[index].id) not in known for index in indices):
        # The first pass through a shape compiles and allocates; nobody should pay for that in the figures.
        pipeline.answer(records[indices[0]].question)
    with progress.task("time, one question at a time", len(indices)) as advance:
        for index in indices:
            record = records[index]
            timing = known.get((run, record.id))
            if timing is None:
                timing = _time(pipeline, alone, record.question)
                if journal:
                    journal.add_timing(run, record.id, timing)
            first, total, energy = timing
            drafts = (replace(record.drafts[0], latency_ms=first), *record.drafts[1:])
            rows[index] = replace(record, drafts=drafts, latency_ms=total, energy_j=energy)
            advance(1, f"{total / 1000:.2f} s")
    return rows


def _time(pipeline: DraftVerify, alone: DraftVerify, question: str) -> Timing:
    started = time.perf_counter()
    next(alone.steps(question))
    first = time.perf_counter() - started
    known = counters()
    before = [counter.read() for counter in known]
    started = time.perf_counter()
    pipeline.answer(question)
    total = time.perf_counter() - started
    return first * 1000, total * 1000, joules(known, before)
