"""What MLX's CPU back end does slowly on Linux, asked for in another way. Nothing here runs on Metal.

Measured with mlx 0.32.4 on x86-64 (``bench/cpu.py`` prints it): ``mx.exp`` takes 2 to 2.6 times as long as
``mx.power`` with a constant base, ``mx.partition`` 1.8 to 3.5 times as long as NumPy's, a product with a bool twice as
long as one with a uint8.
``mx.fast.scaled_dot_product_attention`` takes its softmax by the slow exponential and computes it again for the
gradient. All rewrites compute the same values to float32 round-off.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def applies() -> bool:
    """True on Linux when MLX computes on the CPU."""
    return not sys.platform.startswith("darwin") and mx.default_device() == mx.Device(mx.cpu)


@mx.custom_function
def _power_exp(x: mx.array) -> mx.array:
    return mx.power(math.e, x)


@_power_exp.vjp
def _power_exp_vjp(primals: mx.array, cotangents: mx.array, outputs: mx.array) -> mx.array:
    # Left to itself, MLX multiplies by the logarithm of the base, taken again for every element.
    return cotangents * outputs


def exp(x: mx.array) -> mx.array:
    """e to the ``x``, elementwise, by the quicker of MLX's two ways."""
    if not applies():
        return mx.exp(x)
    found: Any = _power_exp(x)
    return found


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
    rest, start, found = np.array(values, copy=False), 0, []
    for place in places:
        rest = np.partition(rest, place - start)[..., place - start :]
        start = place
        found.append(rest[..., 0])
    return mx.array(np.stack(found, axis=-1))


def largest(values: mx.array, count: int) -> mx.array:
    """Indices (..., count) of the ``count`` largest entries (float32) along the last axis, in no order; see above."""
    place = values.shape[-1] - count
    if not applies():
        return mx.argpartition(values, place, axis=-1)[..., place:]
    return mx.array(np.argpartition(np.array(values, copy=False), place, axis=-1)[..., place:].astype(np.uint32))


@mx.custom_function
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + mx.power(math.e, -gate))


@_gated.vjp
def _gated_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    share = 1 / (1 + mx.power(math.e, -gate))
    silu = gate * share
    return cotangent * up * (share + silu * (1 - share)), cotangent * silu


@mx.custom_function
def _softmax(scores: mx.array) -> mx.array:
    powers = mx.power(math.e, scores - mx.max(scores, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@_softmax.vjp
def _softmax_vjp(scores: mx.array, cotangent: mx.array, shares: mx.array) -> mx.array:
    weighted = cotangent * shares
    return weighted - shares * weighted.sum(axis=-1, keepdims=True)


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
        scores = mx.where(mask, scores, -1e30) if mask.dtype == mx.bool_ else scores + mask
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


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)) with the exponential of :func:`exp`: 40 % of a layer's time otherwise."""

    def __call__(self, x: mx.array) -> mx.array:
        down: mx.array = self.down_proj(_gated(self.gate_proj(x), self.up_proj(x)))
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
