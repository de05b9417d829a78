"""The steps of role-specific gradient-weighted merging: quantiles, masks, importances on one scale (SPEC 8)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from mlx_rsgwm.cpu import ones_where, order_statistics

SCOPES = ("tensor", "factor", "module", "global")
NORMALISATIONS = ("norm", "mean", "none", "rank")

# The histogram of a pool-wide quantile in product space: a float's upper 20 bits below the sign, eight of exponent and
# twelve of fraction, so a bin is at most 2^-12 of its value wide.
BIN_BITS = 20


def quantile(values: mx.array, tau: float) -> mx.array:
    """The ``tau``-quantile of all entries, linearly interpolated as ``numpy.quantile`` does; a float32 scalar."""
    flat = values.astype(mx.float32).reshape(-1)
    position = tau * (flat.size - 1)
    low = int(position)
    if low + 1 == flat.size:
        return order_statistics(flat, low)[0]
    below, above = order_statistics(flat, low, low + 1)
    return below + (above - below) * (position - low)


@dataclass(frozen=True)
class Histogram:
    """Counts of non-negative float32 values by their leading bits: a quantile of more values than fit in memory."""

    counts: mx.array

    @classmethod
    def empty(cls) -> Histogram:
        return cls(mx.zeros((1 << BIN_BITS,), dtype=mx.int32))

    def add(self, values: mx.array) -> Histogram:
        """With the entries of ``values`` (≥ 0, any shape) counted in."""
        bins = (values.astype(mx.float32).reshape(-1).view(mx.uint32) >> (31 - BIN_BITS)).astype(mx.int32)
        return Histogram(self.counts.at[bins].add(1))

    def quantile(self, tau: float) -> mx.array:
        """The lower edge of the bin in which the ``tau``-quantile lies: at most 2^-12 of it too low."""
        below = mx.cumsum(self.counts)
        total = below[-1].astype(mx.float32)
        index = mx.argmax(below > tau * (total - 1))
        return (index.astype(mx.uint32) << (31 - BIN_BITS)).view(mx.float32)


def ranks(values: mx.array) -> mx.array:
    """Every entry's rank among all of them, in (0, 1]."""
    flat = values.reshape(-1)
    order = mx.argsort(mx.argsort(flat))
    return ((order + 1).astype(mx.float32) / flat.size).reshape(values.shape)


def mean_of(arrays: Iterable[mx.array]) -> mx.array:
    """Mean over the entries of all arrays, never 0."""
    total, count = mx.array(0.0), 0
    for array in arrays:
        total, count = total + array.sum(), count + array.size
    return mx.maximum(total / max(count, 1), 1e-30)


class MaskedMean:
    """Δ = Σ s ⊙ m ⊙ Δ_t / (Σ s ⊙ m + ε) over T tasks, entry by entry; 0 where no task keeps an entry.

    Tasks are added one by one, each array of the same shape: numerator, denominator and the number of tasks that keep
    an entry are the only state.
    """

    def __init__(self) -> None:
        self._numerator = self._denominator = self._keepers = mx.array(0.0)
        self._shares: list[mx.array] = []

    def add(self, delta: mx.array, importance: mx.array, mask: mx.array) -> None:
        """One task's Δ_t, s_t and m_t (bool)."""
        kept = ones_where(mask).astype(mx.float32)  # once: each product with booleans would convert them again
        weight = importance * kept
        self._numerator = self._numerator + weight * delta
        self._denominator = self._denominator + weight
        self._keepers = self._keepers + kept
        self._shares.append(kept.mean())
        del kept, weight  # named, they would be kept while the sums are evaluated
        mx.eval(self._numerator, self._denominator, self._keepers, self._shares[-1])

    def mean(self, epsilon: float) -> mx.array:
        """Δ, of the tasks' shape."""
        return self._numerator / (self._denominator + epsilon)

    def shares(self) -> mx.array:
        """(T,): the share of its entries that each task keeps."""
        return mx.stack(self._shares)

    def overlap(self) -> mx.array:
        """Share of the entries that any task keeps which all of them keep (for two the Jaccard index); a scalar."""
        return (self._keepers == len(self._shares)).sum() / mx.maximum((self._keepers > 0).sum(), 1)
