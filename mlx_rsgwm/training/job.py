"""A training run as a command line and a file ask for it together: what to read, where to write, whom to tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.distributed import Processes, launched_processes
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.loading import load_data, load_test
from mlx_rsgwm.models.adapter import Adapter, is_complete
from mlx_rsgwm.models.base import DEFAULT_BASE, load_base
from mlx_rsgwm.models.rounded_weights import check_dense
from mlx_rsgwm.training.checkpoints import Saving, claim_adapter_folder
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train
from mlx_rsgwm.training.memory import MemoryOptions
from mlx_rsgwm.training.mlx_lm_yaml import TrainingFile
from mlx_rsgwm.training.reporting import NO_REPORTS, Reports, open_reports
from mlx_rsgwm.training.warm_start import WarmStart

PROJECT = "mlx-rsgwm"  # name at reporting services


@dataclass(frozen=True)
class TrainJob:
    """One run with its surroundings; ``reading`` holds the keywords of :func:`~mlx_rsgwm.data.loading.load_data`.

    ``lenient``: without held-out rows nothing is validated, as in mlx-lm, instead of refusing.
    """

    base: str
    data: Path
    config: TrainConfig
    saving: Saving
    memory: MemoryOptions
    reading: Mapping[str, Any]
    held_out: Path | None = None
    test: bool = False
    warm_start: Path | None = None
    services: tuple[str, ...] = ()
    project: str = PROJECT
    lenient: bool = False
    notes: tuple[str, ...] = ()


def target_folder(asked: TrainingFile, data: Path | None, out: Path | None) -> Path:
    """The adapter folder to write, once it is known that one is named, and data.

    Raises:
        RsgwmError: ``data`` or ``out`` is given neither here nor in the file.
    """
    given: dict[str, Any] = {"--corpus": data or asked.run.get("data"), "--out": out or asked.run.get("out")}
    missing = [flag for flag, value in given.items() if value is None]
    if missing:
        raise RsgwmError(f"{' and '.join(missing)} must be given, on the command line or in the --config file")
    return Path(given["--out"])


def make_job(
    asked: TrainingFile,
    options: Mapping[str, Any],
    config: TrainConfig,
    saving: Saving,
    memory: MemoryOptions,
    file: Path | None = None,
) -> TrainJob:
    """The job of a file (``asked``, empty without one) with the options that were given laid over it.

    ``options``: ``base_name``, ``folder``, ``held_out``, ``mask_prompt`` (None: as the file says), ``all_turns``,
    ``test``, ``warm_start``, ``report_to``, ``project``.
    """
    mask = options["mask_prompt"]
    paths: dict[str, Any] = {name: options[option] or asked.run.get(name) for name, option in PATHS.items()}
    services = (options["report_to"] or asked.run.get("report_to") or "").split(",")
    return TrainJob(
        base=options["base_name"] or asked.run.get("base") or DEFAULT_BASE,
        data=Path(paths["data"]),
        config=config,
        saving=saving,
        memory=memory,
        reading={
            "mask_prompt": mask if mask is not None else bool(asked.run.get("mask_prompt", False)),
            "all_turns": (options["all_turns"] or asked.run.get("all_turns", False)) and mask is not False,
            "features": asked.run.get("features"),
        },
        held_out=Path(paths["held_out"]) if paths["held_out"] else None,
        test=bool(options["test"] or asked.run.get("test")),
        warm_start=Path(paths["warm_start"]) if paths["warm_start"] else None,
        services=tuple(name.strip() for name in services if name.strip()),
        project=options["project"] or asked.run.get("project") or PROJECT,
        lenient=file is not None,
        notes=tuple(f"{file}: {note}" for note in asked.notes),
    )


PATHS = {"data": "folder", "held_out": "held_out", "warm_start": "warm_start"}


def run_job(job: TrainJob, progress: Progress = SILENT) -> Adapter | None:
    """Train and write the adapter; None in a process of several that does not write.

    Raises:
        RsgwmError: the folder holds a finished adapter or is being written; rows or files that cannot be read; whatever
            :func:`~mlx_rsgwm.training.loop.train` raises.
    """
    processes, folder = launched_processes(), job.saving.folder
    if processes.writes:
        with claim_adapter_folder(folder, trains=True):
            return _run_in(job, processes, progress)
    if is_complete(folder):
        raise RsgwmError(f"{folder} already holds a finished adapter; choose another folder or remove it")
    _run_in(job, processes, SILENT)
    return None


def _run_in(job: TrainJob, processes: Processes, progress: Progress) -> Adapter:
    check_dense(job.base, job.config.qat, progress)
    corpus, held_out = load_data(job.data, job.held_out, **job.reading)
    test = load_test(job.data, **job.reading) if job.test else None
    weights = WarmStart.load(job.warm_start) if job.warm_start else None
    config, notes = job.config, list(job.notes)
    if job.lenient and held_out is None and config.validate_every:  # mlx-lm goes on without validation, too
        config = replace(config, validate_every=0, patience=0, select="last")
        notes.append("there are no held-out rows: no validation")
    for note in notes:
        progress.message(note)
    base = load_base(job.base, progress=progress)
    reports = _reports(job, config, processes)
    try:
        adapter = train(
            base, corpus, config, held_out, progress=progress, saving=job.saving, reports=reports, memory=job.memory,
            processes=processes, warm_start=weights, test=test,
        )  # fmt: skip
    finally:
        reports.close()
    if processes.writes:
        finish(adapter, job.saving)
    return adapter


def _reports(job: TrainJob, config: TrainConfig, processes: Processes) -> Reports:
    if not job.services or not processes.writes:
        return NO_REPORTS
    return open_reports(list(job.services), job.project, job.saving.folder, config.describe())
