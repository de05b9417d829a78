"""A prompt read once, for drafts that are written after it and answers to it that are verified.

What a model keeps of a prompt, its key–value caches, is kept for one adapter and repeated for as many rows as are
needed; the kept rows themselves never change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from mlx_rsgwm.inference.generate import PREFILL_STEP
from mlx_rsgwm.models.split import Hidden, LayerSplit

# Tokens by which a cache grows. mlx-lm's 256 make a batch whose rows change copy mostly zeros.
GROWTH = 16


@dataclass(frozen=True)
class Prefilled:
    """Prompts in the rows of caches, padded on the left, and their last hidden states (rows, dims).

    ``middle``: the states (rows, length, dims) above the layers that no adapter changes, where the model was split.
    """

    prompts: tuple[tuple[int, ...], ...]
    caches: tuple[BatchKVCache, ...]
    last: mx.array
    middle: mx.array | None = None


@dataclass(frozen=True)
class CachedPrefix:
    """A text as the layers below every adapter read it: the states above them (1, length, dims), and row ``place`` of
    their caches up to ``end``; these may have gone further. Of a text among many, no caches are kept."""

    tokens: tuple[int, ...]
    middle: mx.array
    caches: Sequence[BatchKVCache]
    place: int
    end: int


def prefill(model: Any, hidden: Hidden, prompts: Sequence[Sequence[int]], split: LayerSplit | None = None) -> Prefilled:
    """Read prompts, each in a row, with the adapter that is active."""
    return _prefilled([1] * len(make_prompt_cache(model)), hidden, prompts, split)


def _prefilled(
    copies: Sequence[int], hidden: Hidden, prompts: Sequence[Sequence[int]], split: LayerSplit | None = None
) -> Prefilled:
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    caches = [_fresh(padding * count) for count in copies]
    ids = mx.array([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    middle: list[mx.array] = []
    for start in range(0, longest, PREFILL_STEP):
        states, between = read_on(hidden, split, ids[:, start : start + PREFILL_STEP], caches)
        mx.eval(states, [cache.state for cache in caches])
        middle += [] if between is None else [between]
    middle_states = mx.concatenate(middle, axis=1) if middle else None
    return Prefilled(tuple(map(tuple, prompts)), tuple(caches), states[:, -1], middle_states)


def read_on(
    hidden: Hidden, split: LayerSplit | None, ids: mx.array, caches: Sequence[BatchKVCache]
) -> tuple[mx.array, mx.array | None]:
    """Hidden states of ``ids`` (rows, length) after what the caches hold, and those between lower and upper layers."""
    if split is None:
        return hidden(ids, cache=caches), None
    middle = split.lower(ids, cache=caches[: split.count])
    return split.upper(middle, cache=caches[split.count :]), middle


def after_prompts(
    hidden: Hidden, copies: Sequence[int], rows: Sequence[tuple[int, ...]], starts: Sequence[int], step: int
) -> mx.array:
    """States (rows, rest, dims) of rows after their first ``starts`` tokens, which are those of prompts.

    A prompt of several rows is read once. The rest is padded on the right, to a multiple of ``step`` tokens.
    ``copies``: of how many adapters each of the model's caches keeps the rows; ``hidden`` gives as many copies of rows.
    """
    prompts = list(dict.fromkeys(row[:start] for row, start in zip(rows, starts, strict=True)))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    read = _prefilled(copies, hidden, prompts)
    owner = mx.array([place[row[:start]] for row, start in zip(rows, starts, strict=True)])
    rest = [row[start:] for row, start in zip(rows, starts, strict=True)]
    length = -(-max(map(len, rest)) // step) * step
    rows_of_prefix = [
        select_rows(cache, _in_copies(owner, len(prompts), count))
        for cache, count in zip(read.caches, copies, strict=True)
    ]
    return hidden(mx.array(right_padded(rest, length)), cache=rows_of_prefix)


def right_padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Rows of ids as int32 (rows, length), zeros after their ends: causal attention keeps padding there from all."""
    padded = np.zeros((len(rows), length), dtype=np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _in_copies(rows: mx.array, count: int, copies: int) -> mx.array:
    """The places of some of ``count`` rows in a batch that holds the rows once for each adapter, one after another."""
    return rows if copies == 1 else mx.concatenate([rows + count * copy for copy in range(copies)])


def remembering(model: Any, hidden: Hidden, prompt: Sequence[int], copies: Sequence[int] | None = None) -> Hidden:
    """``hidden`` for ids (rows, length) that begin with one prompt, which is read in the first call and not again.

    Rows that begin otherwise are read whole. The adapters must be the same in every call; ``copies`` as in
    :func:`after_prompts`.
    """
    start = mx.array(list(prompt))
    go_on = _Remembered(hidden, [1] * len(make_prompt_cache(model)) if copies is None else copies, len(prompt))

    def after(ids: mx.array, cache: Any = None) -> mx.array:
        if ids.shape[1] < len(prompt) or not mx.all(ids[:, : len(prompt)] == start).item():
            return hidden(ids)
        return go_on(ids)

    return after


CachedPrefixes = Mapping[tuple[int, ...], CachedPrefix]


class LowerLayerCache:
    """What the layers above the split make of texts that the drafter's lower layers have read already.

    Called with rows of ids and a length: their states (rows, length, dims), padded on the right; None where some row
    has no cached prefix to its end (a single row may go beyond it). ``prefixes`` by their tokens, as they are when it
    is called. ``prompt`` is kept from one single row to the next that begins with it. The adapters must be the same
    in every call; for several, ``split.upper`` gives the rows of ``adapters`` copies.
    """

    def __init__(
        self,
        model: Any,
        split: LayerSplit,
        prefixes: CachedPrefixes | None = None,
        prompt: Sequence[int] = (),
        adapters: int = 1,
    ) -> None:
        self._split, self._prompt = split, tuple(prompt)
        upper_layers = len(make_prompt_cache(model)) - split.count
        self._go_on = _Remembered(split.upper, [adapters] * upper_layers, len(prompt))
        self.prefixes: CachedPrefixes = {} if prefixes is None else prefixes

    def __call__(self, rows: Sequence[tuple[int, ...]], length: int) -> mx.array | None:
        if len(rows) == 1 and length == len(rows[0]):
            return self._one(rows[0])
        if any(row not in self.prefixes for row in rows):
            return None
        middle = [mx.pad(self.prefixes[row].middle, [(0, 0), (0, length - len(row)), (0, 0)]) for row in rows]
        return self._split.upper(mx.concatenate(middle))

    def _one(self, row: tuple[int, ...]) -> mx.array | None:
        fitting = (
            prefix for tokens, prefix in self.prefixes.items()
            if row == tokens or (prefix.caches and row[: len(tokens)] == tokens)
        )  # fmt: skip
        prefix = max(fitting, key=lambda candidate: len(candidate.tokens), default=None)
        if prefix is None:
            return None
        middle = prefix.middle
        if len(row) > len(prefix.tokens):
            caches = [select_rows(cache, mx.array([prefix.place]), prefix.end) for cache in prefix.caches]
            rest = self._split.lower(mx.array([row[len(prefix.tokens) :]]), cache=caches)
            middle = mx.concatenate([middle, rest], axis=1)
        if not self._prompt or row[: len(self._prompt)] != self._prompt:
            return self._split.upper(middle)
        return self._go_on(middle)


class _Remembered:
    """``layers`` on inputs (rows, length, …) whose first ``shared`` never change; ``copies`` says of each of their
    caches how many adapters it keeps the rows of."""

    def __init__(self, layers: Hidden, copies: Sequence[int], shared: int) -> None:
        self._layers, self._copies, self._shared = layers, copies, shared
        self._kept: tuple[list[BatchKVCache], mx.array] | None = None

    def __call__(self, inputs: mx.array) -> mx.array:
        rows = inputs.shape[0]
        if self._kept is None:
            caches = [_fresh([0] * rows * count) for count in self._copies]
            states = self._layers(inputs, cache=caches)
            mx.eval(states, [cache.state for cache in caches])
            first_rows = {count: _in_copies(mx.array([0]), rows, count) for count in self._copies}
            self._kept = (
                [
                    select_rows(cache, first_rows[count], self._shared)
                    for cache, count in zip(caches, self._copies, strict=True)
                ],
                states[::rows, : self._shared],
            )
            return states
        first, known = self._kept
        known = mx.repeat(known, rows, axis=0)
        if inputs.shape[1] == self._shared:
            return known
        owner = mx.zeros(rows, dtype=mx.int32)
        caches = [
            select_rows(cache, _in_copies(owner, 1, count)) for cache, count in zip(first, self._copies, strict=True)
        ]
        return mx.concatenate([known, self._layers(inputs[:, self._shared :], cache=caches)], axis=1)


def _fresh(padding: list[int]) -> BatchKVCache:
    cache: Any = BatchKVCache(padding)
    cache.step = GROWTH
    batch_cache: BatchKVCache = cache
    return batch_cache


def select_rows(cache: Any, rows: mx.array, length: int | None = None, start: int = 0) -> BatchKVCache:
    """A new cache with the ``rows`` (n,) of an old one from ``start``, up to which all are padding, to ``length``.

    Padding is included; the old one keeps all.
    """
    end = cache._idx if length is None else length
    taken: Any = _fresh([0] * rows.size)
    taken.left_padding = cache.left_padding[rows] - start
    taken.keys, taken.values = (x[rows, :, start:end] for x in (cache.keys, cache.values))
    taken.offset, taken._idx = cache.offset[rows] - (cache._idx - end), end - start
    batch_cache: BatchKVCache = taken
    return batch_cache


def concat(first: Any, second: Any) -> BatchKVCache:
    """A new cache with the rows of two; those of the shorter one are padded on the left."""
    end = max(first._idx, second._idx)
    result: Any = _fresh([0] * (first.keys.shape[0] + second.keys.shape[0]))
    result.left_padding = mx.concatenate([part.left_padding + (end - part._idx) for part in (first, second)])
    for name in ("keys", "values"):
        padded = [
            mx.pad(getattr(part, name)[:, :, : part._idx], [(0, 0), (0, 0), (end - part._idx, 0), (0, 0)])
            for part in (first, second)
        ]
        setattr(result, name, mx.concatenate(padded))
    result.offset, result._idx = mx.concatenate([first.offset, second.offset]), end
    cache: BatchKVCache = result
    return cache
