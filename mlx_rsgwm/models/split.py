"""A model in parts: hidden states and output head, so that logits are computed where they are needed; lower and upper
layers, so that adapters share what lies below the first layer that any of them changes."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

Hidden = Callable[..., mx.array]
Head = Callable[[mx.array], mx.array]
Parts = tuple[Hidden, Head]


def split_head(model: nn.Module) -> Parts:
    """``(hidden, head)`` with ``head(hidden(ids, cache=...)) == model(ids, cache=...)``.

    For a vocabulary of 49k and a batch of which one token in four is trained, most of the head's work on whole
    sequences is thrown away. mlx-lm's models keep their trunk in ``model.model`` and either ``lm_head`` or tied
    embeddings, but some (soft-capped or scaled logits) do more in ``__call__``. So the split is tried on a few tokens,
    and where it would change the logits the whole model is the "hidden" part and the head is the identity.
    """

    def all_layers(ids: mx.array, cache: Any = None) -> mx.array:
        return model(ids, cache=cache)

    def identity(hidden: mx.array) -> mx.array:
        return hidden

    trunk = getattr(model, "model", None)
    if trunk is None or not hasattr(trunk, "embed_tokens"):
        return all_layers, identity

    def hidden(ids: mx.array, cache: Any = None) -> mx.array:
        return trunk(ids, cache=cache)

    # Looked up at each call: LoRA may replace the head or the embedding after the split.
    def head(states: mx.array) -> mx.array:
        return model.lm_head(states) if "lm_head" in model else trunk.embed_tokens.as_linear(states)

    probe = mx.arange(4)[None]
    expected, composed = model(probe), head(hidden(probe))
    if expected.shape == composed.shape and mx.allclose(expected, composed, rtol=1e-3, atol=1e-3).item():
        return hidden, head
    return all_layers, identity


@dataclass(frozen=True)
class LayerSplit:
    """The first ``count`` layers and the rest: ``upper(lower(ids, cache=c[:count]), cache=c[count:])`` is the hidden
    states (rows, length, dims) before the head. ``lower`` takes ids (rows, length), ``upper`` the states it gives."""

    count: int
    lower: Hidden
    upper: Hidden


def split_layers(model: nn.Module, count: int) -> LayerSplit | None:
    """The model's first ``count`` layers apart from the rest, or None where it is not built so that this works.

    As with :func:`split_head` the split is tried on a few tokens and given only if nothing changes.
    """
    hidden, _ = split_head(model)
    trunk: Any = getattr(model, "model", None)
    layers = getattr(trunk, "layers", None)
    if not isinstance(layers, list) or not 0 < count < len(layers) or "norm" not in trunk:
        return None
    first, rest = copy(trunk), copy(trunk)
    first.layers, first.norm, rest.layers = layers[:count], nn.Identity(), layers[count:]

    def lower(ids: mx.array, cache: Any = None) -> mx.array:
        states: mx.array = first(ids, cache=cache)
        return states

    def upper(states: mx.array, cache: Any = None) -> mx.array:
        ended: mx.array = rest(states[..., 0], cache=cache, input_embeddings=states)
        return ended

    probe = mx.arange(4)[None]
    caches = [KVCache() for _ in layers]
    try:
        composed = upper(lower(probe, cache=caches[:count]), cache=caches[count:])
    except (TypeError, IndexError, AttributeError):
        return None
    expected = hidden(probe)
    same = expected.shape == composed.shape and mx.allclose(expected, composed, rtol=1e-3, atol=1e-3).item()
    return LayerSplit(count, lower, upper) if same else None


def split_blocks(model: nn.Module) -> list[Hidden] | None:
    """The model's layers one by one, or None where it is not built so that this works: the first takes ids (rows,
    length), each other the states (rows, length, dims) that the one before gives. Tried as in :func:`split_layers`.
    """
    trunk: Any = getattr(model, "model", None)
    layers = getattr(trunk, "layers", None)
    if not isinstance(layers, list) or not layers or "norm" not in trunk:
        return None
    parts = []
    for index, layer in enumerate(layers):
        part = copy(trunk)
        part.layers, part.norm = [layer], nn.Identity()
        parts.append(_on_states(part) if index else part)
    hidden, _ = split_head(model)
    probe = mx.arange(4)[None]
    states = probe
    try:
        for part in parts:
            states = part(states)
    except (TypeError, IndexError, AttributeError):
        return None
    expected, composed = hidden(probe), trunk.norm(states)
    same = expected.shape == composed.shape and mx.allclose(expected, composed, rtol=1e-3, atol=1e-3).item()
    return parts if same else None


def _on_states(part: Any) -> Hidden:
    def layer(states: mx.array) -> mx.array:
        ended: mx.array = part(states[..., 0], input_embeddings=states)
        return ended

    return layer
