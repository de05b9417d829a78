"""The diary of a run that may be cut off: finished items as JSON lines, so that a second start goes on from there.

The first line holds the hash of everything the items depend on and its readable parts. A line that a crash left half
written is dropped; what a batch left unfinished is drawn anew, in the same batches, and so to the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.evaluation.records import ItemRecord

FILE = "journal.jsonl"

Timing = tuple[float, float, float | None]  # first draft ms, whole loop ms, joules


class Journal:
    """Records by (part, item id) and latencies by (part, item id), in one append-only file.

    A part is one drafter with one sampling seed. ``about`` names what the items depend on; a journal of something else
    is refused, or with ``replace`` started anew. One of several processes writes a ``shard`` of its own beside
    ``path``; whoever opens the journal reads all of them.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], replace: bool = False, shard: int = 0) -> None:
        self.path = path.with_name(f"{path.stem}.{shard}{path.suffix}") if shard else path
        self._shards = f"{path.stem}.*{path.suffix}"
        self._whole = path
        self.items: dict[tuple[str, str], ItemRecord] = {}
        self.timings: dict[tuple[str, str], Timing] = {}
        self._about = json.loads(json.dumps(about, default=str))
        whole = self._read(self.path, replace) if self.path.is_file() else 0
        make_folder(path.parent)
        try:
            if whole:
                os.truncate(self.path, whole)
            else:
                files.write_text(self.path, json.dumps({"about": self._about}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RsgwmError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.read_others(replace)

    def read_others(self, replace: bool = False) -> None:
        """Take over what the other shards hold by now."""
        for path in sorted({*self.path.parent.glob(self._shards), self._whole} - {self.path}):
            if path.is_file():
                self._read(path, replace)

    def _read(self, path: Path, replace: bool) -> int:
        """Take over what is there; returns how many bytes of the file are whole lines, 0 to start anew."""
        about = self._about
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].decode("utf-8", errors="replace").split("\n")[:-1]
        try:
            found = files.parse_json(lines[0])["about"] if lines else None
        except (ValueError, KeyError, TypeError):
            found = None
        if found != about:
            if not isinstance(found, dict) or replace:
                return 0
            differ = [name for name in {**found, **about} if found.get(name) != about.get(name)]
            raise RsgwmError(
                f"{path} belongs to an unfinished run that differs in {', '.join(sorted(differ))}; "
                "give another --out, or delete the file to start anew"
            )
        for number, line in enumerate(lines[1:], 2):
            where = f"{path} line {number}"
            try:
                value = files.parse_json(line)
                if "item" in value:
                    record = ItemRecord.from_dict(value["item"], where)
                    self.items[value["part"], record.id] = record
                else:
                    first, total, energy = value["timing"]
                    self.timings[value["part"], value["id"]] = (first, total, energy)
            except (KeyError, TypeError, ValueError):
                raise RsgwmError(f"{where} is damaged; delete the file to start anew") from None
        return whole

    def add_items(self, part: str, records: Iterable[ItemRecord]) -> None:
        """Keep finished items; they are on disk when this returns."""
        found = list(records)
        self._append({"part": part, "item": record.to_dict()} for record in found)
        self.items.update({(part, record.id): record for record in found})

    def add_timing(self, part: str, item: str, timing: Timing) -> None:
        """Keep one item's latency."""
        self._append([{"part": part, "id": item, "timing": timing}])
        self.timings[part, item] = timing

    def _append(self, values: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RsgwmError(f"cannot write {self.path}: {error.strerror or error}") from error
