"""One rank and one scale for all modules, as mlx-lm has them, from PEFT's own rank and scale for each; and back.

A smaller rank is filled up with zeros, which change nothing and get no gradient. Another scale goes into ``lora_b``: by
a power of two without loss; by any other factor in float32, which narrower arrays come back from bit for bit. Where it
would not come back, the original is kept beside the adapter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.dtypes import DTYPES, NAMES, UNSIGNED


@dataclass(frozen=True)
class Update:
    """What PEFT trained for one module of mlx-lm: ``a`` and ``b`` in mlx-lm's layout, its own rank and scale.

    ``source`` is transformers' name of it. ``factor``: what mlx-lm multiplies the weight by when it loads the base, one
    number or one an output: the update is multiplied by it as well.
    """

    module: str
    source: str
    a: mx.array
    b: mx.array
    magnitude: mx.array | None
    rank: int
    scale: float
    factor: float | np.ndarray = 1.0

    @property
    def has_factor(self) -> bool:
        """Whether mlx-lm's weight is the checkpoint's times anything but 1."""
        return isinstance(self.factor, np.ndarray) or self.factor != 1.0


@dataclass(frozen=True)
class Folding:
    """How another scale went into a ``lora_b``: the dtype it had, the dtype it has, whether the original is kept."""

    dtype: str
    folded: str
    kept: bool


def common_scale(scales: Iterable[float]) -> float:
    """The most frequent scale, the first of several equally frequent ones."""
    return Counter(scales).most_common(1)[0][0]


def widen_rank(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """Factors (in, r) and (r, out), or experts' (experts, r, in) and (experts, out, r), with zeros up to ``rank``."""
    missing = rank - a.shape[1]
    if not missing:
        return a, b
    if a.ndim == 3:
        return mx.pad(a, [(0, 0), (0, missing), (0, 0)]), mx.pad(b, [(0, 0), (0, 0), (0, missing)])
    return mx.pad(a, [(0, 0), (0, missing)]), mx.pad(b, [(0, missing), (0, 0)])


def narrow_rank(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """The reverse of :func:`widen_rank`, on the same axes."""
    return (a[:, :rank], b[:, :, :rank]) if a.ndim == 3 else (a[:, :rank], b[:rank])


def filled_with_zeros(a: mx.array, b: mx.array, rank: int) -> bool:
    """Whether factors as of :func:`widen_rank` are zero beyond ``rank``, so that :func:`narrow_rank` loses nothing."""
    beyond_b = b[:, :, rank:] if b.ndim == 3 else b[rank:]
    return not (mx.any(a[:, rank:] != 0) | mx.any(beyond_b != 0)).item()


Ratio = float | np.ndarray | mx.array


def fold_scale(b: mx.array, ratio: Ratio, dtype: str) -> mx.array:
    """``b`` times ``ratio`` (one number, or one an output), computed and stored in ``dtype``."""
    return b.astype(DTYPES[dtype]) * mx.array(ratio, dtype=DTYPES[dtype])


def scaled_magnitude(magnitude: mx.array, factor: float | np.ndarray) -> mx.array:
    """DoRA's norms of a weight whose rows mlx-lm multiplies by ``factor``, in float32; a sign stays in the weight."""
    return magnitude.astype(mx.float32) * mx.abs(mx.array(factor, dtype=mx.float32))


def unfold(b: mx.array, ratio: float, dtype: str) -> mx.array:
    """The reverse of :func:`fold_scale`, of the same shape, rounded to ``dtype``."""
    return (b / mx.array(ratio, dtype=b.dtype)).astype(DTYPES[dtype])


def choose_folding(b: mx.array, ratio: float) -> Folding:
    """The narrowest way to fold ``ratio`` into ``b`` from which ``b`` comes back bit for bit; else it must be kept."""
    dtype = NAMES[b.dtype]
    power_of_two = math.frexp(abs(ratio))[0] == 0.5 and 2.0**-14 <= abs(ratio) <= 2.0**15
    for chosen in dict.fromkeys([dtype] if power_of_two else []) | {"float32": None}:
        if same_bits(unfold(fold_scale(b, ratio, chosen), ratio, dtype), b):
            return Folding(dtype, chosen, kept=False)
    return Folding(dtype, "float32", kept=True)


def same_bits(array: mx.array, other: mx.array) -> bool:
    """Whether two arrays have the same dtype, shape and bytes."""
    if array.dtype != other.dtype or array.shape != other.shape:
        return False
    width = UNSIGNED[array.itemsize]
    return bool(mx.array_equal(mx.contiguous(array).view(width), mx.contiguous(other).view(width)).item())
