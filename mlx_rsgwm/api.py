"""What ``import mlx_rsgwm as rs`` offers: the whole job as functions, from questions to checked answers.

Each function opens what it is given by name, calls one function of the package, and writes a folder where it is given
``out``. Defaults are those of the command line. Errors that a user can mend are :class:`RsgwmError`, one line long.
``progress`` says nothing unless it is given ``rs.LineProgress()``, which prints lines on standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.audit.carry_out import merge_by_plan
from mlx_rsgwm.audit.plan import read_plan
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import exclusive
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.corpus import Corpus
from mlx_rsgwm.data.loading import load_data
from mlx_rsgwm.data.mlx_lm_rows import Examples
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.row_hashes import RowRecord
from mlx_rsgwm.evaluation.answers import REFUSAL
from mlx_rsgwm.evaluation.calibration_set import calibrate as fit_calibration
from mlx_rsgwm.evaluation.contamination import check_overlap, rows_seen, rows_trained_on
from mlx_rsgwm.evaluation.reported_run import report_run
from mlx_rsgwm.evaluation.runner import describe_run
from mlx_rsgwm.evaluation.slices import Slice, read_slice, with_own_ids
from mlx_rsgwm.inference.calibration import Calibration, calibration_folder, save_calibration
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.pair import roles_of
from mlx_rsgwm.merging.merge import merge as merge_adapters
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.recollect import open_recollection
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapters
from mlx_rsgwm.models.base import DEFAULT_BASE, Base, load_base
from mlx_rsgwm.training.checkpoints import Saving, claim_adapter_folder
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish
from mlx_rsgwm.training.loop import train as train_adapter


def load_questions(
    tasks: str | Sequence[str],
    *,
    limit: int | None = 100,
    split: str | None = None,
    data: str | Path | None = None,
    shuffled: bool = False,
    seed: int = DEFAULT_SEED,
) -> list[Question]:
    """Questions with their gold answers, of the split that results are reported on.

    Args:
        tasks: embedded families, public data sets, or files of questions (JSON lines, a JSON array, CSV).
        limit: the first so many of each task; None for all.
        split: another split; of a file of one's own ``train``, ``calibration``, ``test`` or ``all``.
        data: folder with ``<task>/<split>.jsonl`` for public data sets; None fetches them from the Hub.
        shuffled: take them from the task's order as shuffled by ``seed``.
        seed: of the embedded families and of the shuffling.

    Raises:
        RsgwmError: an unknown task or split, rows that cannot be read, missing gold answers, ids given twice.

    Example::

        rs.load_questions(["change", "prices"], limit=24)
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    how, folder = "seeded" if shuffled else "first", None if data is None else Path(data)
    return with_own_ids([read_slice(Slice(name, limit, how, seed, split, folder)) for name in names])


