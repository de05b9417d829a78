"""What MLX's CPU back end does slowly on Linux, asked for in another way. Nothing here runs on Metal.

Measured with mlx 0.32.4 on x86-64 (``bench/cpu.py`` prints it): ``mx.exp`` takes 26 ns an element and ``mx.power``
with a constant base 7; a product of (rows, 1, in) with a shared matrix runs as one product per row unless the leading
axes are flattened. Both rewrites compute the same values to float32 round-off.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn


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


@mx.custom_function
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + mx.power(math.e, -gate))


@_gated.vjp
def _gated_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    share = 1 / (1 + mx.power(math.e, -gate))
    silu = gate * share
    return cotangent * up * (share + silu * (1 - share)), cotangent * silu


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


class FlatLinear(nn.Linear):
    """``nn.Linear`` that multiplies all rows of all leading axes at once."""

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = super().__call__(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class FlatEmbedding(nn.Embedding):
    """``nn.Embedding`` whose use as an output head is one product, as in :class:`FlatLinear`."""

    def as_linear(self, x: mx.array) -> mx.array:
        y: mx.array = super().as_linear(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)) with the exponential of :func:`exp`: 40 % of a layer's time otherwise."""

    def __call__(self, x: mx.array) -> mx.array:
        down: mx.array = self.down_proj(_gated(self.gate_proj(x), self.up_proj(x)))
        return down


def quicken(model: nn.Module) -> None:
    """Let the model's layers take the quicker ways, in place; parameters and their names stay as they are.

    Only plain layers are touched, and SwiGLU blocks that consist of the three usual projections and call mlx-lm's
    ``swiglu``. Off Linux's CPU nothing happens.
    """
    if not applies():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FlatLinear
        elif type(module) is nn.Embedding:
            module.__class__ = FlatEmbedding
        elif _is_swiglu_block(module):
            module.__class__ = GatedMlp


def _is_swiglu_block(module: Any) -> bool:
    kind = type(module)
    if kind.__name__ != "MLP" or set(module.children()) != {"gate_proj", "down_proj", "up_proj"}:
        return False
    names = kind.__call__.__code__.co_names
    return "swiglu" in names and set(names) <= {"swiglu", "gate_proj", "down_proj", "up_proj"}
