"""The checkpoints that a run left: this project's, mlx-lm's numbered files, the folders of a PEFT trainer.

Of each its step and losses are known before any array is read; arrays are read when they are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.resume import differing
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.models.adapter import CONFIG_FILE, MANIFEST_FILE, Adapter, LoraSpec, is_complete, read_manifest
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.training.checkpoints import FOLDER as CHECKPOINTS
from mlx_rsgwm.training.checkpoints import checkpoint_folders

SINGLE = "is a single checkpoint; name the run's folder, or two or more checkpoints"
STEP_FOLDER = re.compile(r"step-\d{6,}")  # rsgwm train's
NUMBERED = re.compile(r"(\d{7,})_adapters\.safetensors")  # mlx_lm.lora's
TRAINER_FOLDER = re.compile(r"checkpoint-(\d+)")  # transformers' Trainer's
TRAINER_FILE = "trainer_state.json"
# What mlx_lm.lora prints: "Iter 10: Train loss 2.345, …"; from 0.32 on a table, "10  2.345 ▼ …" and "10  val 2.345".
LOSS = r"(\d+(?:\.\d+)?|nan|inf)(?![\w.])"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LINES = (
    re.compile(rf"\s*Iter (\d+): (Train|Val) loss {LOSS}"),
    re.compile(rf"\s*(\d+)\s+(){LOSS}\s+[▼▲]"),
    re.compile(rf"\s*(\d+)\s+(val)\s+{LOSS}"),
)

TRAIN, VALIDATION = "train-loss", "validation-loss"

Losses = dict[int, float]


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint by ``name``; ``run`` is what all of one run have in common. Losses in nats per token, or None.

    ``train_loss``: the mean since the checkpoint before. ``refused``: of a loss that is recorded and is no finite
    number from 0, by the name of its metric, what is wrong with it.
    """

    name: str
    step: int
    path: Path
    run: Any
    train_loss: float | None
    validation_loss: float | None
    load: Callable[[], Adapter]
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads_base(self) -> bool:
        """Whether loading it needs a base, as PEFT's folders do."""
        return TRAINER_FOLDER.fullmatch(self.name) is not None

    def loss(self, metric: str) -> float | None:
        """The loss of ``metric``, train-loss or validation-loss."""
        return self.train_loss if metric == TRAIN else self.validation_loss


def run_checkpoints(
    sources: Sequence[Path], log: Path | None = None, base: str | None = None, progress: Progress = SILENT
) -> list[RunCheckpoint]:
    """The checkpoints of a run's folder, or those named one by one, in the order of their steps.

    ``log``: what mlx_lm.lora printed, for its losses. ``base``: what PEFT's folders are read for.

    Raises:
        RsgwmError: fewer than two, of several runs, two of one step, a source that is no checkpoint, or a log of
            checkpoints that record their losses themselves.
    """
    places = _inside(sources[0], progress) if len(sources) == 1 else list(sources)
    if unlogged := [place for place in places if log is not None and not NUMBERED.fullmatch(place.name)]:
        raise RsgwmError(f"--log is for the numbered files of mlx_lm.lora; {unlogged[0]} has its losses beside it")
    logged = _read_log(log) if log is not None else ({}, {})
    checkpoints = sorted((_open(place, logged, base, progress) for place in places), key=lambda each: each.step)
    where = ", ".join(map(str, sources[:2]))
    if len(checkpoints) < 2:
        raise RsgwmError(
            f"{where} holds {len(checkpoints) or 'no'} checkpoint{'s' * (len(checkpoints) != 1)}; an average needs at "
            "least two (rsgwm train keeps them: --save-every 50 --keep 10)"
        )
    steps = [each.step for each in checkpoints]
    double = sorted({str(step) for step in steps if steps.count(step) > 1})
    raise_problems(where, [f"two checkpoints are of step {step}" for step in double])
    oldest, newest = checkpoints[0], checkpoints[-1]
    for other in checkpoints[1:]:
        if differences := differing(oldest.run, other.run):
            raise RsgwmError(
                f"{other.path} and {oldest.path} are checkpoints of different runs ({'; '.join(differences[:3])})"
            )
    if (newest.path / MANIFEST_FILE).is_file() and run_folder(newest) is None:
        progress.warning(f"warning: the run is not finished; its newest checkpoint is of step {newest.step}")
    return _windowed(checkpoints, logged[0])


