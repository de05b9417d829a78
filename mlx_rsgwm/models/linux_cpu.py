"""What MLX's CPU back end does slowly on Linux, asked for in another way where :func:`applies` says so.

Anywhere else ``exp``, ``order_statistics``, ``largest`` and ``cross_entropy`` are MLX's own and ``quicken`` changes
nothing; ``ones_where`` and ``Dropout`` are the same everywhere.

Measured with mlx 0.32.4 on x86-64 (``bench/cpu.py`` prints it): MLX's elementwise functions run on one thread and
take the exponential of one number at a time, so NumPy's vectorised one is several times as fast even on one thread,
and it runs on all of them here. ``mx.where`` with a bool mask takes ten times as long as adding a mask of numbers,
``mx.partition`` 1.8 to 3.5 times as long as NumPy's, a product with a bool twice as long as one with a uint8.
``mx.fast.scaled_dot_product_attention`` takes its softmax by the slow exponential and computes it again for the
gradient. All rewrites compute the same values to float32 round-off.

NumPy needs values, so large arrays are evaluated where they are met; small ones (decoding) stay in MLX's lazy graph.
So does everything inside :func:`lazily`: while gradients are taken, what is evaluated on the way is kept until the
backward pass is over, three times the memory of a lazy graph.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np


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


def _in_numpy(x: mx.array) -> bool:
    """Whether NumPy is worth the round trip for ``x``."""
    return x.dtype == mx.float32 and x.size >= SMALL and not _LAZY.get()


@mx.custom_function
def _exp(x: mx.array) -> mx.array:
    if not _in_numpy(x):
        return mx.power(math.e, x)
    return _by_rows(lambda block, out: np.exp(block, out=out), x)


@_exp.vjp
def _exp_vjp(primals: mx.array, cotangents: mx.array, outputs: mx.array) -> mx.array:
    return cotangents * outputs


@cache
def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores() - 1))  # the caller is one more


def _by_rows(work: Callable[..., Any], *arrays: mx.array) -> mx.array:
    """``work(*blocks, out)`` on blocks of rows (all axes but the last) of arrays of one shape, on all cores."""
    width = arrays[0].shape[-1]
    views = [np.array(array, copy=False).reshape(-1, width) for array in arrays]
    out = np.empty(views[0].shape, np.float32)
    step = max(1, BLOCK // max(1, width))
    share = max(step if len(out) <= step else 1, -(-len(out) // cores()))

    def part(first: int) -> None:
        for start in range(first, min(first + share, len(out)), step):
            rows = slice(start, min(start + step, first + share))
            work(*(view[rows] for view in views), out[rows])

    others = [_threads().submit(part, first) for first in range(share, len(out), share)]
    part(0)
    for other in others:
        other.result()
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


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """NumPy's own OpenBLAS on one thread inside: more would spin beside a merge that has the other cores."""
    library = _numpys_openblas()
    if library is None:
        yield
        return
    before = library.scipy_openblas_get_num_threads64_()
    library.scipy_openblas_set_num_threads64_(1)
    try:
        yield
    finally:
        library.scipy_openblas_set_num_threads64_(before)


@cache
def _numpys_openblas() -> ctypes.CDLL | None:
    """The OpenBLAS inside NumPy's Linux wheel; None where NumPy has another BLAS."""
    for path in Path(np.__file__).parent.with_name("numpy.libs").glob("libscipy_openblas64_*.so"):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "scipy_openblas_set_num_threads64_"):
            return library
    return None


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
    return _by_rows(_gated_block, gate, up)


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
    product: mx.array = alone(gate, up) if _in_numpy(gate) else with_share(gate, up)[0]
    return product


def _softmax_block(scores: np.ndarray, out: np.ndarray) -> None:
    np.subtract(scores, scores.max(axis=-1, keepdims=True), out=out)
    np.exp(out, out=out)
    out /= out.sum(axis=-1, keepdims=True)