def train(
    data: Corpus | Examples | str | Path,
    out: str | Path | None = None,
    *,
    base: Base | str | Path = DEFAULT_BASE,
    held_out: Corpus | Examples | str | Path | None = None,
    config: TrainConfig | None = None,
    mask_prompt: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> Adapter:
    """Train one LoRA or DoRA adapter and keep its importance, Adam's second moment of every parameter.

    Args:
        data: a corpus or its folder, a folder with mlx-lm's ``train.jsonl``, or a file of such rows.
        out: the adapter's folder. A run that was stopped there resumes, to the bit; None keeps the adapter in memory.
        base: a loaded base model, or its name (Hub id, folder, ``.gguf`` file, alias).
        held_out: rows that are scored and never trained on, as ``data``; None takes ``valid.jsonl`` beside it, if any.
        config: all settings together.
        mask_prompt: train completions only (corpora always do).
        progress: told of steps and losses.
        settings: fields of :class:`TrainConfig` (``rank``, ``epochs``, ``learning_rate``, …) that replace those of
            ``config``.

    Returns:
        The adapter: ``weights`` holds ``{module}.lora_a`` (in, rank) and ``.lora_b`` (rank, out) in float32,
        ``importance`` arrays of the same shapes, ``manifest`` losses and provenance.

    Raises:
        RsgwmError: settings out of range, rows that do not fit, a finished adapter in ``out``, too little memory.

    Example::

        adapter = rs.train("corpus/change", "pool/change", epochs=1, learning_rate=1e-3)
    """
    chosen = _config(config, settings)
    rows, held = _training_rows(data, held_out, mask_prompt)
    folder = None if out is None else Path(out)
    if folder is None:
        return train_adapter(_base(base, progress), rows, chosen, held, progress=progress)
    saving = Saving(folder, resume="continue")
    with claim_adapter_folder(folder, trains=True):
        adapter = train_adapter(_base(base, progress), rows, chosen, held, progress=progress, saving=saving)
        finish(adapter, saving)
    return adapter


def merge(
    adapters: AdapterSource | Sequence[AdapterSource] = (),
    out: str | Path | None = None,
    *,
    plan: str | Path | None = None,
    method: str = MergeOptions.method,
    role: str = MergeOptions.role,
    weights: Sequence[float] = (),
    rank: int | None = None,
    seed: int = DEFAULT_SEED,
    base: str | Path | None = None,
    recollect: Sequence[Corpus | Examples | str | Path] = (),
    progress: Progress = SILENT,
    **parameters: Any,
) -> Adapter:
    """One adapter from several of one base, with a diagnosis of what came out in its manifest.

    Args:
        adapters: at least two, each as for :func:`load_adapter`, or a folder of them; folders are read a module at a
            time. None with a ``plan``: those that it names, where it names them.
        out: the folder to write; None keeps the adapter in memory.
        plan: a merge plan (:func:`audit_adapters`), which says method, parameters and weights of every module.
        method: a name of ``rsgwm merge --list``; ``auto`` takes the one that suits what the adapters have kept, and
            ``manifest["merge"]["chosen_because"]`` says why.
        role: ``draft``, ``verify``, or one of your own.
        weights: one for each adapter; none for equal ones.
        rank: of the result; None for the highest of the sources (of ``cat`` their sum).
        seed: of random masks and sketches.
        base: the base that adapters of other formats are read for; None for the one that they name.
        recollect: rows of every adapter's task, in the adapters' order: directions are collected anew while merging,
            each layer's under the merged layers below.
        progress: told of modules and warnings.
        parameters: the method's own (``tau``, ``density``, …).

    Returns:
        The merged adapter; ``manifest["merge"]["diagnosis"]`` has norms and cosines over all and for each module.

    Raises:
        RsgwmError: an unknown method or parameter, adapters that do not fit together (every reason at once), a result
            that is not finite, that collapses or blows up, a finished adapter in ``out``.

    Example::

        drafter = rs.merge(["pool/change", "pool/prices"], "drafter", role="draft", tau=0.3)
    """
    folder = None if out is None else Path(out)
    options = MergeOptions(method, role, parameters, tuple(weights), rank, seed)
    sources: list[AdapterSource] = [adapters] if isinstance(adapters, AdapterSource) else [*adapters]
    with claim_adapter_folder(folder) if folder is not None else nullcontext():
        loaded, recollection = load_adapters(sources, base, lazy=True, hashes=False, progress=progress), None
        if recollect:
            recollection = open_recollection(loaded, recollect, _text(base), seed, progress)
        if plan is not None:
            if method != MergeOptions.method or parameters or weights or recollect:
                raise RsgwmError("a plan says method, parameters and weights; leave them out")
            merged = merge_by_plan(read_plan(Path(plan)), loaded, options, progress, base)
        else:
            merged = merge_adapters(loaded, options, progress, base=base, recollection=recollection)
        if reason := merged.manifest["merge"].get("chosen_because"):
            progress.message(f"merged by {merged.manifest['merge']['method']}: {reason}")
        for warning in merged.manifest["merge"]["warnings"]:
            progress.warning(warning)
        if folder is not None:
            merged.save(folder)
    return merged


def calibrate(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    *,
    save: bool = True,
    allow_overlap: bool = False,
    seed: int = DEFAULT_SEED,
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> Calibration:
    """Decide on held-out questions which score the verifier uses, what it means, and from where on it accepts.

    Args:
        pipeline: uses the result from here on.
        questions: with gold answers, neither trained on nor to be tested on (``split="calibration"``).
        save: keep it beside the verifier (of one that has no folder of ours: in the cache), for other runs.
        allow_overlap: take questions that were trained on.
        seed: of the perturbed answers and of resampling.
        batch_rows: drafts made at a time.
        progress: told of drafts and what was chosen.

    Raises:
        RsgwmError: no questions, questions that were trained on, every draft right or every draft wrong.

    Example::

        rs.calibrate(pipeline, rs.load_questions("change", split="calibration", limit=24))
    """
    trained_on = rows_trained_on(_adapters(pipeline), str(pipeline.slots.base.path), progress)
    check_overlap(questions, trained_on, allow_overlap, "calibration")
    calibration = fit_calibration(pipeline, questions, seed, batch_rows, progress)
    verifier = [pipeline.slots.adapter(name) for name in pipeline.verifiers]
    if save and verifier:
        save_calibration(calibration_folder(verifier, pipeline.combine), calibration)
    pipeline.calibration = calibration
    pipeline.config = replace(pipeline.config, score=calibration.score, threshold=calibration.threshold)
    return calibration


def evaluate(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    out: str | Path | None = None,
    *,
    timed: int = 12,
    drafts: int | None = None,
    sampling_seeds: int = 1,
    allow_overlap: bool = False,
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The drafter alone and draft–verify on the same questions, from the same drafts.

    Args:
        pipeline: of :func:`open_pipeline`.
        questions: with gold answers; of :func:`load_questions` or one's own.
        out: the report's folder (``report.html``, ``report.json``, items); a run that was stopped there resumes.
        timed: questions also answered one by one, for latencies.
        drafts: recorded for each question, for pass@k; None for the loop's attempts.
        sampling_seeds: passes over the questions, from the pipeline's seed upwards.
        allow_overlap: ask what was trained or calibrated on, too; the result says so.
        batch_rows: drafts made at a time.
        progress: told of questions done.

    Returns:
        What ``report.json`` holds: ``drafter`` and ``draft_verify`` with each rate as estimate, 95 % interval and n,
        ``paired`` differences, verifier quality, the ceiling of any draft; JSON values.

    Raises:
        RsgwmError: no questions, two of one id, questions that were trained or calibrated on.

    Example::

        result = rs.evaluate(pipeline, rs.load_questions("change", limit=50), "report")
    """
    seen = rows_seen(_adapters(pipeline), str(pipeline.slots.base.path), progress)
    if pipeline.calibration and pipeline.calibration.row_hashes:  # also one that is not stored
        seen["calibration"] = RowRecord.from_description(pipeline.calibration.row_hashes, "the calibration")
    overlap = check_overlap(questions, seen, allow_overlap, "test")
    first = pipeline.config.sampling.seed
    seeds = tuple(range(first, first + sampling_seeds))
    about = describe_run(
        pipeline, questions, batch_rows, seeds=seeds, drafts=drafts, timed=timed, refusal=REFUSAL.pattern
    )
    folder = None if out is None else Path(out)
    with exclusive(folder) if folder is not None else nullcontext():
        summary = report_run(
            pipeline, questions, about, overlap, folder, timed=timed, batch_rows=batch_rows, seeds=seeds,
            drafts=drafts, seed=first, metadata={}, progress=progress,
        )  # fmt: skip
    assert summary is not None  # this process is the only one
    return summary


def convert(
    adapter: AdapterSource, out: str | Path, to: str, *, base: str | Path | None = None, progress: Progress = SILENT
) -> Path:
    """Write an adapter in another format, read it back, and compare: the same values, or an error.

    Args:
        adapter: as for :func:`load_adapter`.
        out: a new folder; for ``gguf`` a file.
        to: ``peft``, ``mlx`` or ``gguf``.
        base: the base's name; None for the one that the adapter records.
        progress: told of what the source does not say.

    Raises:
        RsgwmError: what has no counterpart in that format (every reason at once), no base, ``out`` is not empty.

    Example::

        rs.convert("drafter", "drafter-peft", to="peft")
    """
    from mlx_rsgwm.converters.convert import convert as convert_adapter

    return convert_adapter(adapter, Path(out), to, _text(base), progress)


def fuse(
    adapter: AdapterSource, out: str | Path, *, base: str | Path | None = None, format: str = "keep",
    min_share: float = 0.9, progress: Progress = SILENT,
) -> dict[str, Any]:  # fmt: skip
    """Work an adapter into its base and write the model, once most of the update is known to survive in its format.

    Args:
        adapter: as for :func:`load_adapter`.
        out: the new folder.
        base: the base's name; None for the one that the adapter records.
        format: ``keep``, ``float32``, ``float16``, ``bfloat16``, ``8bit``, ``4bit`` or ``3bit``.
        min_share: the share of the update that must survive rounding.
        progress: told of modules.

    Returns:
        JSON: ``share`` of the update that survives, the ``worst`` modules, ``max_abs_logit`` against base and adapter.

    Raises:
        CheckFailed: less than ``min_share`` survives; nothing is written.
        RsgwmError: the adapter does not fit the base, ``out`` is not empty.

    Example::

        rs.fuse("drafter", "drafter-model", format="float16")
    """
    from mlx_rsgwm.converters.fuse.fuse import fuse as fuse_adapter

    return fuse_adapter(adapter, _text(base), Path(out), target=format, min_share=min_share, progress=progress)


def parity(
    adapter: AdapterSource, *, base: str | Path | None = None, tolerance: float = 1e-3, progress: Progress = SILENT
) -> dict[str, Any]:
    """Compare an adapter's logits in MLX with torch and PEFT, layer by layer (needs ``mlx-rsgwm[torch]``).

    Args:
        adapter: as for :func:`load_adapter`.
        base: the base's name; None for the one that the adapter records.
        tolerance: largest difference of two float32 logits that passes.
        progress: told of what is compared.

    Returns:
        The certificate: ``passed``, ``failures`` in words, ``max_abs_logit``, the first layer that differs.

    Raises:
        RsgwmError: torch is not installed, the adapter does not fit the base.

    Example::

        assert rs.parity("drafter")["passed"]
    """
    from mlx_rsgwm.converters.parity.check import check_parity

    return check_parity(adapter, _text(base), tolerance=tolerance, progress=progress)


def _config(config: TrainConfig | None, settings: Mapping[str, Any]) -> TrainConfig:
    described = (config or TrainConfig()).describe()
    return TrainConfig.from_mapping({**described, **settings})


def _base(base: Base | str | Path, progress: Progress) -> Base:
    return base if isinstance(base, Base) else load_base(str(base), progress=progress)


def _training_rows(
    data: Corpus | Examples | str | Path, held_out: Corpus | Examples | str | Path | None, mask_prompt: bool
) -> tuple[Corpus | Examples, Corpus | Examples | None]:
    if isinstance(data, (str, Path)):
        folder = Path(held_out) if isinstance(held_out, (str, Path)) else None
        rows, beside = load_data(Path(data), folder, mask_prompt)
    else:
        rows, beside = data, None
        if isinstance(held_out, (str, Path)):
            beside = load_data(Path(held_out), None, mask_prompt)[0]
    return rows, held_out if isinstance(held_out, (Corpus, Examples)) else beside


def _adapters(pipeline: DraftVerify) -> dict[str, Adapter | Path]:
    drafter, slots = pipeline.drafter, pipeline.slots
    drafting = {} if drafter is None else {"drafter": slots.adapter(drafter)}
    return {**drafting, **roles_of([slots.adapter(name) for name in pipeline.verifiers])}


def _text(name: str | Path | None) -> str | None:
    return None if name is None else str(name)
