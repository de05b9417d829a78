"""Logits only where they are needed: a model split into its hidden states and its output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

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

    def whole(ids: mx.array, cache: Any = None) -> mx.array:
        return model(ids, cache=cache)

    def identity(hidden: mx.array) -> mx.array:
        return hidden

    trunk = getattr(model, "model", None)
    if trunk is None or not hasattr(trunk, "embed_tokens"):
        return whole, identity

    def hidden(ids: mx.array, cache: Any = None) -> mx.array:
        return trunk(ids, cache=cache)

    # Looked up at each call: LoRA may replace the head or the embedding after the split.
    def head(states: mx.array) -> mx.array:
        return model.lm_head(states) if "lm_head" in model else trunk.embed_tokens.as_linear(states)

    probe = mx.arange(4)[None]
    expected, found = model(probe), head(hidden(probe))
    if expected.shape == found.shape and mx.allclose(expected, found, rtol=1e-3, atol=1e-3).item():
        return hidden, head
    return whole, identity
