"""Which entries of an update a method keeps, and how what is kept makes up for what is not.

Thresholds come by partitioning, and every entry whose magnitude equals the threshold is kept, so that a mask does not
depend on the order of the entries. (PEFT and mergekit keep an unspecified choice among equals.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from mlx_rsgwm.models.linux_cpu import ones_where, order_statistics

RESCALES = ("none", "density", "l1")

TINY = 1e-30
SINGLE_BITS = mx.array([[1 << place] for place in range(8)], dtype=mx.uint8)


def sparsified(
    delta: mx.array,
    how: str,
    key: mx.array,
    *,
    density: float,
    epsilon: float = 0.0,
    gamma: float = 0.0,
    rescale: str = "none",
    mask: mx.array | None = None,
) -> mx.array:
    """``delta`` (float32, any shape with two axes or more) with what ``how`` drops set to 0, the rest rescaled.

    ``how``: none, magnitude (TIES), bernoulli (DARE), della, breadcrumbs; at a ``density`` of 1 or more each of them
    keeps everything, as in mergekit. ``rescale``: none; density, dividing every entry by the probability with which it
    was kept, so that the expectation is ``delta`` (DARE and DELLA as published, PEFT); l1, by which the kept entries'
    sum of magnitudes becomes that of all of them (mergekit). ``mask`` takes the place of the mask drawn with ``key``.
    """
    if how == "none" or (density >= 1 and mask is None):
        return delta
    probability: float | mx.array = keep_probabilities(delta, density, epsilon) if how == "della" else density
    if mask is None:
        if how == "magnitude":
            mask = magnitude_mask(delta, density)
        elif how == "breadcrumbs":
            mask = breadcrumbs_mask(delta, density, gamma)
        elif how == "bernoulli":
            mask = drawn(density, delta.shape, key)
        else:
            mask = mx.random.bernoulli(probability, delta.shape, key=key)
    masked = delta * ones_where(mask)
    if rescale == "density":
        return masked / probability
    if rescale == "l1":
        return masked * (mx.abs(delta).sum() / mx.maximum(mx.abs(masked).sum(), TINY))
    return masked


def drawn(probability: float, shape: Sequence[int], key: mx.array) -> mx.array:
    """Independent draws, bool of ``shape``, true with ``probability`` in (0, 1).

    From one random bit each at one half, else from 8 or 16 where these come within 1e-4 of the probability: a
    seventh to half the time of ``mx.random.bernoulli`` on the CPU, whose 32 bits are most of a DARE merge.
    """
    size = math.prod(shape)
    if probability == 0.5:
        # A row for every bit of a byte: MLX's CPU takes three times as long over rows as short as these columns.
        return (_words(-(-size // 32), key).view(mx.uint8) & SINGLE_BITS != 0).reshape(-1)[:size].reshape(shape)
    for dtype in (mx.uint8, mx.uint16):
        values = 2 ** (8 * dtype.size)
        least = round(probability * values)
        if abs(least / values - probability) <= 1e-4 * probability and least < values:
            words = _words(-(-size * dtype.size // 4), key)
            return (words.view(dtype)[:size] < least).reshape(shape)
    return mx.random.bernoulli(probability, tuple(shape), key=key)


def _words(count: int, key: mx.array) -> mx.array:
    """At least ``count`` words of the generator as they come, uint32."""
    return mx.random.split(key, -(-count // 2)).reshape(-1)


def keep_count(size: int, density: float) -> int:
    """How many of ``size`` entries a density in (0, 1] keeps: int(density · size), but never none.

    mergekit's rule for magnitude pruning; PEFT keeps nothing where density · size is below 1.
    """
    return min(size, max(1, int(density * size)))


def magnitude_mask(delta: mx.array, density: float) -> mx.array:
    """The ``keep_count`` entries of largest magnitude, over the whole array; bool of ``delta``'s shape.

    The trimming step of TIES (Yadav et al., 2023); mergekit ``magnitude``.
    """
    magnitudes = mx.abs(delta)
    dropped = delta.size - keep_count(delta.size, density)
    return magnitudes >= order_statistics(magnitudes.reshape(-1), dropped)


def breadcrumbs_mask(delta: mx.array, density: float, gamma: float) -> mx.array:
    """The middle: without the share ``gamma`` of largest magnitudes, and of the rest the ``keep_count`` largest.

    Model Breadcrumbs (Davari and Belilovsky, 2023) as mergekit's ``magnitude_outliers`` puts it: where gamma and
    density pass 1 together, fewer outliers are dropped, never fewer entries kept. bool of ``delta``'s shape.
    """
    magnitudes = mx.abs(delta)
    count = keep_count(delta.size, density)
    bottom = max(0, delta.size - count - int(gamma * delta.size))
    lowest, highest = order_statistics(magnitudes.reshape(-1), bottom, bottom + count - 1)
    return (magnitudes >= lowest) & (magnitudes <= highest)


def keep_probabilities(delta: mx.array, density: float, epsilon: float) -> mx.array:
    """DELLA's probability of keeping an entry, linear in the rank of its magnitude among those of its output unit.

    From density − ε for the smallest to density + ε for the largest of a column of the (in, out) ``delta``; the columns
    are the rows of the (out, in) weights of papers and of mergekit's ``della_magprune``. A column of one entry has
    probability ``density`` (mergekit divides 0 by 0 there: a rank-1 factor). float32 of ``delta``'s shape.

    Source: Deep, Bhardwaj and Poria, 2024 (arXiv 2406.11617).
    """
    rows = delta.shape[-2]
    if rows == 1:
        return mx.full(delta.shape, density)
    # Ranks along the last axis of a transposed copy: sorting along a strided axis takes twice as long.
    order = mx.argsort(mx.contiguous(mx.abs(delta).swapaxes(-1, -2)), axis=-1)
    places = mx.broadcast_to(mx.arange(rows, dtype=mx.float32), order.shape)
    ranks = mx.put_along_axis(mx.zeros(order.shape), order, places, axis=-1).swapaxes(-1, -2)
    return (density - epsilon) + ranks * (2 * epsilon / (rows - 1))
