"""The adapters to be probed: all at one fraction of training, all changing something, every two with common modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.merging.pool import PoolAdapter
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter, load_adapters
from mlx_rsgwm.training.snapshots import KIND, snapshot_folders, snapshot_shares

FINISHED = 1.0


def probed_adapters(
    sources: Sequence[AdapterSource],
    at: float | None = None,
    base: str | Path | None = None,
    progress: Progress = SILENT,
) -> tuple[list[Adapter], float]:
    """The adapters, left on disk, and the share of training that they are at.

    Args:
        sources: two or more, finished adapters or snapshots, as for :func:`load_adapters`.
        at: take the snapshots that training kept at this share of its steps instead of the finished adapters.
        base: as for :func:`load_adapters`.
        progress: as for :func:`load_adapters`.

    Raises:
        RsgwmError: fewer than two, one without a snapshot of ``at``, several fractions of training, one that changes
            nothing.
    """
    adapters = load_adapters(sources, base, lazy=True, progress=progress)
    if len(adapters) < 2:
        raise RsgwmError(f"a pair is two adapters, found {len(adapters)}")
    if at is not None and at < FINISHED:
        adapters = _snapshots(adapters, at)
    common = set.intersection(*(_shares(adapter) for adapter in adapters))
    if not common:
        told = ", ".join(f"{adapter.where} at {max(_shares(adapter)):.3g}" for adapter in adapters[:4])
        raise RsgwmError(f"adapters at different fractions of training cannot be compared: {told}")
    return _moved(adapters), at if at is not None and at in common else max(common)


def young_adapters(folders: Sequence[Path], at: float) -> list[Adapter]:
    """The snapshots at a share of training of runs in ``folders``, finished or not, called as the folders are.

    Raises:
        RsgwmError: one without such a snapshot, or that changes nothing.
    """
    return _moved(_taken([(folder, folder.name, folder.name) for folder in folders], at))


def task_of(adapter: Adapter) -> str:
    """What it was trained on, as its manifest has it, else its name."""
    return Path(str(adapter.manifest.get("task") or adapter.name or adapter.where)).stem


def require_common_modules(sources: Sequence[PoolAdapter]) -> None:
    """Raise with every pair that shares no module."""
    raise_problems(
        "the pool cannot be measured",
        [
            f"{first.label} and {second.label} have no module in common"
            for first, second in combinations(sources, 2)
            if not first.shapes.keys() & second.shapes.keys()
        ],
    )


def _shares(adapter: Adapter) -> set[float]:
    return set(snapshot_shares(adapter.manifest)) if adapter.manifest.get("kind") == KIND else {FINISHED}


def _snapshots(adapters: Sequence[Adapter], at: float) -> list[Adapter]:
    # Called as the finished ones, so that a table of young adapters and outcomes of finished ones agree.
    return _taken([(adapter.path, adapter.where, task_of(adapter)) for adapter in adapters], at)


def _taken(runs: Sequence[tuple[Path | None, str, str]], at: float) -> list[Adapter]:
    """The snapshots at ``at`` of runs, each by its folder, what it is called, and its task."""
    taken, problems = [], []
    for path, label, task in runs:
        folders = snapshot_folders(path) if path else {}
        if at in folders:
            snapshot = load_adapter(folders[at], lazy=True)
            snapshot.manifest.setdefault("task", task)
            snapshot.label = label
            taken.append(snapshot)
        else:
            there = ", ".join(f"{share:g}" for share in sorted(folders)) or "none"
            problems.append(f"{label} has no snapshot at {at:g} (there are: {there})")
    raise_problems("snapshots are kept by training (--snapshots)", problems)
    return taken


def _moved(adapters: list[Adapter]) -> list[Adapter]:
    unmoved = [adapter.where for adapter in adapters if adapter.changes_nothing()]
    raise_problems("no optimiser step was taken, every update is zero", unmoved)
    return adapters
