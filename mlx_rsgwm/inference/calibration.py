"""What a verifier's scores are worth: which to use, what its values mean, where the threshold is.

Stored beside the verifier as ``calibration.json``; ``inference/calibration_fit.py`` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import build
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.inference.draft import SAMPLED
from mlx_rsgwm.inference.policy import accepts
from mlx_rsgwm.inference.pool import pool_key
from mlx_rsgwm.inference.risk_control import RiskBound
from mlx_rsgwm.inference.scores import SCORES, Combination, Curve, Logistic, Scorer, learned_count
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import cache_folder

FILE = "calibration.json"
FORMAT = "mlx-rsgwm/calibration"
FORMAT_VERSION = 1
UNCALIBRATED_SCORE, UNCALIBRATED_THRESHOLD = "mean_logprob", 0.7  # the paper's own reading


class NothingToTellApart(RsgwmError):
    """Drafts that are all right or all wrong: no score can be calibrated on them."""


@dataclass(frozen=True)
class Reliability:
    """How far the score is from the share of right drafts, before and after calibration, on items not fitted on.

    ``ece``: expected calibration error over ten bins of equal width. ``brier``: mean squared distance.
    """

    ece_before: float
    ece_after: float
    brier_before: float
    brier_after: float


@dataclass(frozen=True)
class Calibration:
    """What held-out drafts said of a verifier.

    ``score`` was picked (or named); ``threshold`` is a value of it: the best balanced accuracy on the drafts, or what
    ``risk_bound`` holds for. ``combination`` makes the combined score, where there were drafts enough to fit it.
    ``curves`` give the probability of being right for each score. ``auroc`` is per score, on the drafter's own drafts
    (by cross-validation for what is fitted), None where one class is empty; ``perturbed_auroc`` on gold answers against
    perturbed ones, an easier question. ``made_for`` is what the figures depend on: base, template, adapters, sampling,
    attempts, kind of drafts. ``at_chance`` names what ``auto`` did not offer, for it told right from wrong no better
    than chance.
    ``row_hashes`` describes the questions (``data.row_hashes``), so that nothing is tested on them.
    ``learned``: of a pool that verifies by the rule of that name, the fit for each score.
    """

    score: str
    threshold: float
    combination: Combination | None
    curves: Mapping[str, Curve]
    auroc: Mapping[str, float | None]
    perturbed_auroc: Mapping[str, float | None]
    reliability: Mapping[str, Reliability]
    items: int
    drafts: int
    correct: int
    made_for: Mapping[str, Any] = field(default_factory=dict)
    risk_bound: RiskBound | None = None
    row_hashes: Mapping[str, Any] = field(default_factory=dict)
    at_chance: tuple[str, ...] = ()
    learned: Mapping[str, Logistic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        for name in (self.score, *self.curves, *self.learned):
            if name not in SCORES:
                problems.append(f"score must be one of {', '.join(SCORES)}, found {name!r}")
        if self.learned and self.score not in self.learned:
            problems.append(f"the score is {self.score}, which was not learned")
        if self.score == "combined" and self.combination is None and not self.learned:
            problems.append("the score is combined, but there is no combination")
        if not 0 <= self.threshold <= 1:
            problems.append(f"threshold must be in [0, 1], found {self.threshold}")
        if not 0 <= self.correct <= self.drafts or self.items < 0:
            problems.append(f"{self.correct} right of {self.drafts} drafts of {self.items} items cannot be")
        problems += [
            f"auroc of {name} must be in [0, 1], found {value}"
            for name, value in (*self.auroc.items(), *self.perturbed_auroc.items())
            if value is not None and not 0 <= value <= 1
        ]
        if self.risk_bound is not None and self.risk_bound.threshold != self.threshold:
            problems.append(f"the risk bound is for {self.risk_bound.threshold}, not for threshold {self.threshold}")
        raise_problems("calibration", problems, RsgwmError)

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that can be given."""
        if self.learned:
            return tuple(name for name in SCORES if name in self.learned)
        return tuple(name for name in SCORES if name != "combined" or self.combination is not None)

    def scorer(self, name: str) -> Scorer:
        """The scorer of a score by name."""
        if self.learned:
            if name not in self.learned:
                raise RsgwmError(f"score {name} was not learned; there are {', '.join(self.scores)}")
            return Scorer(name, learned=self.learned[name])
        return Scorer(name, self.combination if name == "combined" else None)

    def probability(self, name: str, value: float) -> float | None:
        """The probability that a draft is right whose score ``name`` has this value; None if that was not fitted."""
        curve = self.curves.get(name)
        return None if curve is None else float(curve.probabilities([value])[0])

    def to_dict(self) -> dict[str, Any]:
        """What ``calibration.json`` holds, without its format; a learned rule only where there is one."""
        described = asdict(self)
        if not self.learned:
            del described["learned"]
        return described

    def require_both_classes(self, verifier: str) -> None:
        """Raise when it was fitted on drafts that were all right or all wrong: it cannot tell one from the other."""
        if self.correct in (0, self.drafts):
            raise RsgwmError(
                f"the calibration of {verifier} was fitted on {self.drafts} drafts of which "
                f"{'all' if self.correct else 'none'} were right, so its score and threshold say nothing; calibrate "
                "again with other questions (rsgwm calibrate), or give --score and --threshold"
            )

    @property
    def recorded(self) -> dict[str, Any]:
        """``made_for``, in which earlier versions said nothing of the kind of drafts: there was but one."""
        return {"drafts": SAMPLED, **self.made_for} if self.made_for else {}

    def differences(self, made_for: Mapping[str, Any]) -> list[str]:
        """What is no longer as it was when this was measured, by name."""
        return [name for name, value in self.recorded.items() if name in made_for and made_for[name] != value]


