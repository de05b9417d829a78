"""Layers that take the quicker ways of a Linux CPU, in the place of those that a model was built of."""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rsgwm.models.linux_cpu import applies, gated
from mlx_rsgwm.models.linux_products import attention, product


class QuickLinear(nn.Linear):
    """``mlx.nn.Linear`` whose products of many rows take the quickest way."""

    def __call__(self, x: mx.array) -> mx.array:
        y = product(x, self.weight)
        return y + self.bias if "bias" in self else y


class QuickEmbedding(nn.Embedding):
    """``mlx.nn.Embedding`` that is as quick as the output head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (…, entries) of states ``x`` (…, dims)."""
        return product(x, self.weight)


QUICK: dict[type, type] = {nn.Linear: QuickLinear, nn.Embedding: QuickEmbedding}


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)) with the exponential of :func:`exp`: 40 % of a layer's time otherwise."""

    def __call__(self, x: mx.array) -> mx.array:
        down: mx.array = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return down


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


def quicken(model: nn.Module) -> None:
    """Let the model's layers take the quicker ways, in place; parameters and their names stay as they are.

    Only dense linear layers and embeddings are touched, SwiGLU blocks that consist of the three usual projections and
    call mlx-lm's ``swiglu``, and blocks that call mlx-lm's attention function. Off Linux's CPU nothing happens.
    """
    if not applies():
        return
    for module in model.modules():
        if quick := QUICK.get(type(module)):
            module.__class__ = quick
        elif _is_swiglu_block(module):
            module.__class__ = GatedMlp
        elif attending := _attending_here(module.__class__):
            module.__class__ = attending


def _is_swiglu_block(module: Any) -> bool:
    kind = type(module)
    if kind.__name__ != "MLP" or set(module.children()) != {"gate_proj", "down_proj", "up_proj"}:
        return False
    names = kind.__call__.__code__.co_names
    return "swiglu" in names and set(names) <= {"swiglu", "gate_proj", "down_proj", "up_proj"}
