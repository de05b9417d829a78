"""One evaluation run from questions to report, for whoever asks: the command line, the library, recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.evaluation.answers import REFUSAL
from mlx_rsgwm.evaluation.contamination import Overlap
from mlx_rsgwm.evaluation.journal import FILE, EvaluationJournal
from mlx_rsgwm.evaluation.report.folder import summarise_records, write_report
from mlx_rsgwm.evaluation.runner import evaluate
from mlx_rsgwm.inference.loop import DraftVerify


def report_run(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    about: Mapping[str, Any],
    overlap: Overlap,
    out: Path | None,
    *,
    timed: int,
    batch_rows: int,
    seeds: Sequence[int] = (),
    drafts: int | None = None,
    refusal: re.Pattern[str] = REFUSAL,
    seed: int,
    metadata: Mapping[str, Any],
    replace: bool = False,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> dict[str, Any] | None:
    """Evaluate and write the report folder ``out`` (with None only the summary); a run that was stopped there resumes.

    Args:
        pipeline: its ``check`` adds rows to the report and changes none.
        questions, timed, batch_rows, seeds, drafts, refusal, processes: see
            :func:`~mlx_rsgwm.evaluation.runner.evaluate`.
        about: what the items depend on, of :func:`~mlx_rsgwm.evaluation.runner.describe_run`; a journal in ``out`` of
            something else is refused, or with ``replace`` started anew.
        overlap: of the questions with what was trained and calibrated on; it stands above the result.
        seed: of the bootstrap behind the intervals, recorded in the report.
        metadata: what else the report says of where its numbers come from.

    Returns:
        What ``report.json`` holds; None in a process that does not write.
    """
    for question in questions:
        # One that is too long is refused before anything is written.
        pipeline.prompt(question.question, f"question {question.id}")
    journal = None if out is None else EvaluationJournal(out / FILE, about, replace=replace, shard=processes.rank)
    records = evaluate(
        pipeline, questions, timed, batch_rows, progress,
        seeds=seeds, drafts=drafts, journal=journal, refusal=refusal, processes=processes,
    )  # fmt: skip
    if not processes.writes:
        return None
    told = {
        **about,
        "base": pipeline.slots.base.describe(),
        "date": date.today().isoformat(),
        "seed": seed,
        **metadata,
        "overlap": {**asdict(overlap), "headline": overlap.headline()},
    }
    attempts, check = pipeline.config.most, pipeline.config.check
    if out is None:
        return summarise_records(records, attempts, told, seed=seed, check=check)
    return write_report(out, records, attempts, told, seed=seed, check=check)
