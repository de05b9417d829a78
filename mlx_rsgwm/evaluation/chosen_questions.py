"""What a run asks: slices of questions compared with all that was trained and calibrated on; what it calibrates on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.row_hashes import RowRecord
from mlx_rsgwm.evaluation.contamination import (
    CalibrationDraw,
    Overlap,
    check_overlap,
    draw_calibration,
    rows_seen,
    union,
)
from mlx_rsgwm.evaluation.slices import Slice, read_slice, with_own_ids
from mlx_rsgwm.inference.calibration import calibration_folder, stored_calibration
from mlx_rsgwm.inference.pair import roles_of
from mlx_rsgwm.models.adapter import Adapter

CALIBRATION_QUESTIONS = 24  # in all, where an evaluation has to calibrate by itself
FEWEST_OF_A_TASK = 4


@dataclass(frozen=True)
class ChosenQuestions:
    """The questions of several slices, in order; ``told``: what each slice says of itself, for the report.

    ``overlap``: what of them was trained or calibrated on.
    """

    questions: list[Question]
    told: list[dict[str, Any]]
    overlap: Overlap


def choose_questions(
    slices: Sequence[Slice], seen: Mapping[str, RowRecord], allow_overlap: bool, progress: Progress = SILENT
) -> ChosenQuestions:
    """Read ``slices`` and compare them with ``seen``, by role as of ``contamination.rows_seen``.

    ``progress`` is told what was taken of files of one's own.

    Raises:
        RsgwmError: questions that were trained or calibrated on, unless ``allow_overlap``; what reading a slice raises.
    """
    everything = union(seen)
    read = [read_slice(part, everything) for part in slices]
    told = [about for _, about in read]
    for about in told:
        if about.get("note"):
            progress.message(about["note"])
    questions = with_own_ids(read)
    return ChosenQuestions(questions, told, check_overlap(questions, seen, allow_overlap, "test"))


def rows_seen_by(
    drafter: Adapter, verifiers: Sequence[Adapter], combine: str, base: str | None, progress: Progress = SILENT
) -> dict[str, RowRecord]:
    """By role, what a drafter, the adapters that verify under the rule ``combine``, and their calibration have seen."""
    pool_folder = calibration_folder(verifiers, combine) if len(verifiers) > 1 else None
    return rows_seen({"drafter": drafter, **roles_of(verifiers)}, base, progress, pool_folder)


def draw_to_calibrate_here(
    tasks: Sequence[str],
    verifiers: Sequence[Adapter],
    score: str,
    combine: str,
    seen: Mapping[str, RowRecord],
    *,
    seed: int,
    folder: Path | None = None,
    allow_overlap: bool = False,
) -> CalibrationDraw:
    """Held-out questions for an evaluation that has to calibrate by itself; none where it has not.

    It has to where ``score`` is ``auto`` and nothing is stored beside the ``verifiers`` under their rule ``combine``.
    None, too, of a task without questions that are known to be held out.
    """
    needed = score == "auto" and stored_calibration(verifiers, combine) is None
    count = max(FEWEST_OF_A_TASK, CALIBRATION_QUESTIONS // len(tasks))
    return draw_calibration(tasks if needed else (), count, seed, folder, seen, allow_overlap, only_known_files=True)
