"""Drafts of held-out questions with what the verifier said of them: what a calibration is fitted on.

Drafting is what costs, so the drafts can be kept in a journal and fitted on again with other settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import build
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.resume import Journal
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.inference.calibration import Calibration
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.verifier import Signals
from mlx_rsgwm.models.adapter import WEIGHTS_FILE

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


def identity(pipeline: DraftVerify) -> dict[str, Any]:
    """What a calibration holds for: base, template, adapters by the SHA-256 of their weights, sampling, attempts."""
    sampling = pipeline.config.sampling
    return {
        "base": pipeline.slots.base.fingerprint,
        "template": pipeline.verify_template.hash,
        "drafter": _weights_hash(pipeline, pipeline.drafter),
        "verifier": _weights_hash(pipeline, pipeline.verifier),
        "attempts": pipeline.config.attempts,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }


def _weights_hash(pipeline: DraftVerify, name: str | None) -> str | None:
    path = None if name is None else pipeline.slots.adapter(name).path
    return None if path is None else files.sha256_file(path / WEIGHTS_FILE)


def header_of(pipeline: DraftVerify, questions: Sequence[Question]) -> dict[str, Any]:
    """What a file of drafts of these questions begins with."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "questions": files.sha256_json([[one.id, one.question, one.gold] for one in questions]),
        "seed": pipeline.config.sampling.seed,
        **identity(pipeline),
    }


def keep_drafts(file: Path, about: Mapping[str, Any], items: Sequence[CalibrationItem]) -> None:
    """Keep drafts in a journal."""
    Journal(file, about, lambda row, where: None, replace=True).append(asdict(item) for item in items)


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
    """One line: the scores compared, the one in use, its threshold and what is promised of it."""
    compared = ", ".join(
        f"{name} {'–' if found is None else f'{found:.3f}'}" for name, found in calibration.auroc.items()
    )
    text = (
        f"AUROC on {calibration.drafts} held-out drafts of {calibration.items} items: {compared}; "
        f"using {calibration.score}, threshold {calibration.threshold:.3f}"
    )
    return text if calibration.promise is None else f"{text}; {calibration.promise}"
