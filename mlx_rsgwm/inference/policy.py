"""What the draft–verify loop is asked, and the rule by which it decides.

The rule alone decides over scores, so an evaluation can apply another threshold to what was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.scores import SCORES

MODES = ("adaptive", "parallel", "sequential")


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop. ``attempts`` counts all drafts of a question, the first included.

    ``abstain``: when no draft is accepted the answer has no text, instead of the best-scored draft's.
    """

    attempts: int = 3
    threshold: float = 0.7
    score: str = "mean_logprob"
    sampling: Sampling = field(default_factory=Sampling)
    mode: str = "adaptive"
    abstain: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.attempts < 1:
            problems.append(f"attempts must be at least 1, found {self.attempts}")
        if not 0 <= self.threshold <= 1:
            problems.append(f"threshold must be in [0, 1], found {self.threshold}")
        if self.score not in SCORES:
            problems.append(f"score must be one of {', '.join(SCORES)}, found {self.score!r}")
        if self.mode not in MODES:
            problems.append(f"mode must be one of {', '.join(MODES)}, found {self.mode!r}")
        raise_problems("draft–verify loop", problems, RsgwmError)


@dataclass(frozen=True)
class Decision:
    """Outcome of the loop over scores in order: index of the draft returned, attempts used, accepted or not."""

    chosen: int
    attempts: int
    accepted: bool


def accepts(score: float, threshold: float) -> bool:
    """Whether a draft of this score is accepted."""
    return score >= threshold


def decide(scores: Sequence[float], threshold: float) -> Decision:
    """The first score at or above ``threshold`` wins; with none, the best one (the earliest of equals)."""
    for index, score in enumerate(scores):
        if accepts(score, threshold):
            return Decision(index, index + 1, True)
    best = max(range(len(scores)), key=lambda index: (scores[index], -index))
    return Decision(best, len(scores), False)