@mx.custom_function
def _softmax(scores: mx.array) -> mx.array:
    if _in_numpy(scores):
        return _by_rows(_softmax_block, scores)
    powers = mx.power(math.e, scores - mx.max(scores, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@_softmax.vjp
def _softmax_vjp(scores: mx.array, cotangent: mx.array, shares: mx.array) -> mx.array:
    weighted = cotangent * shares
    return weighted - shares * weighted.sum(axis=-1, keepdims=True)


def _added(mask: mx.array) -> mx.array:
    """A bool mask as numbers to add: 0 where it is true, −1e30 elsewhere."""
    return (ones_where(mask).astype(mx.float32) - 1) * 1e30


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale · Q Kᵀ + mask) V: queries (batch, heads, length, size), keys, values (batch, groups, seen, size).

    Takes the place, and the arguments, of mlx-lm's ``scaled_dot_product_attention``; what is not plain float32 is
    handed on to it. The heads that share keys are multiplied together.
    """
    if queries.dtype != mx.float32 or sinks is not None or hasattr(cache, "bits"):
        from mlx_lm.models.base import scaled_dot_product_attention

        inputs: Any = (queries, keys, values, cache, scale, mask, sinks)
        handed_on: mx.array = scaled_dot_product_attention(*inputs)
        return handed_on
    batch, heads, length, size = queries.shape
    groups, seen = keys.shape[1], keys.shape[2]
    stacked = (queries * scale).reshape(batch, groups, -1, size)
    scores = (stacked @ keys.swapaxes(-1, -2)).reshape(batch, groups, heads // groups, length, seen)
    if isinstance(mask, str):  # mlx-lm's only name: "causal", the queries being the last of the keys' positions
        mask = mx.tri(length, seen, seen - length, dtype=mx.bool_) if length > 1 else None
    if mask is not None:
        if mask.ndim > 2:
            mask = mx.expand_dims(mask, -3) if mask.shape[-3] == 1 else mx.unflatten(mask, -3, (groups, -1))
        scores = scores + (_added(mask) if mask.dtype == mx.bool_ else mask)
    shares: Any = _softmax(scores)
    return (shares.reshape(batch, groups, -1, seen) @ values).reshape(batch, heads, length, values.shape[-1])


@cache
def _attending_here(kind: type) -> type | None:
    """``kind`` with its calls of mlx-lm's attention function going to :func:`attention`; None when it makes none."""
    call = kind.__call__
    name = "scaled_dot_product_attention"
    if not isinstance(call, FunctionType) or name not in call.__code__.co_names:
        return None
    if getattr(call.__globals__.get(name), "__module__", "") != "mlx_lm.models.base":
        return None
    redirected = FunctionType(
        call.__code__, {**call.__globals__, name: attention}, call.__name__, call.__defaults__, call.__closure__
    )
    redirected.__kwdefaults__ = call.__kwdefaults__
    return type(kind.__name__, (kind,), {"__call__": redirected})


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


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)) with the exponential of :func:`exp`: 40 % of a layer's time otherwise."""

    def __call__(self, x: mx.array) -> mx.array:
        down: mx.array = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return down


def quicken(model: nn.Module) -> None:
    """Let the model's layers take the quicker ways, in place; parameters and their names stay as they are.

    Only SwiGLU blocks are touched that consist of the three usual projections and call mlx-lm's
    ``swiglu``, and blocks that call mlx-lm's attention function. Off Linux's CPU nothing happens.
    """
    if not applies():
        return
    for module in model.modules():
        if _is_swiglu_block(module):
            module.__class__ = GatedMlp
        elif attending := _attending_here(module.__class__):
            module.__class__ = attending


def _is_swiglu_block(module: Any) -> bool:
    kind = type(module)
    if kind.__name__ != "MLP" or set(module.children()) != {"gate_proj", "down_proj", "up_proj"}:
        return False
    names = kind.__call__.__code__.co_names
    return "swiglu" in names and set(names) <= {"swiglu", "gate_proj", "down_proj", "up_proj"}
