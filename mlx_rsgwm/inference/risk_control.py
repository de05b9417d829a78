"""A threshold with a bound on its risk: of the answers it accepts, at most a given share is wrong.

The bound. Items are independent draws of one distribution; half of them (the test half) has decided nothing yet.
The rule is the loop's: of an item's K drafts in order, the first with score ≥ τ is accepted. Then, with probability at
least 1 − δ over the draw of the test half, P(wrong | accepted) ≤ α for the τ returned, or none is returned. It holds
for finitely many items, for any verifier and any K, for items of the same distribution, drafted in the same way by the
same adapters; it does not hold for other kinds of questions.

How. The unit is the item, since the drafts of one item depend on each other. For one fixed τ the accepted items of the
test half are wrong independently with probability P(wrong | accepted), so the Clopper–Pearson bound tests it exactly.
For many τ, fixed-sequence testing keeps the error at δ without dividing it: the order of the tests is fixed by the
other half (start where it looks safest, then loosen), and the first test that fails ends it (Angelopoulos et al. 2021,
"Learn then Test").
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import CheckFailed, RsgwmError, raise_problems
from mlx_rsgwm.inference.policy import accepts

STEPS = 40  # thresholds tried at most
REFUSED = -1.0  # the score of a draft that the loop accepts at no threshold


@dataclass(frozen=True)
class Target:
    """The risk to bound: at most ``far`` of the accepted answers wrong, with probability ``confidence`` (1 − δ)."""

    far: float
    confidence: float = 0.9

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be in (0, 1), found {value}"
            for name, value in (("the false-accept rate to bound", self.far), ("confidence", self.confidence))
            if not 0 < value < 1
        ]
        raise_problems("risk bound", problems, RsgwmError)


@dataclass(frozen=True)
class RiskBound:
    """A threshold and the bound on its risk; ``accepted`` and ``wrong`` count items of the test half.

    ``bound`` is the upper Clopper–Pearson bound on P(wrong | accepted) at ``threshold``; at most ``far``. ``check`` is
    what the drafts were checked for before, as in :class:`~mlx_rsgwm.inference.policy.LoopConfig`.
    """

    threshold: float
    far: float
    confidence: float
    attempts: int
    items: int
    accepted: int
    wrong: int
    bound: float
    check: str = "none"

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.threshold <= 1:
            problems.append(f"threshold must be in [0, 1], found {self.threshold}")
        if not 0 <= self.wrong <= self.accepted <= self.items:
            problems.append(f"{self.wrong} wrong of {self.accepted} accepted of {self.items} items cannot be")
        if not 0 < self.bound <= self.far < 1:
            problems.append(f"a bound of {self.bound} does not hold the target of {self.far}")
        if not 0 < self.confidence < 1 or self.attempts < 1:
            problems.append(f"confidence {self.confidence} after {self.attempts} attempts cannot be")
        raise_problems("risk bound", problems, RsgwmError)

    def to_dict(self) -> dict[str, Any]:
        """JSON values by field."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"at most {self.far:.0%} of what is accepted is wrong, with confidence {self.confidence:.0%} "
            f"({self.wrong} of {self.accepted} accepted items were, bound {self.bound:.3f})"
        )


@dataclass(frozen=True)
class Items:
    """Scores (items, K) float64 and labels (items, K) bool of K drafts for each item, in the order they were made.

    A draft of score ``REFUSED`` is accepted at no threshold.
    """

    scores: np.ndarray
    correct: np.ndarray

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape != self.correct.shape:
            raise ValueError(f"scores {self.scores.shape} and labels {self.correct.shape} must be (items, attempts)")

    def counts(self, threshold: float) -> tuple[int, int]:
        """How many items the loop accepts at ``threshold``, and how many of these with a wrong answer."""
        if not self.scores.size:
            return 0, 0
        reaching = accepts(self.scores, threshold)
        accepted = reaching.any(axis=1)
        right = self.correct[np.arange(len(reaching)), reaching.argmax(axis=1)]
        return int(accepted.sum()), int((accepted & ~right).sum())


