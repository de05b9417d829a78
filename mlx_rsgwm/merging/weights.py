"""Weights of adapters as a merge uses them: what they come to when they cancel, or are far from 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

# Weights whose sum is below this share of the sum of their sizes have no mean: .1 + .2 - .3 is 6e-17, not 0.
CANCELLING = 1e-6
# Weights of a mean in these bounds are used as they are; others are first divided by the largest.
ORDINARY = (1e-6, 1e6)
# Coefficients beyond this overflow float32 in products with weights.
LARGEST_WEIGHT = 1e30


def cancel(weights: Sequence[float]) -> bool:
    """True when the weights sum to zero but for rounding, so that nothing can be divided by their sum."""
    return abs(math.fsum(weights)) <= CANCELLING * math.fsum(map(abs, weights))


def brought_near_one(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights of a mean, in which only their ratios count, at a size that float32 and its products hold."""
    largest = max(map(abs, weights))
    if largest == 0 or ORDINARY[0] <= largest <= ORDINARY[1]:
        return tuple(weights)
    return tuple(weight / largest for weight in weights)


def shares(weights: Sequence[float]) -> mx.array:
    """w_t / Σ w, (T,) float32. Weights of both signs may cancel, so theirs are summed in float64."""
    if min(weights) >= 0:
        given = mx.array(list(weights))
        return given / given.sum()
    total = math.fsum(weights)
    return mx.array([weight / total for weight in weights])
