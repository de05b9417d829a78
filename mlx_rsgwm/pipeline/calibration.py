"""Which score to trust and where to put the threshold, decided on held-out drafts (SPEC 6.7, 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm import files
from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.pipeline.verifying import SCORES

FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """What held-out drafts said. ``auroc`` is per score, on the drafter's own drafts; None where one class is empty.

    ``perturbed_auroc`` is the same on gold answers against perturbed ones, an easier question. ``threshold`` is the
    value of ``score`` with the best balanced accuracy on the drafts.
    """

    score: str
    threshold: float
    auroc: Mapping[str, float | None]
    perturbed_auroc: Mapping[str, float | None]
    drafts: int
    correct: int
    template_hash: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "auroc": dict(self.auroc), "perturbed_auroc": dict(self.perturbed_auroc)}


def area_under_roc(scores: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray) -> float | None:
    """AUROC as Mann–Whitney U over the number of pairs, ties counted half; None when all or none are correct."""
    from scipy.stats import rankdata

    positive = np.asarray(correct, dtype=bool)
    count = int(positive.sum())
    pairs = count * (len(positive) - count)
    if not pairs:
        return None
    rank_sum = float(rankdata(scores)[positive].sum())
    return (rank_sum - count * (count + 1) / 2) / pairs


def best_threshold(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """The score at which accepting has the best balanced accuracy (Youden's index), the lowest of equals.

    With only one class there is nothing to separate: everything is accepted when all are correct, else nothing is.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=bool)
    if labels.all() or not labels.any():
        return 0.0 if labels.all() else 1.0
    candidates = np.unique(values)
    hits = [(values[labels] >= t).mean() - (values[~labels] >= t).mean() for t in candidates]
    return float(candidates[int(np.argmax(hits))])


def fit(
    own: Mapping[str, Sequence[float]],
    correct: Sequence[bool],
    perturbed: Mapping[str, Sequence[float]],
    perturbed_correct: Sequence[bool],
    template_hash: str,
) -> Calibration:
    """Pick the score that separates the drafter's own right drafts from its wrong ones best.

    Where the drafts are all right or all wrong, gold against perturbed answers decide.
    """
    auroc = {name: area_under_roc(values, correct) for name, values in own.items()}
    easier = {name: area_under_roc(values, perturbed_correct) for name, values in perturbed.items()}

    def merit(name: str) -> float:
        for found in (auroc[name], easier.get(name)):
            if found is not None:
                return found
        return 0.5

    score = max(own, key=merit)
    return Calibration(
        score, best_threshold(own[score], correct), auroc, easier, len(correct), sum(correct), template_hash
    )


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep it beside the verifier it belongs to."""
    files.write_json(folder / FILE, calibration.to_dict())


def load_calibration(folder: Path) -> Calibration | None:
    """What was kept beside a verifier, or None."""
    path = folder / FILE
    if not path.is_file():
        return None
    value = files.read_json_object(path)
    try:
        calibration = Calibration(**value)
    except TypeError as error:
        raise RsgwmError(f"{path} is not a calibration: {error}") from None
    if calibration.score not in SCORES or not 0 <= calibration.threshold <= 1:
        raise RsgwmError(f"{path}: score {calibration.score!r} or threshold {calibration.threshold} out of range")
    return calibration
