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

from mlx_rsgwm.logits import Below, Hidden
from mlx_rsgwm.pipeline.drafting import PREFILL_STEP


@dataclass(frozen=True)
class Prefilled:
    """The ids of a prompt, that prompt in the caches of one row, and its last hidden state (1, dims).

    ``middle``: the states (1, length, dims) above the layers that no adapter changes, where the model was split there.
    """

    prompt: tuple[int, ...]
    caches: tuple[BatchKVCache, ...]
    last: mx.array
    middle: mx.array | None = None


@dataclass(frozen=True)
class Trail:
    """A text as the layers below every adapter read it: the states above them (1, length, dims), and row ``place`` of
    their caches, which may have gone further."""

    tokens: tuple[int, ...]
    middle: mx.array
    caches: Sequence[BatchKVCache]
    place: int


def can_batch(model: Any) -> bool:
    """True when the model keeps plain key–value caches, whose rows can be taken and repeated."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


def prefill(model: Any, hidden: Hidden, prompt: Sequence[int], below: Below | None = None) -> Prefilled:
    """Read a prompt with the adapter that is active."""
    caches = [BatchKVCache([0]) for _ in make_prompt_cache(model)]
    ids = mx.array([list(prompt)])
    middle: list[mx.array] = []
    for start in range(0, len(prompt), PREFILL_STEP):
        states, between = read_on(hidden, below, ids[:, start : start + PREFILL_STEP], caches)
        mx.eval(states, [cache.state for cache in caches])
        middle += [] if between is None else [between]
    return Prefilled(tuple(prompt), tuple(caches), states[:, -1], mx.concatenate(middle, axis=1) if middle else None)


def read_on(
    hidden: Hidden, below: Below | None, ids: mx.array, caches: Sequence[BatchKVCache]
) -> tuple[mx.array, mx.array | None]:
    """Hidden states of ``ids`` (rows, length) after what the caches hold, and those between lower and upper layers."""
    if below is None:
        return hidden(ids, cache=caches), None
    middle = below.lower(ids, cache=caches[: below.count])
    return below.upper(middle, cache=caches[below.count :]), middle


def remembering(
    model: Any, hidden: Hidden, prompt: Sequence[int], below: Below | None = None, trails: Sequence[Trail] = ()
) -> Hidden:
    """``hidden`` for ids (rows, length) that begin with one prompt, which is read in the first call and not again.

    Rows that begin otherwise are read whole. The adapter must be the same one in every call. A single row that begins
    with the tokens of a trail goes on from its states: the lower layers do not read it again.
    """
    start = mx.array(list(prompt))
    kept: list[tuple[list[BatchKVCache], mx.array]] = []
    kept_above: list[tuple[list[BatchKVCache], mx.array]] = []

    def after(ids: mx.array, cache: Any = None) -> mx.array:
        shared = len(prompt)
        if ids.shape[1] < shared or not mx.all(ids[:, :shared] == start).item():
            return hidden(ids)
        trail = _along(ids, trails) if below is not None else None
        if below is not None and trail is not None:
            whole = _middle(below, ids, trail)
            return _go_on(below.upper, whole, len(make_prompt_cache(model)) - below.count, shared, kept_above)
        return _go_on(hidden, ids, len(make_prompt_cache(model)), shared, kept)

    return after


def _go_on(
    layers: Hidden, inputs: mx.array, count: int, shared: int, kept: list[tuple[list[BatchKVCache], mx.array]]
) -> mx.array:
    """``layers`` on ``inputs`` (rows, length, …) whose first ``shared`` are the same in every call, and ``kept``."""
    rows = inputs.shape[0]
    if not kept:
        caches = [BatchKVCache([0] * rows) for _ in range(count)]
        states = layers(inputs, cache=caches)
        mx.eval(states, [one.state for one in caches])
        kept.append(([taken(one, mx.array([0]), shared) for one in caches], states[:1, :shared]))
        return states
    first, known = kept[0]
    known = mx.repeat(known, rows, axis=0)
    if inputs.shape[1] == shared:
        return known
    states = layers(inputs[:, shared:], cache=[taken(one, mx.zeros(rows, dtype=mx.int32)) for one in first])
    return mx.concatenate([known, states], axis=1)


def _along(ids: mx.array, trails: Sequence[Trail]) -> Trail | None:
    """The longest trail whose tokens a single row begins with."""
    if ids.shape[0] != 1:
        return None
    row: Any = ids[0].tolist()
    fitting = [one for one in trails if tuple(row[: len(one.tokens)]) == one.tokens]
    return max(fitting, key=lambda one: len(one.tokens), default=None)


def _middle(below: Below, ids: mx.array, trail: Trail) -> mx.array:
    known = len(trail.tokens)
    if ids.shape[1] == known:
        return trail.middle
    caches = [taken(cache, mx.array([trail.place]), known) for cache in trail.caches]
    return mx.concatenate([trail.middle, below.lower(ids[:, known:], cache=caches)], axis=1)


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