def _inside(folder: Path, progress: Progress) -> list[Path]:
    """What of a run's folder, or of its folder of checkpoints, is a checkpoint."""
    if NUMBERED.fullmatch(folder.name) and folder.is_file():
        raise RsgwmError(f"{folder} {SINGLE}")
    if not folder.is_dir():
        raise RsgwmError(f"{folder} is no folder of a run; name one, or two or more checkpoints")
    run = folder.resolve().parent if folder.resolve().name == CHECKPOINTS else folder
    if folders := checkpoint_folders(run):
        begun = [path for path in (run / CHECKPOINTS).iterdir() if STEP_FOLDER.fullmatch(path.name)]
        for path in sorted(set(begun) - set(folders)):
            progress.warning(f"warning: {path} was not written to its end, and is left out")
        return folders
    entries = sorted(folder.iterdir())
    numbered = [path for path in entries if NUMBERED.fullmatch(path.name)]
    trainers = [path for path in entries if TRAINER_FOLDER.fullmatch(path.name) and path.is_dir()]
    if not numbered and not trainers and any(names.fullmatch(folder.name) for names in (STEP_FOLDER, TRAINER_FOLDER)):
        raise RsgwmError(f"{folder} {SINGLE}")
    return numbered or trainers


def _open(path: Path, logged: tuple[Losses, Losses], base: str | None, progress: Progress) -> RunCheckpoint:
    if (path / MANIFEST_FILE).is_file():
        return _own_checkpoint(path)
    if match := NUMBERED.fullmatch(path.name):
        step = int(match[1])
        load = partial(_load_numbered, path)
        losses = _Losses().take(VALIDATION, partial(_number, logged[1].get(step), f"the log, step {step}: the loss"))
        return losses.checkpoint(path, step, _parent(path), load)
    if (match := TRAINER_FOLDER.fullmatch(path.name)) and path.is_dir():
        step = int(match[1])
        load = partial(load_adapter, path, base, lazy=True, progress=progress)
        return _trainer_losses(path, step).checkpoint(path, step, _parent(path), load)
    raise RsgwmError(
        f"{path} is no checkpoint; a folder step-NNNNNN of rsgwm train, a file NNNNNNN_adapters.safetensors of "
        "mlx_lm.lora, or a folder checkpoint-N of a PEFT trainer is"
    )


def _own_checkpoint(path: Path) -> RunCheckpoint:
    manifest = read_manifest(path / MANIFEST_FILE)
    record, step = manifest.get("record"), manifest.get("step")
    if manifest.get("kind") != "checkpoint" or not isinstance(record, dict) or not isinstance(step, int):
        raise RsgwmError(f"{path} is an adapter, no checkpoint of a run; name its folder's checkpoints/step-NNNNNN")
    losses = _Losses()
    for metric, name in ((TRAIN, "train_loss_window"), (VALIDATION, "validation_loss")):
        losses.take(metric, partial(_number, record.get(name), f"{path}: {name}"))
    return losses.checkpoint(path, step, manifest.get("run"), partial(Adapter.load, path, lazy=True))


class _Losses:
    """A checkpoint's losses by metric as they are read, and what is wrong with those that are none."""

    def __init__(self) -> None:
        self.read: dict[str, float | None] = {}
        self.refused: dict[str, str] = {}

    def take(self, metric: str, read: Callable[[], float | None]) -> _Losses:
        """Read one."""
        try:
            self.read[metric] = read()
        except RsgwmError as error:
            self.refused[metric] = str(error)
        return self

    def checkpoint(self, path: Path, step: int, run: Any, load: Callable[[], Adapter]) -> RunCheckpoint:
        """The checkpoint that has these."""
        train, validation = self.read.get(TRAIN), self.read.get(VALIDATION)
        return RunCheckpoint(path.name, step, path, run, train, validation, load, self.refused)


