"""What the draft–verify loop is asked, and the rule by which it decides.

The rule alone decides over scores, so an evaluation can apply another threshold to what was recorded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.data.arithmetic import first_false_equation
from mlx_rsgwm.inference.draft import CHAINS, DRAFTS, SAMPLED
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.scores import SCORES

MODES = ("adaptive", "parallel", "sequential")
# Which drafts are not accepted if they state a false equation: those whose answer is a number, all, or none.
CHECKS = ("auto", "arithmetic", "none")

MOST_ATTEMPTS = 10_000  # drafts of one question that are kept at once
# Two more rows in a batch cost a step about a tenth; another batch costs a draft. Alone is worth it from here on.
ALONE_FROM = 0.85


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop. ``attempts`` counts all drafts of a question, the first included.

    ``drafts``: one of ``DRAFTS``. ``grafted``: the attempts are the first of the eight kinds ``CHAINS``, in order, so
    there are at most eight. ``mixed``: ``attempts`` sampled drafts, and where all of them were rejected the eight
    grafted ones, so at most ``attempts`` + 8. ``layer``: the one that is grafted, from 0; None takes the one at three
    quarters.

    ``abstain``: when no draft is accepted the answer has no text, instead of the best-scored draft's. ``check``: one of
    ``CHECKS``; a draft that fails is not shown to the verifier, and returned only where every draft fails.
    """

    attempts: int = 3
    threshold: float = 0.7
    score: str = "mean_logprob"
    sampling: Sampling = field(default_factory=Sampling)
    mode: str = "adaptive"
    abstain: bool = False
    check: str = "none"
    drafts: str = SAMPLED
    layer: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.attempts <= MOST_ATTEMPTS:
            problems.append(f"attempts must be from 1 to {MOST_ATTEMPTS}, found {self.attempts}")
        if not 0 <= self.threshold <= 1:
            problems.append(f"threshold must be in [0, 1], found {self.threshold}")
        if self.score not in SCORES:
            problems.append(f"score must be one of {', '.join(SCORES)}, found {self.score!r}")
        if self.mode not in MODES:
            problems.append(f"mode must be one of {', '.join(MODES)}, found {self.mode!r}")
        if self.check not in CHECKS:
            problems.append(f"check must be one of {', '.join(CHECKS)}, found {self.check!r}")
        if self.drafts not in DRAFTS:
            problems.append(f"drafts must be one of {', '.join(DRAFTS)}, found {self.drafts!r}")
        if self.drafts == "grafted" and self.attempts > len(CHAINS):
            problems.append(f"attempts must be from 1 to {len(CHAINS)} with grafted drafts, found {self.attempts}")
        if self.layer is not None and (self.drafts == SAMPLED or self.layer < 0):
            problems.append(f"layer is from 0, and of drafts that are grafted or mixed; found {self.layer}")
        raise_problems("draft–verify loop", problems, RsgwmError)

    @property
    def samples(self) -> int:
        """The sampled drafts of a question, at most; they come before the grafted ones."""
        return 0 if self.drafts == "grafted" else self.attempts

    @property
    def most(self) -> int:
        """All drafts of a question, at most."""
        return self.attempts + len(CHAINS) if self.drafts == "mixed" else self.attempts

    def kinds(self, count: int) -> tuple[str, ...]:
        """The kinds of the first ``count`` drafts of a question.

        Raises:
            RsgwmError: so many there are not.
        """
        sampled = count if self.drafts == SAMPLED else self.samples
        kinds = ((SAMPLED,) * sampled + CHAINS)[:count]
        if len(kinds) < count:
            raise RsgwmError(f"{count} drafts of a question: there are {len(kinds)} that are {self.drafts}")
        return kinds


class Pacing:
    """Which attempts at a question are made side by side; in mode ``adaptive`` what became of first drafts decides.

    Counts of first drafts: accepted, and all; one of two to begin with.
    """

    def __init__(self) -> None:
        self._accepted, self._judged = 1, 2

    def first_judged(self, accepted: bool) -> None:
        """A first draft was judged."""
        self._accepted, self._judged = self._accepted + accepted, self._judged + 1

    def goes_alone(self, mode: str, attempt: int) -> bool:
        """Whether an attempt is written before the later ones are begun."""
        if mode != "adaptive" or attempt > 1:
            return mode == "sequential"
        return self._accepted >= ALONE_FROM * self._judged

    def next_kinds(self, config: LoopConfig, made: int) -> tuple[str, ...]:
        """The kinds of the drafts that a question gets next, side by side, after those ``made``; empty after the last.

        Grafted ones come once all sampled ones are made.
        """
        most = config.samples if made < config.samples else config.most
        last = made + 1 if self.goes_alone(config.mode, made + 1) else most
        return config.kinds(min(last, most))[made:]


@dataclass(frozen=True)
class Decision:
    """Outcome of the loop over scores in order: index of the draft returned, attempts used, accepted or not."""

    chosen: int
    attempts: int
    accepted: bool


@overload
def accepts(score: float, threshold: float) -> bool: ...
@overload
def accepts(score: np.ndarray, threshold: float) -> np.ndarray: ...
def accepts(score: float | np.ndarray, threshold: float) -> bool | np.ndarray:
    """Whether a draft of this score is accepted; of an array of scores (any shape), which ones (bool)."""
    return score >= threshold


def decide(scores: Sequence[float | None], threshold: float) -> Decision:
    """The first score at or above ``threshold`` wins; with none, the best one (the earliest of equals).

    None stands for a draft that failed a check: never accepted, and best only among its like.
    """
    for index, score in enumerate(scores):
        if score is not None and accepts(score, threshold):
            return Decision(index, index + 1, True)
    known = [-1.0 if score is None else score for score in scores]
    best = max(range(len(known)), key=lambda index: (known[index], -index))
    return Decision(best, len(scores), False)


def failed_check(text: str, question: str, check: str) -> str | None:
    """The false equation for which a draft is not accepted; None where it states none, or is not checked.

    Under ``auto`` a draft is checked that has a digit in its last line: whether the right answer is a number, nobody
    knows here (where it is known: ``evaluation/calculator_systems.py``).
    """
    if check == "none" or (check == "auto" and not has_digit_in_last_line(text)):
        return None
    return first_false_equation(text, question)


def has_digit_in_last_line(text: str) -> bool:
    """Whether a draft's last line has a digit."""
    lines = text.strip().splitlines()
    return bool(lines and re.search(r"\d", lines[-1]))
