"""Drafts of held-out questions with what the verifier said of them: what a calibration is fitted on.

Drafting is what costs, so the drafts can be kept in a file and fitted on again with other settings. The file is JSON
lines: a header that says what they depend on, then one item a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import build
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.json_lines import read_json_lines
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


def write_drafts(file: Path, header: Mapping[str, Any], items: Sequence[CalibrationItem]) -> None:
    """Keep drafts in a file."""
    make_folder(file.parent)
    lines = [json.dumps(header), *(json.dumps(asdict(item), ensure_ascii=False) for item in items)]
    files.write_text(file, "\n".join(lines) + "\n")


def read_drafts(file: Path, header: Mapping[str, Any], count: int) -> list[CalibrationItem]:
    """The ``count`` items of a file.

    Raises:
        RsgwmError: not such a file, or one that was made with anything else than ``header`` says.
    """
    rows = read_json_lines(file)
    for number, value in rows:
        if isinstance(value, ValueError):
            raise RsgwmError(f"{file} is not a file of held-out drafts: line {number}: {value}")
    if not rows or not isinstance(rows[0].value, dict) or rows[0].value.get("format") != FORMAT:
        raise RsgwmError(f"{file} is not a file of held-out drafts; give another name to write one")
    differing = [name for name, value in header.items() if rows[0].value.get(name) != value]
    if differing:
        raise RsgwmError(
            f"{file} was made with another {', '.join(differing)}; remove it or give another name to draft anew"
        )
    items = [build(CalibrationItem, value, f"{file} line {number}") for number, value in rows[1:]]
    if len(items) != count:
        raise RsgwmError(f"{file} holds {len(items)} of {count} items; remove it to draft anew")
    return items


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
