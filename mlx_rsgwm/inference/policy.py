"""What the draft–verify loop is asked, and the rule by which it decides.

The rule alone decides over scores, so an evaluation can apply another threshold to what was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.inference.draft import Answer, Draft, Signals
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


def decide(scores: Sequence[float], threshold: float) -> Decision:
    """The first score at or above ``threshold`` wins; with none, the best one (the earliest of equals)."""
    for index, score in enumerate(scores):
        if score >= threshold:
            return Decision(index, index + 1, True)
    best = max(range(len(scores)), key=lambda index: (scores[index], -index))
    return Decision(best, len(scores), False)


class Trial:
    """A question under way: its drafts in order, of which the last may wait for the verifier.

    ``requested``: attempts that are being written side by side, where many questions are under way.
    """

    def __init__(self, config: LoopConfig, requested: int = 0) -> None:
        self._config = config
        self.requested = requested
        self.drafts: list[Draft] = []

    @property
    def waiting(self) -> bool:
        """Whether the last draft is to be scored."""
        return bool(self.drafts) and self.drafts[-1].state == "drafted"

    @property
    def over(self) -> bool:
        """Whether the last draft was accepted, or no further attempt is left."""
        return self.drafts[-1].state == "accepted" or len(self.drafts) == self._config.attempts

    def add(self, draft: Draft) -> Draft:
        """The drafter spoke."""
        self.drafts.append(draft)
        return draft

    def earlier_alike(self) -> Draft | None:
        """A scored draft of the same content as the last one, whose score holds for that, too."""
        return next((draft for draft in self.drafts[:-1] if draft.content == self.drafts[-1].content), None)

    def score(self, signals: Signals | None, score: float) -> Draft:
        """The verifier spoke of the last draft."""
        self.drafts[-1] = self.drafts[-1].scored(signals, score, self._config.threshold)
        return self.drafts[-1]

    def answer(self) -> Answer:
        """What the loop returns of the drafts so far, all scored."""
        scores = [draft.score for draft in self.drafts if draft.score is not None]
        decision = decide(scores, self._config.threshold)
        refused = self._config.abstain and not decision.accepted
        text = None if refused else self.drafts[decision.chosen].text
        return Answer(text, scores[decision.chosen], decision.accepted, decision.attempts)
