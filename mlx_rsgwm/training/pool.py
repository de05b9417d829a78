"""A pool: several adapters of one base with one initialisation of A, trained one after the other or side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.folders import exclusive
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.resume import differing
from mlx_rsgwm.models.adapter import MANIFEST_FILE, Adapter, is_complete
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.base_folder import base_difference
from mlx_rsgwm.training.checkpoints import Paused, Saving, drop_state, require_free, require_pool_place
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import TrainingData, finish, train
from mlx_rsgwm.training.memory import MemoryOptions
from mlx_rsgwm.training.warm_start import WarmStart


@dataclass(frozen=True)
class Member:
    """One adapter of a pool: its folder's name, what it is trained on and scored on."""

    name: str
    data: TrainingData
    held_out: TrainingData | None = None


def train_pool(
    base: Base,
    members: Sequence[Member],
    config: TrainConfig,
    saving: Saving,
    memory: MemoryOptions | None = None,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
    warm_start: WarmStart | None = None,
    beneath: Adapter | None = None,
) -> list[str]:
    """Train every member that is not finished, into ``saving.folder``/name; returns the names trained here.

    All share ``config`` and with it the seed of lora_a, and ``warm_start`` or ``beneath``, as training takes them.
    ``saving.resume`` holds for each; with ``saving.pause`` none is finished but what was before. With several
    ``processes`` each takes every size-th member as a whole.

    Raises:
        RsgwmError: two members of one name, a finished member that was trained otherwise, whatever training raises.
    """
    require_pool_place(saving.folder)
    names = [member.name.casefold() for member in members]  # one folder on many disks
    double = sorted({name for name in names if names.count(name) > 1})
    raise_problems("pool", [f"two members are named {name}" for name in double])
    for member in members:
        started = {"warm_start": warm_start.describe() if warm_start else None}
        check_finished(saving.folder / member.name, base, member, config, started)
    trained = []
    for member in members[processes.rank :: processes.size]:
        folder = saving.folder / member.name
        with exclusive(folder):
            if is_complete(folder):
                drop_state(folder)
                progress.message(f"{member.name}: finished before")
                continue
            require_free(folder, trains=True)
            member_saving = replace(saving, folder=folder)
            try:
                adapter = train(
                    base,
                    member.data,
                    config,
                    member.held_out,
                    f"train {member.name}",
                    progress,
                    member_saving,
                    memory=memory,
                    warm_start=warm_start,
                    beneath=beneath,
                )
            except Paused:
                continue
            adapter.manifest["task"] = member.name
            finish(adapter, member_saving)
            trained.append(member.name)
    return trained


def pool_summary(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per member, from the manifests."""
    rows = []
    for name in names:
        manifest = files.read_json_object(folder / name / MANIFEST_FILE)
        history = manifest["history"]
        scored = manifest["held_out_loss"]["after"]
        rows.append(
            {
                "name": name,
                "rows": manifest["data"]["rows"],
                "steps": len(history),
                "first_loss": _mean_loss(history[: max(1, len(history) // 10)]),
                "last_loss": _mean_loss(history[-max(1, len(history) // 10) :]),
                "held_out_loss": scored or None,
                "trained_tokens": manifest["tokens"]["trained"],
                "seconds": manifest["seconds"],
            }
        )
    return rows


def render_pool(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table a person reads: losses are means over the first and the last tenth of the steps."""
    width = max(len("adapter"), *(len(row["name"]) for row in rows))
    lines = [f"{'adapter':{width}}  rows  steps  loss: first   last  held out  tokens/s"]
    for row in rows:
        held = row["held_out_loss"]
        shown = f"{sum(held.values()) / len(held):8.3f}" if held else "       –"
        rate = row["trained_tokens"] / max(row["seconds"], 1e-9)
        lines.append(
            f"{row['name']:{width}}  {row['rows']:4d}  {row['steps']:5d}  {row['first_loss']:11.3f}  "
            f"{row['last_loss']:5.3f}  {shown}  {rate:8.0f}"
        )
    return "\n".join(lines)


def _mean_loss(history: Sequence[Sequence[Any]]) -> float:
    tokens = sum(line[3] for line in history)
    return float(sum(line[2] * line[3] for line in history) / tokens)


def check_finished(
    folder: Path, base: Base, member: Member, config: TrainConfig, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Refuse to take a finished adapter for one of this pool when it is not; ``more`` of its manifest must hold, too.

    Raises:
        RsgwmError: it was trained with another base, data or settings, by name.
    """
    if not is_complete(folder):
        return
    manifest = files.read_json_object(folder / MANIFEST_FILE)
    before = {
        "config": manifest.get("config"),
        "data": (manifest.get("data") or {}).get("hash"),
        **{name: manifest.get(name) for name in more},
    }
    now = {"config": config.describe(), "data": member.data.hash, **more}
    differences = differing(before, now)
    chat = (manifest.get("template") or {}).get("chat") is not False
    other_base = base_difference((manifest.get("base") or {}).get("fingerprint") or "", base.fingerprint, chat)
    if other_base:
        differences = [f"base: another {other_base}", *differences]
    if differences:
        raise RsgwmError(
            f"{folder} holds an adapter of another pool ({'; '.join(differences[:4])}); "
            "remove it or choose another folder"
        )
