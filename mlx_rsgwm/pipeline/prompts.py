"""A prompt read once: drafts written side by side after it, and many answers to it verified.

What a model keeps of a prompt, its key–value caches, is kept for one adapter and repeated for as many rows as are
needed; the kept rows themselves never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from mlx_rsgwm.logits import Hidden, Parts
from mlx_rsgwm.pipeline.drafting import PREFILL_STEP, DraftTokens
from mlx_rsgwm.pipeline.sampling import Sampling, choose, choose_exact, uniforms


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


class Writer:
    """Several drafts of one prompt, a token each at every :meth:`step`, until each has ended.

    Drafts are those of :func:`~mlx_rsgwm.pipeline.drafting.draft`: each attempt has its own random stream. The adapter
    that drafts must be active during every step.
    """

    def __init__(
        self,
        parts: Parts,
        prefilled: Prefilled,
        question: str,
        attempts: Sequence[int],
        end_ids: frozenset[int],
        sampling: Sampling,
    ) -> None:
        self._hidden, self._head = parts
        self._sampling = sampling
        self._end_ids = end_ids
        self._attempts = list(attempts)
        count = sampling.max_tokens
        self._stream = np.stack([uniforms(sampling.seed, question, attempt, count) for attempt in attempts])
        self._written: list[list[int]] = [[] for _ in attempts]
        self._left = list(range(len(attempts)))
        rows = mx.zeros(len(attempts), dtype=mx.int32)
        self._caches = [_taken(cache, rows) for cache in prefilled.caches]
        self._logits = self._head(prefilled.last[rows][:, None])[:, 0]
        self._at = 0

    @property
    def done(self) -> bool:
        return not self._left

    def step(self) -> dict[int, DraftTokens]:
        """Write one token a draft; the drafts that ended with it, by attempt."""
        temperature, top_p = self._sampling.temperature, self._sampling.top_p
        uniform = mx.array(self._stream[self._left, self._at])
        tokens, certain = choose(self._logits, uniform, temperature, top_p)
        mx.eval(tokens, certain)
        if not mx.all(certain).item():
            tokens = choose_exact(self._logits, uniform, temperature, top_p)
        self._at += 1
        chosen: Any = tokens.tolist()
        ended, keep = {}, []
        for position, (row, token) in enumerate(zip(self._left, chosen, strict=True)):
            finished = token in self._end_ids
            if not finished:
                self._written[row].append(token)
            if finished or self._at == self._sampling.max_tokens:
                ended[self._attempts[row]] = DraftTokens(tuple(self._written[row]), finished)
            else:
                keep.append(position)
        if len(keep) < len(self._left):
            self._left = [self._left[position] for position in keep]
            rows = mx.array(keep)
            if keep:
                tokens, self._caches = tokens[rows], [_taken(cache, rows) for cache in self._caches]
        if keep:
            states = self._hidden(tokens[:, None], cache=self._caches)
            self._logits = self._head(states[:, -1:])[:, 0]
            mx.async_eval(self._logits)
        return ended


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
            kept.append(([_taken(one, mx.array([0]), shared) for one in caches], states[:1, :shared]))
            return states
        caches, known = kept[0]
        known = mx.repeat(known, ids.shape[0], axis=0)
        if ids.shape[1] == shared:
            return known
        rows = mx.zeros(ids.shape[0], dtype=mx.int32)
        states = hidden(ids[:, shared:], cache=[_taken(one, rows) for one in caches])
        return mx.concatenate([known, states], axis=1)

    return after


def _taken(cache: Any, rows: mx.array, length: int | None = None) -> BatchKVCache:
    """A new cache with the ``rows`` of an old one that has no padding, up to ``length``; the old one keeps all."""
    end = cache._idx if length is None else length
    taken: Any = BatchKVCache([0] * rows.size)
    taken.keys, taken.values = (x[rows, :, :end] for x in (cache.keys, cache.values))
    taken.offset, taken._idx = cache.offset[rows] - (cache._idx - end), end
    found: BatchKVCache = taken
    return found
