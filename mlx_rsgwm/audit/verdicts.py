"""What a pair's measures mean: a verdict for every module, one for the pair, and the words for them.

The tree and its thresholds are those of "From Diagnosis to Guarded Repair" and gradience (``merge/verdicts.py``). In
the text a large ratio of norms comes first unless the adapters overlap much; gradience 0.11 looks at it last, and at
the ratio of the largest singular values: ``Thresholds(by="magnitude_ratio", imbalance_first=False)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

SAFE, REDUNDANT, IMBALANCED, CONFLICTING = "safe", "redundant", "imbalanced", "conflicting"
SEVERITY = (SAFE, REDUNDANT, IMBALANCED, CONFLICTING)
# Confidence of the verdict that is left when no rule fires.
UNDECIDED = 0.5


@dataclass(frozen=True)
class Thresholds:
    """Where the tree branches.

    ``low``, ``high``: mean overlap of output subspaces; ``aligned``, ``opposed``: directional agreement; ``ratio``: of
    the norms, the larger over the smaller, by ``by``: frobenius_ratio or magnitude_ratio. ``imbalance_first``: a ratio
    above it decides before anything else where the overlap is not high.
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
        """low, medium or high; of an imbalance high where it is near its limit, so that a rebalance may be wrong."""
        if self.name == CONFLICTING or (self.name == IMBALANCED and self.confidence <= 0.5):
            return "high"
        return "low" if self.name == SAFE else "medium"


def verdict_of(overlap: float, agreement: float, ratios: Mapping[str, float], thresholds: Thresholds) -> Verdict:
    """The first branch of the tree that a module's measures take.

    Args:
        overlap: mean cosine of the principal angles, in [0, 1].
        agreement: directional, in [−1, 1].
        ratios: ``frobenius_ratio`` and ``magnitude_ratio``, each at least 1.
        thresholds: where the tree branches.
    """
    ratio = ratios[thresholds.by]
    imbalanced = Verdict(IMBALANCED, _distance(ratio, thresholds.ratio)) if ratio > thresholds.ratio else None
    if imbalanced and thresholds.imbalance_first and overlap < thresholds.high:
        return imbalanced
    if overlap < thresholds.low:
        return Verdict(SAFE, _distance(overlap, thresholds.low))
    for name, limit, beyond in (
        (REDUNDANT, thresholds.aligned, agreement > thresholds.aligned),
        (CONFLICTING, thresholds.opposed, agreement < thresholds.opposed),
    ):
        if overlap > thresholds.high and beyond:
            return Verdict(name, min(_distance(overlap, thresholds.high), abs(agreement - limit)))
    return imbalanced or Verdict(SAFE, UNDECIDED)


def worst(verdicts: Sequence[str]) -> str:
    """The most severe of several verdicts' names."""
    return max(verdicts, key=SEVERITY.index, default=SAFE)


def _distance(value: float, threshold: float) -> float:
    """How far a value is from a threshold, in thresholds, at most 1."""
    return min(abs(value - threshold) / threshold, 1.0)
