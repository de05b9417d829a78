"""What a pair's measures mean: a verdict for every module, one for the pair, and the words for them.

The tree and its thresholds are those of "From Diagnosis to Guarded Repair" and gradience (``merge/verdicts.py``). As
published in the text a large ratio of norms comes first, whatever the overlap; gradience 0.11 looks at it last, and at
the ratio of the largest singular values: ``Thresholds(by="magnitude_ratio", imbalance_first=False)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

SAFE, REDUNDANT, IMBALANCED, CONFLICTING = "safe", "redundant", "imbalanced", "conflicting"
SEVERITY = (SAFE, REDUNDANT, IMBALANCED, CONFLICTING)
# Confidence of the verdict that is left when no rule fires.
UNDECIDED = 0.5


class Measured(Protocol):
    """What a verdict looks at, of one module of two adapters."""

    @property
    def mean_overlap(self) -> float: ...
    @property
    def agreement(self) -> float: ...
    @property
    def magnitude_ratio(self) -> float: ...
    @property
    def frobenius_ratio(self) -> float: ...


@dataclass(frozen=True)
class Thresholds:
    """Where the tree branches.

    ``low``, ``high``: mean overlap of output subspaces; ``aligned``, ``opposed``: directional agreement; ``ratio``: of
    the norms, the larger over the smaller, by ``by``: frobenius_ratio or magnitude_ratio. ``imbalance_first``: a ratio
    above it decides before the overlap does.
    """

    low: float = 0.20
    high: float = 0.50
    aligned: float = 0.50
    opposed: float = -0.30
    ratio: float = 5.0
    by: str = "frobenius_ratio"
    imbalance_first: bool = True


PRESETS: Mapping[str, Thresholds] = MappingProxyType(
    {
        "post": Thresholds(),
        "later": Thresholds(high=0.45, ratio=3.0),
        "conservative": Thresholds(0.15, 0.35, 0.60, -0.20, 3.0),
        "permissive": Thresholds(0.30, 0.70, 0.40, -0.50, 10.0),
    }
)


@dataclass(frozen=True)
class Verdict:
    """``name`` of :data:`SEVERITY`, and how far the measures are from where it would change, in [0, 1]."""

    name: str
    confidence: float

    @property
    def risk(self) -> str:
        """low, medium or high."""
        if self.name == CONFLICTING or (self.name == IMBALANCED and self.confidence <= 0.5):
            return "high"
        return "low" if self.name == SAFE else "medium"


def verdict_of(pair: Measured, thresholds: Thresholds) -> Verdict:
    """The first branch of the tree that a module's measures take."""
    ratio = getattr(pair, thresholds.by)
    imbalanced = Verdict(IMBALANCED, _distance(ratio, thresholds.ratio)) if ratio > thresholds.ratio else None
    overlapping = pair.mean_overlap > thresholds.high
    if imbalanced and thresholds.imbalance_first and pair.mean_overlap < thresholds.high:
        return imbalanced
    if pair.mean_overlap < thresholds.low:
        return Verdict(SAFE, _distance(pair.mean_overlap, thresholds.low))
    if overlapping and pair.agreement > thresholds.aligned:
        return Verdict(REDUNDANT, _both(pair, thresholds, thresholds.aligned))
    if overlapping and pair.agreement < thresholds.opposed:
        return Verdict(CONFLICTING, _both(pair, thresholds, thresholds.opposed))
    return imbalanced or Verdict(SAFE, UNDECIDED)


def worst(verdicts: Sequence[str]) -> str:
    """The most severe of several verdicts' names."""
    return max(verdicts, key=SEVERITY.index, default=SAFE)


def _both(pair: Measured, thresholds: Thresholds, agreement: float) -> float:
    return min(_distance(pair.mean_overlap, thresholds.high), abs(pair.agreement - agreement))


def _distance(value: float, threshold: float) -> float:
    """How far a value is from a threshold, in thresholds, at most 1."""
    return min(abs(value - threshold) / threshold, 1.0)
