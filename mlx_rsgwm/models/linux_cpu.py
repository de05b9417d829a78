"""What MLX's CPU back end does slowly on Linux, asked for in another way where :func:`applies` says so.

Anywhere else ``exp``, ``order_statistics``, ``largest`` and ``cross_entropy`` are MLX's own; ``ones_where`` and
``Dropout`` are the same everywhere. Products are in :mod:`~mlx_rsgwm.models.linux_products`; which layers take what,
:mod:`~mlx_rsgwm.models.quicken` settles.

Measured with mlx 0.32.4 on x86-64 (``bench/cpu.py`` prints it): MLX's elementwise functions run on one thread and
take the exponential of one number at a time, so NumPy's vectorised one is several times as fast even on one thread,
and it runs on all of them here. ``mx.where`` with a bool mask takes ten times as long as adding a mask of numbers,
``mx.partition`` 1.8 to 3.5 times as long as NumPy's, a product with a bool twice as long as one with a uint8.
All rewrites compute the same values to float32 round-off.

NumPy needs values, so large arrays are evaluated where they are met; small ones (decoding) stay in MLX's lazy graph.
So does everything inside :func:`lazily`: while gradients are taken, what is evaluated on the way is kept until the
backward pass is over, three times the memory of a lazy graph.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_rsgwm.models.cpu_threads import on_all_cores


def applies() -> bool:
    """True on Linux when MLX computes on the CPU."""
    return not sys.platform.startswith("darwin") and mx.default_device() == mx.Device(mx.cpu)


_LAZY = ContextVar("lazy", default=False)
SMALL = 2**14  # elements: below, a round trip to NumPy costs more than it saves
BLOCK = 2**16  # elements that one thread works on at a time: 256 KiB, which stay in its cache


def exp(x: mx.array) -> mx.array:
    """e to the ``x`` (float32), elementwise, by the quickest way there is here."""
    if not applies():
        return mx.exp(x)
    result: Any = _exp(x)
    return result


@contextmanager
def lazily() -> Iterator[None]:
    """Leave every array of this block unevaluated, as wanted where gradients are taken."""
    token = _LAZY.set(True)
    try:
        yield
    finally:
        _LAZY.reset(token)


def in_numpy(x: mx.array) -> bool:
    """Whether NumPy is worth the round trip for ``x``."""
    return x.dtype == mx.float32 and x.size >= SMALL and not _LAZY.get()


@mx.custom_function
def _exp(x: mx.array) -> mx.array:
    if not in_numpy(x):
        return mx.power(math.e, x)
    return by_rows(lambda block, out: np.exp(block, out=out), x)


@_exp.vjp
def _exp_vjp(primals: mx.array, cotangents: mx.array, outputs: mx.array) -> mx.array:
    return cotangents * outputs


def by_rows(work: Callable[..., Any], *arrays: mx.array) -> mx.array:
    """``work(*blocks, out)`` on blocks of rows (all axes but the last) of arrays of one shape, on all cores."""
    width = arrays[0].shape[-1]
    views = [np.array(array, copy=False).reshape(-1, width) for array in arrays]
    out = np.empty(views[0].shape, np.float32)
    step = max(1, BLOCK // max(1, width))

    def part(first: int, last: int) -> None:
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            work(*(view[rows] for view in views), out[rows])

    on_all_cores(part, len(out), step if len(out) <= step else 1)
    return mx.array(out).reshape(arrays[0].shape)


def ones_where(mask: mx.array) -> mx.array:
    """1 where ``mask`` (any shape) is true, else 0; uint8, which becomes float32 in half the time of a bool."""
    return mask.astype(mx.bool_).view(mx.uint8)


def order_statistics(values: mx.array, *places: int) -> mx.array:
    """What sorting ``values`` (float32) along the last axis puts at the ascending ``places``: (..., number of places).

    NumPy's introselect is quicker than ``mx.partition`` on Linux's CPU, and reads the array where it is.
    """
    if not applies():  # Metal sorts for a partition too
        ordered = mx.partition(values, places[0]) if len(places) == 1 else mx.sort(values)
        return ordered[..., list(places)]
    rest, start, picked = np.array(values, copy=False), 0, []
    for place in places:
        rest = np.partition(rest, place - start)[..., place - start :]
        start = place
        picked.append(rest[..., 0])
    return mx.array(np.stack(picked, axis=-1))


def largest(values: mx.array, count: int) -> mx.array:
    """Indices (..., count) of the ``count`` largest entries (float32) along the last axis, in no order; see above."""
    place = values.shape[-1] - count
    if not applies():
        return mx.argpartition(values, place, axis=-1)[..., place:]
    return mx.array(np.argpartition(np.array(values, copy=False), place, axis=-1)[..., place:].astype(np.uint32))


def _gated_block(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """gate / (1 + exp(-gate)) · up; where the exponential overflows to infinity the quotient is 0, as it should be."""
    np.negative(gate, out=out)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    np.divide(gate, out, out=out)
    out *= up


@mx.custom_function
def _gated_in_numpy(gate: mx.array, up: mx.array) -> mx.array:
    return by_rows(_gated_block, gate, up)


@_gated_in_numpy.vjp
def _gated_in_numpy_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = primals
    return _gated_gradients(gate, up, 1 / (1 + mx.power(math.e, -gate)), cotangent)


@mx.custom_function
def _gated_and_share(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """silu(gate) · up, and the sigmoid of ``gate``, which the gradient takes up instead of computing it again.

    Both are evaluated together, so this is for where gradients are taken.
    """
    share = 1 / (1 + mx.power(math.e, -gate))
    return gate * up * share, share


@_gated_and_share.vjp
def _gated_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    return _gated_gradients(*primals, outputs[1], cotangents[0])


def _gated_gradients(gate: mx.array, up: mx.array, share: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    silu = gate * share
    return cotangent * up * (share + silu * (1 - share)), cotangent * silu


def gated(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, elementwise; both of one shape and dtype, and so is the product."""
    alone, with_share = cast("Callable[..., mx.array]", _gated_in_numpy), cast("Callable[..., Any]", _gated_and_share)
    product: mx.array = alone(gate, up) if in_numpy(gate) else with_share(gate, up)[0]
    return product


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """−log softmax(logits)[target] in nats: logits (n, vocabulary) float32, targets (n,), result (n,).

    As ``mlx.nn.losses.cross_entropy``; on Linux the exponentials of the vocabulary, most of its cost, go through
    :func:`exp`.
    """
    if not applies():
        return nn.losses.cross_entropy(logits, targets)
    shifted = logits - mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    picked = mx.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
    return mx.log(exp(shifted).sum(axis=-1)) - picked


class Dropout(nn.Module):
    """``mlx.nn.Dropout`` with its mask, scaled, as numbers: products with a bool take twice as long."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self._keep = 1 - p

    def __call__(self, x: mx.array) -> mx.array:
        if self._keep == 1 or not self.training:
            return x
        mask = ones_where(mx.random.bernoulli(self._keep, x.shape)).astype(x.dtype)
        return x * (mask * (1 / self._keep))
