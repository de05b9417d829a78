"""The journal of an evaluation: finished items and their latencies.

What a batch left unfinished is drawn anew, in the same batches, and so to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import resume
from mlx_rsgwm.evaluation.records import ItemRecord

FILE = "journal.jsonl"

Timing = tuple[float, float, float | None]  # first draft ms, whole loop ms, joules


class EvaluationJournal:
    """Records and latencies by (run, item id), over a :class:`mlx_rsgwm.core.resume.Journal`.

    A run is one drafter with one sampling seed; in the file its key is ``part``. ``about`` names what the items depend
    on; ``replace`` and ``shard`` are those of the journal beneath.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], replace: bool = False, shard: int = 0) -> None:
        self.items: dict[tuple[str, str], ItemRecord] = {}
        self.timings: dict[tuple[str, str], Timing] = {}
        self._rows = resume.Journal(path, about, self._take, replace, shard)
        self.path = self._rows.path

    def read_others(self) -> None:
        """Take over what the other shards hold by now."""
        self._rows.read_others()

    def add_items(self, run: str, records: Iterable[ItemRecord]) -> None:
        """Keep finished items; they are on disk when this returns."""
        finished = list(records)
        self._rows.append({"part": run, "item": record.to_dict()} for record in finished)
        self.items.update({(run, record.id): record for record in finished})

    def add_timing(self, run: str, item: str, timing: Timing) -> None:
        """Keep one item's latency."""
        self._rows.append([{"part": run, "id": item, "timing": timing}])
        self.timings[run, item] = timing

    def _take(self, row: Any, where: str) -> None:
        if "item" in row:
            record = ItemRecord.from_dict(row["item"], where)
            self.items[row["part"], record.id] = record
        else:
            first, total, energy = row["timing"]
            self.timings[row["part"], row["id"]] = (first, total, energy)