def best_threshold(scores: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray) -> float:
    """The score at which accepting has the best balanced accuracy (Youden's index), the lowest of equals.

    ``scores`` (n,) float and ``correct`` (n,) bool.

    With only one class there is nothing to separate: 0 accepts everything when all are correct, else 1 is as strict as
    a threshold can be, and accepts a score of 1 alone.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=bool)
    if labels.all() or not labels.any():
        return 0.0 if labels.all() else 1.0
    candidates = np.unique(values)
    hits = [accepts(values[labels], t).mean() - accepts(values[~labels], t).mean() for t in candidates]
    return float(candidates[int(np.argmax(hits))])


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep it in the folder of the verifier it belongs to; see :func:`calibration_folder`."""
    make_folder(folder)
    files.write_json(folder / FILE, {"format": FORMAT, "format_version": FORMAT_VERSION, **calibration.to_dict()})


def calibration_folder(verifier: Sequence[Adapter], rule: str = "max") -> Path:
    """Where the calibration of a verifier is kept: its own folder; in our cache, by its content, if it has none.

    That of several adapters is in the cache, by their weights and the rule that combines them.
    """
    if len(verifier) > 1:
        return cache_folder() / "calibrations" / pool_key(verifier, rule)[:32]
    return verifier[0].own_folder or cache_folder() / "calibrations" / verifier[0].content_hash()[:32]


def stored_calibration(verifier: Sequence[Adapter], rule: str = "max") -> Calibration | None:
    """What was kept for a verifier, or None; also for the bare base. Raises as :func:`load_calibration`."""
    return load_calibration(calibration_folder(verifier, rule)) if verifier else None


def learned_scorer(name: str, calibration: Calibration | None, rule: str, adapters: int) -> Scorer:
    """The scorer of a pool whose rule, or whose calibration's, is ``learned``.

    Raises:
        RsgwmError: nothing was learned, or for another rule or another number of adapters.
    """
    if calibration is None or not calibration.learned:
        raise RsgwmError(
            "the learned rule has to be fitted first; calibrate the verifier with: rsgwm calibrate --combine learned"
        )
    if rule != "learned":
        raise RsgwmError(f"the calibration is of a pool whose rule is learned, not {rule}; calibrate again")
    scorer = calibration.scorer(name)
    if scorer.learned is not None and len(scorer.learned.means) != learned_count(name, adapters):
        raise RsgwmError(f"the calibration is not of a pool of {adapters} adapters; calibrate again")
    return scorer


def score_and_threshold(score: str, threshold: float | str, calibration: Calibration | None) -> tuple[str, float]:
    """The score and the threshold that were asked for: ``auto`` is by ``calibration``, without one as the paper has it.

    A calibration's threshold is of its own score; for another one ``auto`` is the paper's.
    """
    if score == "auto":
        score = calibration.score if calibration else UNCALIBRATED_SCORE
    if threshold != "auto":
        return score, float(threshold)
    matching = calibration is not None and calibration.score == score
    return score, calibration.threshold if calibration and matching else UNCALIBRATED_THRESHOLD


def load_calibration(folder: Path) -> Calibration | None:
    """What was kept beside a verifier, or None.

    Raises:
        RsgwmError: a file of another format or version, with unknown or missing fields, or values out of range.
    """
    path = folder / FILE
    if not files.is_present(path):
        return None
    value = files.read_json_object(path)
    if "format" not in value and "template_hash" in value:
        # What the first demo runs wrote: two scores, nothing fitted.
        del value["template_hash"]
        first: dict[str, Any] = {"combination": None, "curves": {}, "reliability": {}, "items": 0}
        value = {"format": FORMAT, "format_version": FORMAT_VERSION, **first, **value}
    if "promise" in value:  # the name of the risk bound in files of earlier versions
        value["risk_bound"] = value.pop("promise")
    stated = (value.pop("format", None), value.pop("format_version", None))
    if stated != (FORMAT, FORMAT_VERSION):
        raise RsgwmError(
            f"{path} is not a calibration of this version; calibrate the verifier again with: rsgwm calibrate"
        )
    try:
        return build(Calibration, value, str(path))
    except RsgwmError as error:
        raise RsgwmError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