def _number(value: Any, where: str) -> float | None:
    """A loss as it was recorded; None where there is none.

    Raises:
        RsgwmError: it is no finite number from 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise RsgwmError(
            f"{where} is {value!r}, no finite number from 0; leave that checkpoint out, or weigh by metric steps"
        )
    return float(value)


def _parent(path: Path) -> dict[str, str]:
    """Of other programs a run is known by its folder alone."""
    return {"folder": str(path.resolve().parent)}


def _load_numbered(path: Path) -> Adapter:
    file = path.with_name(CONFIG_FILE)
    config = files.read_json_object(file)
    arrays, _ = read_safetensors(path, evaluate=False)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in arrays))
    model = config.get("model")
    adapter = Adapter(LoraSpec.from_config(config, str(file)).covering(modules), arrays, origin=path)
    adapter.named_base = model if isinstance(model, str) else ""
    raise_problems(str(path), adapter.shape_problems())
    return adapter


def _read_log(path: Path) -> tuple[Losses, Losses]:
    """Losses by step of a log of mlx_lm.lora: of training, which are means since the line before, and of validation."""
    train: Losses = {}
    validation: Losses = {}
    for line in COLOURS.sub("", files.read_text(path)).splitlines():
        match = next((seen for pattern in LINES if (seen := pattern.match(line))), None)
        if match is not None:
            side = validation if match[2].lower() == "val" else train
            side[int(match[1])] = float(match[3])
    if not train and not validation:
        raise RsgwmError(f"{path} has no line of losses as mlx_lm.lora prints them")
    return train, validation


def _trainer_losses(folder: Path, step: int) -> _Losses:
    """Training loss at ``step`` and validation loss there, of a Trainer's own log in the checkpoint."""
    file, losses = folder / TRAINER_FILE, _Losses()
    if not file.is_file():
        return losses
    history = files.read_json_object(file).get("log_history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    train = {row["step"]: row["loss"] for row in rows if isinstance(row.get("step"), int) and "loss" in row}
    scored = [row["eval_loss"] for row in rows if row.get("step") == step and "eval_loss" in row]
    since = _saved_before(step, folder, TRAINER_FOLDER)
    losses.take(TRAIN, partial(_window, train, since, step, str(file)))
    return losses.take(VALIDATION, partial(_number, scored[-1] if scored else None, f"{file}: eval_loss"))


def _saved_before(step: int, path: Path, names: re.Pattern[str]) -> int:
    """The step that the run saved before ``step``, whether that checkpoint is averaged or not.

    Of the first that is left it is as long before as the next is after: earlier ones may have been removed.
    """
    steps = sorted(int(match[1]) for other in path.parent.iterdir() if (match := names.fullmatch(other.name)))
    earlier, later = [other for other in steps if other < step], [other for other in steps if other > step]
    return earlier[-1] if earlier else max(0, 2 * step - later[0]) if later else 0


def _window(logged: Mapping[int, Any], before: int, step: int, where: str) -> float | None:
    """The mean of what was logged after ``before`` up to ``step``; each line stands for the steps since the last."""
    total, weight, last = 0.0, 0, before
    for at in sorted(at for at in logged if before < at <= step):
        loss = _number(logged[at], f"{where}, step {at}: the training loss")
        assert loss is not None
        total, weight, last = total + loss * (at - last), weight + at - last, at
    return total / weight if weight else None


def _windowed(taken: list[RunCheckpoint], logged: Losses) -> list[RunCheckpoint]:
    """The same with the training losses of a log, where there is one."""
    if not logged:
        return taken
    told = []
    for each in taken:
        since = _saved_before(each.step, each.path, NUMBERED)
        losses = _Losses().take(TRAIN, partial(_window, logged, since, each.step, "the log"))
        told.append(replace(each, train_loss=losses.read.get(TRAIN), refused={**each.refused, **losses.refused}))
    return told


def run_folder(checkpoint: RunCheckpoint) -> Path | None:
    """The finished adapter's folder that one of this project's checkpoints belongs to; None where there is none."""
    folder = checkpoint.path.resolve().parent.parent
    return folder if (checkpoint.path / MANIFEST_FILE).is_file() and is_complete(folder) else None
