"""A draft, the one type for an attempt at a question: the drafter writes it, the verifier reads it, the loop decides.

It is frozen; each stage makes a new one with more of its fields filled, and ``state`` says which stage spoke last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

State = Literal["drafted", "accepted", "rejected"]

# What drafts: sampling, grafted chains (inference/grafting.py), or those once every sampled draft was rejected.
DRAFTS = ("sampled", "grafted", "mixed")
SAMPLED, GREEDY = "sampled", "greedy"
# The kinds of grafted drafts, in the order in which attempts take them; the greedy one has nothing replaced.
CHAINS = (GREEDY, "zero", "rand", "runit", "shuf", "bos", "avg", "prev")


@dataclass(frozen=True)
class Signals:
    """What one reading of a draft by the verifier gave; None for a part that was not asked for.

    ``yesno``: P(yes) / (P(yes) + P(no)). ``mean`` and ``minimum``: of the draft's token log-probabilities, in nats,
    ``verifier.EMPTY`` for a draft without any. ``tokens``: how many there are, the end-of-text token included if
    written. ``each``: where the verifier is a pool, what each of its adapters said.
    """

    yesno: float | None
    mean: float | None
    minimum: float | None
    tokens: int
    each: tuple[Signals, ...] = ()

    @property
    def mean_logprob(self) -> float | None:
        """exp(mean token log-probability), in [0, 1]: the literal reading of the paper's score."""
        return None if self.mean is None else math.exp(self.mean)


@dataclass(frozen=True)
class Draft:
    """One attempt at a question.

    ``attempt``: its number from 1; 0 for a given text. ``tokens``: ids without the end-of-text token. ``finished``: it
    ended by itself; False where the token limit cut it. ``text``: the tokens decoded, empty while nobody has asked.
    ``signals`` and ``score`` (in [0, 1]): what the verifier said; ``accepted``: whether the score reaches the
    threshold. The three are None until then. ``false_equation``: what it states and is not so; such a draft is rejected
    without a score, the verifier has not seen it. ``kind``: ``sampled``, or of which graft
    (:mod:`~mlx_rsgwm.inference.grafting`).
    """

    attempt: int
    tokens: tuple[int, ...]
    finished: bool
    text: str = ""
    signals: Signals | None = None
    score: float | None = None
    accepted: bool | None = None
    false_equation: str | None = None
    kind: str = SAMPLED

    @property
    def state(self) -> State:
        """``drafted`` once the drafter spoke, ``accepted`` or ``rejected`` once the verifier did."""
        if self.accepted is None:
            return "drafted"
        return "accepted" if self.accepted else "rejected"

    @property
    def content(self) -> tuple[tuple[int, ...], bool]:
        """What the verifier reads of it: drafts of equal content get equal scores."""
        return self.tokens, self.finished

    def scored(self, signals: Signals | None, score: float, accepted: bool) -> Draft:
        """The same draft after the verifier spoke."""
        return replace(self, signals=signals, score=score, accepted=accepted)

    def failed(self, false_equation: str) -> Draft:
        """The same draft after a check that it did not pass."""
        return replace(self, accepted=False, false_equation=false_equation)


@dataclass(frozen=True)
class Answer:
    """What is returned: the accepted draft, or the best-scored one marked as not accepted; no text if abstaining.

    ``false_equation``: what the returned draft states and is not so, where every draft failed the check; its score is
    then 0, the verifier has seen none. ``kind``: that of the draft.
    """

    text: str | None
    score: float
    accepted: bool
    attempts: int
    false_equation: str | None = None
    kind: str = SAMPLED


# A step of the loop. A Draft in state "drafted": the drafter spoke; in another: the verifier; the Answer ends it.
Step = Draft | Answer
