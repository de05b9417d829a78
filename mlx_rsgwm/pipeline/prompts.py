"""A prompt read once, for drafts that are written after it and answers to it that are verified.

What a model keeps of a prompt, its key–value caches, is kept for one adapter and repeated for as many rows as are
needed; the kept rows themselves never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from mlx_rsgwm.logits import Hidden
from mlx_rsgwm.pipeline.drafting import PREFILL_STEP


@dataclass(frozen=True)
class Prefilled:
    """A prompt in the caches of one row, and its last hidden state (1, dims)."""

    caches: tuple[BatchKVCache, ...]
    last: mx.array


def can_batch(model: Any) -> bool:
    """True when the model keeps plain key–value caches, whose rows can be taken and repeated."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


def prefill(model: Any, hidden: Hidden, prompt: Sequence[int]) -> Prefilled:
    """Read a prompt with the adapter that is active."""
    caches = [BatchKVCache([0]) for _ in make_prompt_cache(model)]
    ids = mx.array([list(prompt)])
    for start in range(0, len(prompt), PREFILL_STEP):
        states = hidden(ids[:, start : start + PREFILL_STEP], cache=caches)
        mx.eval(states, [cache.state for cache in caches])
    return Prefilled(tuple(caches), states[:, -1])


def remembering(model: Any, hidden: Hidden, prompt: Sequence[int]) -> Hidden:
    """``hidden`` for ids (rows, length) that begin with one prompt, which is read in the first call and not again.

    Rows that begin otherwise are read whole. The adapter must be the same one in every call.
    """
    start = mx.array(list(prompt))
    kept: list[tuple[list[BatchKVCache], mx.array]] = []

    def after(ids: mx.array, cache: Any = None) -> mx.array:
        shared = len(prompt)
        if ids.shape[1] < shared or not mx.all(ids[:, :shared] == start).item():
            return hidden(ids)
        if not kept:
            caches = [BatchKVCache([0] * ids.shape[0]) for _ in make_prompt_cache(model)]
            states = hidden(ids, cache=caches)
            mx.eval(states, [one.state for one in caches])
            kept.append(([taken(one, mx.array([0]), shared) for one in caches], states[:1, :shared]))
            return states
        caches, known = kept[0]
        known = mx.repeat(known, ids.shape[0], axis=0)
        if ids.shape[1] == shared:
            return known
        rows = mx.zeros(ids.shape[0], dtype=mx.int32)
        states = hidden(ids[:, shared:], cache=[taken(one, rows) for one in caches])
        return mx.concatenate([known, states], axis=1)

    return after


def taken(cache: Any, rows: mx.array, length: int | None = None) -> BatchKVCache:
    """A new cache with the ``rows`` of an old one that has no padding, up to ``length``; the old one keeps all."""
    end = cache._idx if length is None else length
    taken: Any = BatchKVCache([0] * rows.size)
    taken.keys, taken.values = (x[rows, :, :end] for x in (cache.keys, cache.values))
    taken.offset, taken._idx = cache.offset[rows] - (cache._idx - end), end
    found: BatchKVCache = taken
    return found


def joined(first: Any, second: Any) -> BatchKVCache:
    """A new cache with the rows of two that have read as many tokens, none of them padded."""
    end = first._idx
    found: Any = BatchKVCache([0] * (first.keys.shape[0] + second.keys.shape[0]))
    found.keys = mx.concatenate([first.keys[:, :, :end], second.keys[:, :, :end]])
    found.values = mx.concatenate([first.values[:, :, :end], second.values[:, :, :end]])
    found.offset, found._idx = mx.concatenate([first.offset, second.offset]), end
    cache: BatchKVCache = found
    return cache
