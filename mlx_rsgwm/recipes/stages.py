"""Stages of a run and their records: what a stage was made from and what it wrote, so that it is never taken for done
when it is not.

A record names the hash of the stage's settings and inputs and of every file that it wrote. Before the work starts, one
takes its place that says what is under way: a stage that was killed is never done, and what it wrote for other settings
is removed. A stage whose files were edited or deleted is done again. What a finished stage had written is moved to a
hidden folder until the stage is done again; what somebody has edited since stays there.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.resume import content_key, read_stamp, write_stamp
from mlx_rsgwm.models.adapter import DIRECTIONS_FILE, MANIFEST_FILE

FOLDER = "stages"
FORMER = ".former"  # below the run's folder: a folder for each stage


@dataclass(frozen=True)
class Stage:
    """A piece of work. ``settings`` are JSON; ``inputs`` and ``outputs`` are files and folders below the run's.

    ``apart`` are names of files in these folders that are of no account, for they belong to another stage. ``resumed``
    are names of outputs that the work checks and goes on from: intact, they stay when others were edited or deleted.
    ``pieces``: how many tasks the work shows, one after the other.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    work: Callable[[], None]
    apart: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ()
    pieces: int = 1


class Stages:
    """The records of a run in the folder ``out``. ``executed`` are the names of the stages that this run did."""

    def __init__(self, out: Path, progress: Progress = SILENT) -> None:
        self.out, self.progress = out, progress
        self.executed: list[str] = []
        self.seconds: dict[str, float] = {}

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage was done with these settings and inputs, and its files are those that it wrote."""
        record = read_stamp(self._path(stage))
        return (
            record is not None
            and record.get("key") == self._key(stage)
            and isinstance(record.get("outputs"), dict)
            and self._is_intact(record["outputs"])
        )

    def run(self, stage: Stage) -> None:
        """Do the stage unless it is done."""
        record = read_stamp(self._path(stage))
        if not self.is_done(stage):
            key = self._key(stage)
            before, former = self._cleared(stage, record, key)
            write_stamp(self._path(stage), key, {"before": before, "former": former})
            started = time.monotonic()
            stage.work()
            seconds = round(time.monotonic() - started, 3)
            written = [name for name, stamp in self._stamps(stage).items() if stamp != before.get(name)]
            outputs = {name: _digest(self.out / name) for name in written}
            record = write_stamp(self._path(stage), key, {"seconds": seconds, "outputs": outputs, "former": former})
            self.executed.append(stage.name)
        assert record is not None
        if record.get("former"):  # also what a run that was killed here left behind
            self._remove(name for name in record["former"] if isinstance(name, str))
            files.write_json(self._path(stage), {**record, "former": []})
        self.seconds[stage.name] = record["seconds"]

    def _cleared(self, stage: Stage, record: Mapping[str, Any] | None, key: str) -> tuple[dict[str, Any], list[str]]:
        """Clear away what the stage wrote before, done or killed.

        What was half written with the same settings and inputs stays, for the work to go on from.

        Returns:
            The files that were there without it, stamped; those that are to be removed once the work is done.
        """
        record = record or {}
        outputs, before = record.get("outputs"), record.get("before")
        former = [name for name in record.get("former") or [] if isinstance(name, str)]
        if isinstance(outputs, dict):
            stays = stage.resumed if record.get("key") == key else ()
            former = self._set_aside(stage, {**record, "former": former}, stays)
            return {name: stamp for name, stamp in self._stamps(stage).items() if name not in outputs}, former
        if isinstance(before, dict):
            if record.get("key") == key:
                return before, former
            self._remove(name for name, stamp in self._stamps(stage).items() if stamp != before.get(name))
        return self._stamps(stage), former

    def _set_aside(self, stage: Stage, record: Mapping[str, Any], stays: Sequence[str]) -> list[str]:
        """Move a finished stage's files out of the way; returns where those went that nobody has edited.

        The record lists these places before the first file is moved, so that none is forgotten whenever this is killed.
        """
        places, edited = {}, set()
        for name, digest in record["outputs"].items():
            file = self._own(name)
            if file is None:
                continue
            if _digest(file) != digest:
                edited.add(name)
            elif file.name in stays:
                continue
            places[name] = _free_name(self.out / FORMER / stage.name / name)
        unedited = [place.relative_to(self.out).as_posix() for name, place in places.items() if name not in edited]
        former = list(dict.fromkeys([*record["former"], *unedited]))
        files.write_json(self._path(stage), {**record, "former": former})
        for name, place in places.items():
            make_folder(place.parent)
            _move(self.out / name, place)
            self._remove_empty(self.out / name)
            if name in edited:
                self.progress.warning(
                    f"{self.out / name} was changed after {stage.name} had written it; {stage.name} is done again, "
                    f"and the changed file is now {place}"
                )
        return former

    def _path(self, stage: Stage) -> Path:
        return self.out / FOLDER / f"{stage.name}.json"

    def _key(self, stage: Stage) -> str:
        return content_key(stage.settings, self._contents(stage.inputs, stage.apart))

    def _contents(self, paths: Sequence[Path], apart: Sequence[str]) -> dict[str, str]:
        """SHA-256 of every file of ``paths``, by its name below the run's folder; hidden files are passed over."""
        return {name: _digest(self.out / name) for name in self._files(paths, apart)}

    def _files(self, paths: Sequence[Path], apart: Sequence[str]) -> list[str]:
        names = []
        for path in paths:
            inside = [file for file in sorted(path.rglob("*")) if file.name not in apart] if path.is_dir() else [path]
            for file in inside:
                name = file.relative_to(self.out)
                if file.is_file() and not any(part.startswith(".") for part in name.parts):
                    names.append(name.as_posix())
        return names

    def _stamps(self, stage: Stage) -> dict[str, list[int]]:
        """The stage's files, each with what changes when it is written again."""
        stats = {name: (self.out / name).stat() for name in self._files(stage.outputs, stage.apart)}
        return {name: [stat.st_ino, stat.st_mtime_ns] for name, stat in stats.items()}

    def _is_intact(self, outputs: Mapping[str, str]) -> bool:
        return all(
            (self.out / name).is_file() and _digest(self.out / name) == digest for name, digest in outputs.items()
        )

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            file = self._own(name)
            if file is not None:
                file.unlink()
                self._remove_empty(file)

    def _own(self, name: str) -> Path | None:
        """The file ``name`` of the run's folder; None where there is none, and for names that lead out of it."""
        file = self.out / name
        return None if ".." in file.parts or Path(name).is_absolute() or not file.is_file() else file

    def _remove_empty(self, file: Path) -> None:
        """Remove the folders that ``file`` leaves empty."""
        with suppress(OSError):
            for folder in file.parents:
                if folder == self.out:
                    break
                folder.rmdir()


def _free_name(path: Path) -> Path:
    """``path``, or with a number after its name where something is there already."""
    numbered = path
    number = 1
    while numbered.exists():
        numbered = path.with_name(f"{path.name}.{number}")
        number += 1
    return numbered


def _move(file: Path, place: Path) -> None:
    """Rename; to another file system, copy and remove once the copy is on disk."""
    try:
        file.rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(file, place)
        with open(place, "rb+") as copy:
            os.fsync(copy.fileno())
        file.unlink()


def _digest(file: Path) -> str:
    """SHA-256 of a file; of an adapter's manifest, without what ``rsgwm directions collect`` adds to it later."""
    if file.name == MANIFEST_FILE:
        with suppress(RsgwmError, ValueError):
            manifest = files.read_json_object(file)
            hashes = manifest.get("files")
            manifest.pop("directions", None)
            if isinstance(hashes, dict):
                hashes.pop(DIRECTIONS_FILE, None)
            return files.sha256_json(manifest)
    return files.sha256_file(file)
