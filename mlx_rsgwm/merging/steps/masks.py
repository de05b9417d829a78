"""The steps of role-specific gradient-weighted merging: quantiles, masks, importances on one scale."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlx_rsgwm.models.linux_cpu import ones_where, order_statistics

SCOPES = ("tensor", "factor", "module", "global")
NORMALISATIONS = ("norm", "mean", "none", "rank")

# The histogram of a pool-wide quantile in product space: a float's upper 20 bits below the sign, eight of exponent and
# twelve of fraction. The other bits, inside a bin.
BIN_BITS = 20
FINE_BITS = 31 - BIN_BITS


def quantile(values: mx.array, tau: float) -> mx.array:
    """The ``tau``-quantile of all entries, linearly interpolated as ``numpy.quantile`` does; a float32 scalar."""
    flat = values.astype(mx.float32).reshape(-1)
    position = tau * (flat.size - 1)
    low = int(position)
    if low + 1 == flat.size:
        return order_statistics(flat, low)[0]
    below, above = order_statistics(flat, low, low + 1)
    return below + (above - below) * (position - low)


class Histogram:
    """Counts of non-negative float32 values by their leading bits: a quantile of more values than fit in memory.

    The leading bits say in which bin a quantile lies; a second walk over the values counts the other bits inside it,
    and that is all there is to know of a float: the quantile is exact.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(1 << BIN_BITS, dtype=np.int64)  # a pool may have more entries than 32 bits count

    def add(self, values: mx.array) -> None:
        """Count in the entries of ``values`` (≥ 0, any shape)."""
        self._counts += _counted(_bits(values) >> FINE_BITS, 1 << BIN_BITS)

    def quantile(self, again: Iterable[mx.array], tau: float) -> mx.array:
        """The ``tau``-quantile of all values (scalar), as :func:`quantile` of them together; ``again`` are the same."""
        ends = np.cumsum(self._counts)
        position = tau * (int(ends[-1]) - 1)
        low = int(position)
        places = (low, min(low + 1, int(ends[-1]) - 1))
        bins = [int(np.searchsorted(ends, place, side="right")) for place in places]
        inside = {coarse: np.zeros(1 << FINE_BITS, dtype=np.int64) for coarse in bins}
        for values in again:
            bits = _bits(values)
            for coarse, counts in inside.items():
                outside = mx.array(1 << FINE_BITS, dtype=mx.uint32)
                fine = mx.where(bits >> FINE_BITS == coarse, bits & ((1 << FINE_BITS) - 1), outside)
                counts += _counted(fine, (1 << FINE_BITS) + 1)[:-1]
        below, above = (
            _value(
                coarse,
                int(
                    np.searchsorted(
                        np.cumsum(inside[coarse]), place - (ends[coarse - 1] if coarse else 0), side="right"
                    )
                ),
            )
            for place, coarse in zip(places, bins, strict=True)
        )
        return below + (above - below) * (position - low)


def _bits(values: mx.array) -> mx.array:
    return values.astype(mx.float32).reshape(-1).view(mx.uint32)


def _counted(places: mx.array, size: int) -> np.ndarray:
    counts = mx.zeros((size,), dtype=mx.int32).at[places.astype(mx.int32)].add(1)
    return np.array(counts)


def _value(leading: int, fine: int) -> mx.array:
    return mx.array(leading << FINE_BITS | fine, dtype=mx.uint32).view(mx.float32)


def ranks(values: mx.array) -> mx.array:
    """Every entry's rank among all of them, in (0, 1]: float32, of the values' shape."""
    flat = values.reshape(-1)
    order = mx.argsort(mx.argsort(flat))
    return ((order + 1).astype(mx.float32) / flat.size).reshape(values.shape)


def mean_entry(arrays: Iterable[mx.array]) -> mx.array:
    """Mean over the entries of all arrays, a scalar, never 0."""
    total, count = mx.array(0.0), 0
    for array in arrays:
        total, count = total + array.sum(), count + array.size
    return mean_of(total, count)


def mean_of(total: mx.array, count: int) -> mx.array:
    """A sum over ``count`` entries (scalar) as their mean, never 0."""
    return mx.maximum(total / max(count, 1), 1e-30)


class MaskedMean:
    """Δ = Σ s ⊙ m ⊙ Δ_t / (Σ s ⊙ m + ε) over T tasks, entry by entry; 0 where no task keeps an entry.

    Tasks are added one by one, each array of the same shape: numerator, denominator and the number of tasks that keep
    an entry are the only such arrays that are held, and of each task the share that it keeps.
    """

    def __init__(self) -> None:
        self._numerator = self._denominator = self._keepers = mx.array(0.0)
        self._shares: list[mx.array] = []

    def add(self, delta: mx.array, importance: mx.array, mask: mx.array) -> None:
        """One task's Δ_t, s_t and m_t (bool), all of one shape."""
        ones = ones_where(mask).astype(mx.float32)  # once: each product with booleans would convert them again
        weight = importance * ones
        self._numerator = self._numerator + weight * delta
        self._denominator = self._denominator + weight
        self._keepers = self._keepers + ones
        self._shares.append(ones.mean())
        del ones, weight  # named, they would be kept while the sums are evaluated
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
