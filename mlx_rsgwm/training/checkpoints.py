"""Checkpoints: a run's whole state on disk, so that it can go on as if nothing had happened.

``checkpoints/step-NNNNNN/`` inside the adapter folder is itself an adapter folder (weights, importance, config and a
manifest with the losses at that step). The newest two also hold ``state.safetensors``: optimiser moments, importance
moments and what else a continued run needs. A checkpoint is written under a temporary name, its manifest last, and
renamed; a run that is killed at any moment loses what came after the newest one.

MLX's global random stream can be read but not set (mlx 0.32.4). So the run seeds it before every step by number
(:func:`~mlx_rsgwm.core.random_streams.step_seed`): its state needs no storing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.folders import exclusive, new_folder
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.core.resume import differing, read_stamp
from mlx_rsgwm.core.safetensors_io import read_safetensors, require_space_for, write_safetensors
from mlx_rsgwm.models.adapter import (
    CONFIG_FILE,
    FORMAT,
    IMPORTANCE_FILE,
    MANIFEST_FILE,
    UNFINISHED_FILE,
    WEIGHTS_FILE,
    LoraSpec,
    is_complete,
    seal,
)
from mlx_rsgwm.models.file_readers import PEFT_WEIGHTS_FILE
from mlx_rsgwm.training.snapshots import FOLDER as SNAPSHOTS

FOLDER = "checkpoints"
STATE_FILE = "state.safetensors"
WITH_STATE = 2
RESUME = ("refuse", "continue", "replace")
OF_THE_RUN = ("step", "run", "record")  # what a checkpoint's manifest alone knows; it has a hash of its own


class Paused(Exception):
    """A run ended where it was to pause; all of it is saved."""


@dataclass(frozen=True)
class Saving:
    """Where and how often a run keeps its state.

    ``folder`` is the adapter folder; ``every`` counts steps, 0 saves only when interrupted and at the end; ``keep``
    checkpoints stay. ``resume`` says what to do with the checkpoints of an unfinished run: ``refuse`` to start,
    ``continue`` it (and refuse if it was another run's), or continue it and ``replace`` another run's. ``snapshots``
    are the shares of the run after which update and gradient are kept; a run saves itself and ends at that of ``pause``
    with :class:`Paused`, and goes on when it is continued without one.
    """

    folder: Path
    every: int = 100
    keep: int = 3
    resume: str = "refuse"
    snapshots: tuple[float, ...] = (0.01, 0.02, 0.05)
    pause: float | None = None

    def __post_init__(self) -> None:
        checks = {
            "every": self.every >= 0,
            "keep": self.keep >= 1,
            "resume": self.resume in RESUME,
            "snapshots": all(0 < share <= 1 for share in self.snapshots),
            "pause": self.pause is None or self.pause in self.snapshots,
        }
        raise_problems(
            "saving", [f"{name} = {getattr(self, name)!r} is out of range" for name, ok in checks.items() if not ok]
        )


@dataclass
class Checkpoint:
    """A run at the end of ``step``. ``arrays`` are the state's, ``record`` what JSON holds of it.

    ``importance`` is only written, for whoever averages or merges checkpoints: the state has the raw moments.
    """

    step: int
    weights: dict[str, mx.array]
    arrays: dict[str, mx.array]
    record: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, mx.array] = field(default_factory=dict)
    importance_metadata: dict[str, str] = field(default_factory=dict)


def write_checkpoint(
    folder: Path, spec: LoraSpec, checkpoint: Checkpoint, run: Mapping[str, Any], about: Mapping[str, Any], keep: int
) -> Path:
    """Write ``checkpoint`` below the adapter folder ``folder``, then prune older ones to ``keep``.

    ``run`` identifies the run (see :func:`read_checkpoint`); ``about`` is what the manifest says of the adapter.

    Raises:
        RsgwmError: weights that are not finite (nothing is written, older checkpoints stay), no room on the disk.
    """
    finite = mx.all(mx.stack([mx.all(mx.isfinite(value)) for value in checkpoint.weights.values()]))
    if not finite.item():
        raise RsgwmError(
            f"weights are no longer finite after step {checkpoint.step}; older checkpoints are kept "
            f"in {folder / FOLDER}; lower the learning rate"
        )
    require_space_for(folder, checkpoint.weights, checkpoint.arrays, checkpoint.importance)
    final = folder / FOLDER / f"step-{checkpoint.step:06d}"
    shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run had to step back behind
    with new_folder(final) as work:
        files.write_json(work / CONFIG_FILE, spec.to_config())
        write_safetensors(work / WEIGHTS_FILE, checkpoint.weights)
        write_safetensors(work / STATE_FILE, checkpoint.arrays)
        written = [CONFIG_FILE, WEIGHTS_FILE]
        if checkpoint.importance:
            write_safetensors(work / IMPORTANCE_FILE, checkpoint.importance, checkpoint.importance_metadata)
            written.append(IMPORTANCE_FILE)
        of_the_run = dict(zip(OF_THE_RUN, (checkpoint.step, dict(run), checkpoint.record), strict=True))
        manifest = {
            **about,
            "kind": "checkpoint",
            **of_the_run,
            "told_sha256": files.sha256_json(of_the_run),
            "state": {STATE_FILE: files.sha256_file(work / STATE_FILE)},
        }
        seal(work, manifest, written)
    prune(folder, keep, WITH_STATE)
    return final


def checkpoint_folders(folder: Path) -> list[Path]:
    """The whole checkpoints of an adapter folder, newest first."""
    folders = [path for path in (folder / FOLDER).glob("step-*") if (path / MANIFEST_FILE).is_file()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def prune(folder: Path, keep: int, with_state: int) -> None:
    """Keep the newest ``keep`` checkpoints, the state of the newest ``with_state``; clear unfinished ones away."""
    for position, path in enumerate(checkpoint_folders(folder)):
        if position >= keep and position >= with_state:
            # The manifest first: without it the rest is no checkpoint, whenever this is cut short.
            (path / MANIFEST_FILE).unlink()
            shutil.rmtree(path, ignore_errors=True)
        elif position >= with_state:
            (path / STATE_FILE).unlink(missing_ok=True)
    for path in (folder / FOLDER).glob("*step-*"):
        if path.is_dir() and not (path / MANIFEST_FILE).is_file():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def claim_adapter_folder(folder: Path, trains: bool = False) -> Iterator[None]:
    """Hold ``folder`` for an adapter that the body makes, so that of two commands one makes it and the other says so.

    Of a finished adapter in it what only an unfinished run needs is removed, before it is refused.

    Raises:
        RsgwmError: whatever :func:`require_free` refuses, or another process is writing it.
    """
    with exclusive(folder):
        require_free(folder, trains)
        yield


def require_free(folder: Path, trains: bool) -> None:
    """Refuse a folder that an adapter written there would spoil, or be spoiled by.

    Raises:
        RsgwmError: it holds a finished adapter, or one that was not made here; a model, a corpus, a pool; an unfinished
            run, whose checkpoints would be taken for the new adapter's, unless the body ``trains``.
    """
    advice = "choose another folder or remove it"
    if is_complete(folder):
        manifest = read_stamp(folder / MANIFEST_FILE) or {}
        if manifest.get("format", FORMAT) != FORMAT:
            raise RsgwmError(f"{folder} holds something else than an adapter ({manifest['format']}); {advice}")
        drop_state(folder)
        raise RsgwmError(f"{folder} already holds a finished adapter; {advice}")
    others = [name for name in (WEIGHTS_FILE, CONFIG_FILE, PEFT_WEIGHTS_FILE) if files.is_present(folder / name)]
    if others and not (folder / UNFINISHED_FILE).is_file() and not checkpoint_folders(folder):
        raise RsgwmError(f"{folder} holds {others[0]} of another program; {advice}")
    if files.is_present(folder / "config.json") or any(folder.glob("model*.safetensors")):
        raise RsgwmError(f"{folder} holds a base model; choose another folder")
    signs = (WEIGHTS_FILE, PEFT_WEIGHTS_FILE, f"{FOLDER}/step-*")
    if inside := sorted(path.relative_to(folder).parts[0] for sign in signs for path in folder.glob(f"[!.]*/{sign}")):
        raise RsgwmError(f"{folder} is a folder of adapters ({inside[0]} is there); choose a name in it, or another")
    runs = [path for name in (FOLDER, SNAPSHOTS) for path in (folder / name).glob("step-*")]
    if runs and not trains:
        raise RsgwmError(
            f"{folder} holds an unfinished training ({runs[0].relative_to(folder)}); finish it (rsgwm train --resume), "
            "remove the folder, or choose another"
        )


def require_pool_place(folder: Path) -> None:
    """Refuse the folder of an adapter, which is never read as a pool, and of a base model."""
    for name, what in (
        (WEIGHTS_FILE, "an adapter"),
        (PEFT_WEIGHTS_FILE, "an adapter"),
        ("config.json", "a base model"),
    ):
        if files.is_present(folder / name):
            raise RsgwmError(f"{folder} holds {what}; choose another folder")


def drop_state(folder: Path) -> None:
    """Remove what only an unfinished run needs: whoever finished it may have been killed before."""
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    prune(folder, len(checkpoint_folders(folder)), with_state=0)


def read_checkpoint(saving: Saving, run: Mapping[str, Any], progress: Progress) -> Checkpoint | None:
    """The newest sound checkpoint of an unfinished run as ``saving.resume`` asks; None to start at the beginning.

    ``run`` is everything the result depends on: nested mappings of JSON values. Nothing is written or removed: where
    there is none to go on from, :func:`clear_run` takes away what is there.

    Raises:
        RsgwmError: there are checkpoints but ``resume`` refuses, or they are of a run that differs (every field that
            differs is named with both values), or all of them are damaged.
    """
    unfinished = checkpoint_folders(saving.folder)
    if not unfinished:
        return None
    if saving.resume == "refuse":
        raise RsgwmError(
            f"{saving.folder} holds an unfinished run ({unfinished[0].name}); continue it with --resume, "
            "or remove the folder, or choose another"
        )
    damaged = []
    for path in unfinished:
        manifest = _intact(path)
        if manifest is None:
            damaged.append(path.name)
            progress.message(f"{path} is incomplete or damaged; trying an older checkpoint")
            continue
        differences = differing(manifest.get("run") or {}, run)
        if differences and saving.resume == "replace":
            return None
        raise_problems(f"cannot resume {path}", differences)
        weights, _ = read_safetensors(path / WEIGHTS_FILE)
        arrays, _ = read_safetensors(path / STATE_FILE)
        return Checkpoint(manifest["step"], weights, arrays, manifest["record"])
    if saving.resume == "replace":
        return None
    raise RsgwmError(f"no checkpoint in {saving.folder / FOLDER} can be resumed (damaged: {', '.join(damaged)})")


def _intact(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose files are those it was written with; None when anything is damaged."""
    try:
        manifest = files.read_json_object(path / MANIFEST_FILE)
        of_the_run = files.sha256_json({name: manifest.get(name) for name in OF_THE_RUN})
    except (RsgwmError, ValueError):  # no JSON; NaN or infinity in it
        return None
    if manifest.get("told_sha256") != of_the_run:
        return None
    if not all(isinstance(manifest.get(name), dict) for name in ("files", "state")):
        return None
    expected = {**manifest["files"], **manifest["state"]}
    if {WEIGHTS_FILE, STATE_FILE} <= set(expected) and all(
        Path(name).name == name and (path / name).is_file() and files.sha256_file(path / name) == sha
        for name, sha in expected.items()
    ):
        return manifest
    return None


def clear_run(folder: Path) -> None:
    """Remove the checkpoints and snapshots of an unfinished run, where there are whole checkpoints of one."""
    if checkpoint_folders(folder):
        for name in (FOLDER, SNAPSHOTS):
            shutil.rmtree(folder / name, ignore_errors=True)
