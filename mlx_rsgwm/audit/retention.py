"""What a merge keeps of what its sources can do: losses on rows that are new to them, beside each source's own.

A source alone scores 1 and the base 0, so that a merge that is worse than the base is below 0. Q_min and D of these
shares are judged as those of "From Diagnosis to Guarded Repair" (Study 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.audit.eligibility import ELIGIBLE, RESAMPLES, Eligibility, Measured, measure, nats_under, rows_of_each
from mlx_rsgwm.audit.outcomes import WORST_DOMINANCE, WORST_QUALITY, Outcome
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.evaluation.stats.bootstrap import percentile_interval, resampled
from mlx_rsgwm.inference.open import load_base_for, slots_of
from mlx_rsgwm.models.adapter import Adapter


@dataclass(frozen=True)
class Retention:
    """What a merge keeps of one source: ``share`` is (base − merged) / (base − alone), in nats a completion token.

    ``low`` and ``high``: its middle 95 % when rows are resampled, the same for all three. All three are None where the
    source alone is not clearly better than the base (:data:`~mlx_rsgwm.audit.eligibility.ELIGIBLE`): there is nothing
    to keep, and the quotient means nothing.
    """

    data: str
    base_nll: float
    alone_nll: float
    merged_nll: float
    share: float | None
    low: float | None
    high: float | None
    rows: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Behaviour:
    """A merge's retention of every source, in their order."""

    sources: tuple[Retention, ...]

    @property
    def quality(self) -> float | None:
        """Q_min: the least that is kept of a source that has something to keep; None where none has."""
        return min(self._known, default=None)

    @property
    def dominance(self) -> float | None:
        """D, of the two of them that differ most; None of fewer than two."""
        return Outcome(self._known).dominance if len(self._known) > 1 else None

    @property
    def _known(self) -> tuple[float, ...]:
        return tuple(source.share for source in self.sources if source.share is not None)

    @property
    def flags(self) -> list[str]:
        """``q_min`` below .95, ``dominance`` above .2."""
        quality, dominance = self.quality, self.dominance
        flags = {
            "q_min": quality is not None and quality < WORST_QUALITY,
            "dominance": dominance is not None and dominance > WORST_DOMINANCE,
        }
        return [name for name, holds in flags.items() if holds]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "sources": [source.to_dict() for source in self.sources],
            "q_min": self.quality,
            "dominance": self.dominance,
            "flags": self.flags,
        }


def retention(source: Measured, merged: np.ndarray, seed: int = DEFAULT_SEED) -> Retention:
    """What a merge with nats ``merged`` (rows,) on the source's rows keeps of it; 1000 resamples of rows."""
    base, alone, left_over = (source.mean(nats) for nats in (source.base, source.alone, merged))
    size = len(source.rows), int(source.tokens.sum())
    if source.eligibility(seed).verdict != ELIGIBLE:
        return Retention(source.data, base, alone, left_over, None, None, None, *size)
    gained, left = source.base - source.alone, source.base - merged

    def share(drawn: np.ndarray) -> float:
        return float(left[drawn].sum() / gained[drawn].sum())

    low, high = percentile_interval(resampled(share, len(merged), seed, RESAMPLES))
    return Retention(source.data, base, alone, left_over, share(np.arange(len(merged))), low, high, *size)


def judge_on_data(
    adapters: Sequence[Adapter],
    data: Sequence[str],
    count: int,
    merged: Adapter | None = None,
    base_name: str | None = None,
    seed: int = DEFAULT_SEED,
    progress: Progress = SILENT,
) -> tuple[list[Eligibility], Behaviour | None]:
    """Every adapter beside the base on up to ``count`` rows that are new to it, and what a merge of them keeps of each.

    Args:
        adapters: on one base, which is loaded.
        data: one name for all adapters, or one for each, as for :func:`~mlx_rsgwm.audit.eligibility.held_out_rows`.
        count: rows of each at most.
        merged: a merge of the adapters; None for none.
        base_name: the base; None for the one that the adapters record.
        seed: of the choice of rows and of resampling.
        progress: told of adapters.

    Raises:
        RsgwmError: more or fewer names than adapters, what cannot be read, too few new rows.
    """
    merges = [] if merged is None else [merged]
    base = load_base_for([*adapters, *merges], base_name, progress)
    chosen = rows_of_each(data, adapters, base, count, seed)
    sources = {str(index): adapter for index, adapter in enumerate(adapters)}
    slots = slots_of(base, {**sources, **({"merged": merged} if merged is not None else {})})
    measured, retained = [], []
    with progress.task("judge on data", len(adapters)) as advance:
        for slot, (name, rows, seen) in zip(sources, chosen, strict=True):
            measured.append(measure(slots, slot, rows, name, seen))
            if merged is not None:
                retained.append(retention(measured[-1], nats_under(slots, "merged", rows), seed))
            advance(1, "")
    return [each.eligibility(seed) for each in measured], Behaviour(tuple(retained)) if merged is not None else None
