"""Energy a piece of work took, where the platform tells without privileges.

Linux shows it under ``/sys/class/powercap`` (Intel and AMD, RAPL) where that may be read. macOS tells only root, by
``powermetrics``; there and elsewhere energy is None.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
    found = []
    for folder in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
        if folder.name.count(":") != 1:
            continue  # cores and memory of a package, which its own counter already holds
        with suppress(OSError, ValueError):
            counter = Counter(folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
            counter.read()
            found.append(counter)
    return found


def joules(known: list[Counter], before: list[int]) -> float | None:
    """Joules since ``before`` (a reading of each counter), one wrap of a counter allowed for; None without counters."""
    if not known:
        return None
    total = 0
    for counter, start in zip(known, before, strict=True):
        now = counter.read()
        total += now - start if now >= start else now + counter.limit - start
    return total / 1e6
