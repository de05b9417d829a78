"""Products with weights, and attention, that are quicker on Linux's CPU than MLX's.

Elsewhere ``product`` is MLX's and nothing calls ``attention``. Measured with mlx 0.32.4 (``bench/cpu.py`` prints it):
BLIS 0.9, which the Makefile puts before OpenBLAS for the sake of decoding, takes 1.4 to 1.9 times as long for a product
of many rows as NumPy's own OpenBLAS, for it has no kernels of AVX-512 where it does not know the processor.
``mx.fast.scaled_dot_product_attention`` takes its softmax by a slow exponential and computes it again for the gradient;
a softmax of all scores at once goes through memory four times.

Threads of BLIS and of OpenBLAS spin for milliseconds after a product, where others could compute; so work that goes to
NumPy is shared among threads that sleep, each with a product of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.models.cpu_threads import numpys_openblas, on_all_cores, one_blas_thread
from mlx_rsgwm.models.linux_cpu import applies, by_rows, in_numpy, ones_where

ROWS = 64  # of a product: with fewer, as in a step of decoding, BLIS is as quick
TALL = 256  # rows from which OpenBLAS is quicker with the rows first, not the weight's


def product(x: mx.array, weight: mx.array) -> mx.array:
    """``x`` (…, in) times the transpose of ``weight`` (out, in): (…, out), by the quickest way there is here."""
    rows = x.size // max(1, x.shape[-1])
    if rows < ROWS or not in_numpy(x) or weight.dtype != mx.float32 or not applies() or numpys_openblas() is None:
        return x @ weight.T
    result: Any = _product(x, weight)
    return result


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> mx.array:
    left, right = np.array(x, copy=False).reshape(-1, x.shape[-1]), np.array(weight, copy=False)
    out = np.empty((len(left), len(right)), np.float32)

    def part(first: int, last: int) -> None:
        if len(left) < TALL:
            out[:, first:last] = (right[first:last] @ left.T).T
        else:
            np.matmul(left, right[first:last].T, out=out[:, first:last])

    with one_blas_thread():
        on_all_cores(part, len(right))
    return mx.array(out).reshape(*x.shape[:-1], len(right))


@_product.vjp
def _product_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    return cotangent @ weight, rows.T @ x.reshape(-1, x.shape[-1])


def _softmax_block(scores: np.ndarray, out: np.ndarray) -> None:
    np.subtract(scores, scores.max(axis=-1, keepdims=True), out=out)
    np.exp(out, out=out)
    out /= out.sum(axis=-1, keepdims=True)


@mx.custom_function
def _softmax(scores: mx.array) -> mx.array:
    if in_numpy(scores):
        return by_rows(_softmax_block, scores)
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
    if isinstance(mask, str):  # mlx-lm's only name: "causal", the queries being the last of the keys' positions
        mask = mx.tri(length, seen, seen - length, dtype=mx.bool_) if length > 1 else None
    masks = []
    if mask is not None:
        if mask.ndim > 2:
            mask = mx.expand_dims(mask, -3) if mask.shape[-3] == 1 else mx.unflatten(mask, -3, (groups, -1))
        masks = [_added(mask) if mask.dtype == mx.bool_ else mask]
    attend: Any = _attended_in_numpy if length > 1 and in_numpy(stacked) and numpys_openblas() else _attended
    attended: mx.array = attend(stacked, keys, values, *masks)
    return attended.reshape(batch, heads, length, values.shape[-1])


def _attended(queries: mx.array, keys: mx.array, values: mx.array, *masks: mx.array) -> mx.array:
    """Queries (batch, groups, heads of a group · length, size) of keys and values (batch, groups, seen, size); what is
    added to the scores broadcasts to (batch, groups, heads of a group, length, seen)."""
    scores = queries @ keys.swapaxes(-1, -2)
    if masks:
        by_head = scores.reshape(*scores.shape[:2], -1, masks[0].shape[-2], scores.shape[-1])
        scores = (by_head + masks[0]).reshape(scores.shape)
    shares: Any = _softmax(scores)
    attended: mx.array = shares @ values
    return attended


@mx.custom_function
def _attended_in_numpy(queries: mx.array, keys: mx.array, values: mx.array, *masks: mx.array) -> mx.array:
    """:func:`_attended`, the scores of a batch's row and a group at a time, which stay in a core's cache."""
    q, k, v = (np.array(array, copy=False) for array in (queries, keys, values))
    batch, groups, rows, seen = *q.shape[:3], k.shape[2]
    out = np.empty((*q.shape[:3], v.shape[-1]), np.float32)
    added = None
    if masks:
        length = masks[0].shape[-2]
        added = np.broadcast_to(np.array(masks[0], copy=False), (batch, groups, rows // length, length, seen))

    def part(first: int, last: int) -> None:
        for place in range(first, last):
            at = divmod(place, groups)
            scores = q[at] @ k[at].T
            if added is not None:
                by_head = scores.reshape(added.shape[2:])
                by_head += added[at]
            _softmax_block(scores, scores)
            np.matmul(scores, v[at], out=out[at])

    with one_blas_thread():
        on_all_cores(part, batch * groups)
    return mx.array(out)


@_attended_in_numpy.vjp
def _attended_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
    return mx.vjp(_attended, list(primals), [cotangent])[1]
