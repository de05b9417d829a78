"""Drafts of held-out questions with what the verifier said of them, and the calibration that is fitted on them.

Drafting is what costs, so the drafts can be kept in a journal and fitted on again with other settings.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import build
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.resume import Journal
from mlx_rsgwm.data.perturb import perturb
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.row_hashes import RowRecord
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.inference.calibration import Calibration, NothingToTellApart
from mlx_rsgwm.inference.calibration_fit import Judged, fit
from mlx_rsgwm.inference.draft import SAMPLED, Draft, Signals
from mlx_rsgwm.inference.identity import pipeline_identity
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import failed_check
from mlx_rsgwm.inference.pool import together
from mlx_rsgwm.inference.risk_control import Target
from mlx_rsgwm.inference.scores import SCORES

FORMAT = "mlx-rsgwm/held-out-drafts"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CalibrationItem:
    """All drafts of one question: texts, labels by gold and signals, in the order they were made.

    ``pair`` holds the signals of the gold answer and of a perturbed one; it is empty where nothing can be perturbed.
    """

    id: str
    task: str
    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    signals: tuple[Signals, ...]
    pair: tuple[Signals, ...] = ()


def header_of(pipeline: DraftVerify, questions: Sequence[Question]) -> dict[str, Any]:
    """What a file of drafts of these questions begins with; not the rule of a pool, for each adapter is in it."""
    made_for = pipeline_identity(pipeline)
    made_for.pop("combine", None)
    if made_for["drafts"] == SAMPLED:  # files of earlier versions, which go on, say nothing of it
        del made_for["drafts"]
    if made_for["draft_template"] == made_for["template"]:  # files of earlier versions, which go on, say it once
        del made_for["draft_template"]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "questions": files.sha256_json([[question.id, question.question, question.gold] for question in questions]),
        "seed": pipeline.config.sampling.seed,
        **made_for,
    }


def keep_drafts(file: Path, about: Mapping[str, Any], items: Sequence[CalibrationItem]) -> None:
    """Keep drafts in a journal."""
    Journal(file, about, lambda row, where: None, replace=True).append(_row(item) for item in items)


def _row(item: CalibrationItem) -> dict[str, Any]:
    """An item as JSON has it; signals of a single verifier have nothing of each."""
    row = asdict(item)
    for signals in (*row["signals"], *row["pair"]):
        if not signals["each"]:
            del signals["each"]
    return row


def _combined(item: CalibrationItem, rule: str) -> CalibrationItem:
    """The item as a pool of this rule has read it."""
    signals, pair = (tuple(together(said.each or (said,), rule) for said in part) for part in (item.signals, item.pair))
    return replace(item, signals=signals, pair=pair)


def kept_drafts(file: Path, about: Mapping[str, Any], count: int) -> list[CalibrationItem] | None:
    """The ``count`` items of a journal; None where there is none, or not all of them.

    Raises:
        RsgwmError: no such journal, a damaged one, or one of drafts of something else.
    """
    if not os.path.lexists(file):
        return None
    items: list[CalibrationItem] = []
    Journal(file, about, lambda row, where: items.append(build(CalibrationItem, row, where)))
    if len(items) > count:
        raise RsgwmError(f"{file} holds {len(items)} items, not {count}; remove it to draft anew")
    return items if len(items) == count else None


def explain(calibration: Calibration) -> str:
    """One line: the scores compared, the one in use, its threshold and the bound on its risk."""
    compared = ", ".join(f"{name} {'–' if area is None else f'{area:.3f}'}" for name, area in calibration.auroc.items())
    text = (
        f"AUROC on {calibration.drafts} held-out drafts of {calibration.items} items: {compared}; "
        f"using {calibration.score}, threshold {calibration.threshold:.3f}"
    )
    if calibration.at_chance:
        told = "no better than chance, its 95 % interval does not lie above .5"
        text += f"; {', '.join(calibration.at_chance)} not offered ({told})"
    return text if calibration.risk_bound is None else f"{text}; {calibration.risk_bound}"


def collect(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    seed: int,
    batch_rows: int = 32,
    progress: Progress = SILENT,
    file: Path | None = None,
) -> list[CalibrationItem]:
    """Draft all that the loop may make of every question and read them, with gold and perturbed answers beside them.

    With ``file``, what is there is read instead, if it is for the same questions, adapters and settings; else it is
    written.

    Raises:
        RsgwmError: no questions, or a file that is for something else.
    """
    if not questions:
        raise RsgwmError("there are no held-out questions")
    header = header_of(pipeline, questions)
    if file is not None and (stored := kept_drafts(file, header, len(questions))) is not None:
        return [_combined(item, pipeline.combine) for item in stored]
    texts = [question.question for question in questions]
    drafted = pipeline.draft_many(texts, pipeline.config.most, batch_rows, progress)
    signals = judging.read_all(pipeline, texts, drafted, batch_rows, progress)
    rng = random.Random(f"calibration/{seed}")
    pairs: list[list[Draft]] = []
    for question in questions:
        wrong = perturb(question, rng)
        answers = [] if wrong is None else [question.answer, wrong.answer]
        pairs.append([pipeline.as_draft(answer) for answer in answers])
    read_pairs = judging.read_all(pipeline, texts, pairs, batch_rows, progress)
    items = [
        CalibrationItem(
            id=question.id,
            task=question.task,
            texts=tuple(draft.text for draft in drafts),
            correct=tuple(judging.judge(question, draft, {}).correct for draft in drafts),
            signals=tuple(said),
            pair=tuple(pair),
        )
        for question, drafts, said, pair in zip(questions, drafted, signals, read_pairs, strict=True)
    ]
    if file is not None:
        keep_drafts(file, header, items)
    return items


def _refused(
    pipeline: DraftVerify, questions: Sequence[Question], items: Sequence[CalibrationItem]
) -> tuple[list[list[bool]], str]:
    """Which drafts the loop refuses by its check, and the check."""
    check = pipeline.config.check
    failed = [
        [failed_check(text, question.question, check) is not None for text in item.texts]
        for question, item in zip(questions, items, strict=True)
    ]
    return failed, check


def calibrate(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    seed: int,
    batch_rows: int = 32,
    progress: Progress = SILENT,
    *,
    score: str = "auto",
    scores: Sequence[str] = SCORES,
    method: str = "auto",
    target: Target | None = None,
    file: Path | None = None,
    record: RowRecord | None = None,
) -> Calibration:
    """Fit a calibration on the drafter's own drafts of held-out questions; see :func:`collect` and :func:`fit`.

    ``record``: the rows that the calibration says it was fitted on.  [default: the questions alone]

    Raises:
        NothingToTellApart: every draft is right, or every draft wrong.
    """
    items = collect(pipeline, questions, seed, batch_rows, progress, file)
    labels = [correct for item in items for correct in item.correct]
    if all(labels) or not any(labels):
        raise NothingToTellApart(
            f"{'all' if all(labels) else 'none'} of {len(labels)} drafts of {len(items)} questions are right: scores "
            "cannot be calibrated on these; give more or other questions, a higher temperature, or a drafter that "
            "answers some of them and not others"
        )
    pairs = [item.pair for item in items if item.pair]
    calibration = fit(
        Judged(
            [item.signals for item in items], [item.correct for item in items], *_refused(pipeline, questions, items)
        ),
        Judged(pairs, [(True, False)] * len(pairs)),
        score=score,
        scores=scores,
        method=method,
        target=target,
        made_for=pipeline_identity(pipeline),
        seed=seed,
        learned=pipeline.combine == "learned",
    )
    record = record or RowRecord.of(question.question for question in questions)
    calibration = replace(calibration, row_hashes=record.describe())
    progress.detail(explain(calibration))
    return calibration