def upper_bound(wrong: int, accepted: int, confidence: float) -> float:
    """One-sided Clopper–Pearson: the p at which ``wrong`` or fewer of ``accepted`` has probability 1 − confidence."""
    from scipy.stats import beta

    return 1.0 if wrong >= accepted else float(beta.ppf(confidence, wrong + 1, accepted - wrong))


def accepts_needed(far: float, confidence: float) -> int:
    """Fewest accepted items, none of them wrong, that hold the bound: ⌈ln δ / ln(1 − α)⌉."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - far) - 1e-12)


def sequence(ordering: Items, target: Target) -> list[float]:
    """Thresholds in the order of their tests: where ``ordering`` looks safest first, then ever looser ones.

    The candidates are the best score of every item, thinned to ``STEPS``. Safest is the least probability of so few
    wrong answers, were P(wrong | accepted) = α.
    """
    from scipy.stats import binom

    best = np.unique(ordering.scores.max(axis=1))[::-1] if ordering.scores.size else np.array([])
    best = best[best > REFUSED]
    if not len(best):
        return []
    chosen = best[np.unique(np.linspace(0, len(best) - 1, STEPS).round().astype(int))]
    accepted, wrong = np.array([ordering.counts(threshold) for threshold in chosen]).T
    surprise = binom.cdf(wrong, accepted, target.far)
    return [float(threshold) for threshold in chosen[int(np.argmin(surprise)) :]]


def risk_bound(ordering: Items, test: Items, target: Target) -> RiskBound:
    """The loosest threshold that holds the bound, by the rule of this module.

    Args:
        ordering: items that may have decided anything else (score, calibration); they fix the order of the tests.
        test: items that have decided nothing.

    Raises:
        CheckFailed: no threshold holds it; says what was seen and how many items it would take.
    """
    passing: RiskBound | None = None
    for threshold in sequence(ordering, target):
        accepted, wrong = test.counts(threshold)
        bound = upper_bound(wrong, accepted, target.confidence)
        if bound > target.far:
            break
        passing = RiskBound(
            threshold, target.far, target.confidence, test.scores.shape[1], len(test.scores), accepted, wrong, bound
        )
    if passing is None:
        raise CheckFailed(refusal(ordering, test, target))
    return passing


def refusal(ordering: Items, test: Items, target: Target) -> str:
    """Why no threshold holds the bound, and what it would take."""
    least = accepts_needed(target.far, target.confidence)
    start = sequence(ordering, target)[:1]
    accepted, wrong = test.counts(start[0]) if start else (0, 0)
    text = (
        f"{len(test.scores)} test items cannot bound the false-accept rate by {target.far:g} with confidence "
        f"{target.confidence:g}: at the safest threshold {wrong} of {accepted} accepted items were wrong; even with "
        f"none wrong it takes {least} accepted ones"
    )
    together = [ordering.counts(start[0]), (accepted, wrong)] if start else [(0, 0)]
    all_accepted, all_wrong = (sum(counts) for counts in zip(*together, strict=True))
    items = len(ordering.scores) + len(test.scores)
    needed = _accepts_at(all_wrong, all_accepted, target) if all_accepted else None
    if needed is None:
        return f"{text}. This verifier is not good enough for it; ask for a higher rate or train it further"
    # Half of the items is for testing.
    total = math.ceil(2 * needed * items / all_accepted)
    return f"{text}. At the rates seen it takes about {total} calibration items; ask for a higher rate or give more"


def _accepts_at(wrong: int, accepted: int, target: Target) -> int | None:
    """Accepted items needed if wrong ones stay as frequent as seen; None when they are too frequent for any number."""
    rate = wrong / accepted
    if rate >= 0.9 * target.far:
        return None
    count = accepts_needed(target.far, target.confidence)
    while upper_bound(math.ceil(rate * count), count, target.confidence) > target.far:
        count = math.ceil(1.1 * count)
    return count
