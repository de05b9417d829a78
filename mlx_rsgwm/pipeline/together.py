"""Drafting and verifying in one batch: beside each drafter's row a verifier's row reads the same tokens.

Where decoding waits for memory and not for arithmetic, a step over 2 K rows costs little more than one over a single
row. The verifier has then read a draft the moment it is written: its score costs no forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from mlx_rsgwm.cpu import cross_entropy
from mlx_rsgwm.logits import Parts
from mlx_rsgwm.pipeline.drafting import PREFILL_STEP, DraftTokens
from mlx_rsgwm.pipeline.sampling import Sampling, choose, choose_exact, uniforms
from mlx_rsgwm.slots import AdapterSlots


@dataclass(frozen=True)
class Read:
    """A finished draft and the verifier's log-probability of each of its tokens, the end of text included if there."""

    attempt: int
    draft: DraftTokens
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Prefilled:
    """A prompt in caches of one row for each adapter in ``names``, and its last hidden states (rows, dims)."""

    names: tuple[str | None, ...]
    caches: tuple[BatchKVCache, ...]
    last: mx.array

    def repeated(self, count: int) -> tuple[list[BatchKVCache], mx.array]:
        """Caches and states with every row ``count`` times, rows of one adapter together; the original stays."""
        rows = mx.array(np.repeat(np.arange(len(self.names)), count))
        return [_taken(cache, rows) for cache in self.caches], self.last[rows]


def can_batch(model: Any) -> bool:
    """True when the model keeps plain key–value caches, whose rows can be taken and repeated."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


def prefill(slots: AdapterSlots, parts: Parts, names: Sequence[str | None], prompt: Sequence[int]) -> Prefilled:
    """Read one prompt with several adapters at once, each in a row of its own."""
    hidden, _ = parts
    caches = [BatchKVCache([0] * len(names)) for _ in make_prompt_cache(slots.model)]
    ids = mx.array(np.tile(np.array(prompt), (len(names), 1)))
    with slots.using_rows(names):
        for start in range(0, len(prompt), PREFILL_STEP):
            states = hidden(ids[:, start : start + PREFILL_STEP], cache=caches)
            mx.eval([cache.state for cache in caches])
    last = states[:, -1]
    mx.eval(last)
    return Prefilled(tuple(names), tuple(caches), last)


def draft_and_read(
    slots: AdapterSlots,
    parts: Parts,
    prompt: Prefilled,
    question: str,
    attempts: Sequence[int],
    end_ids: frozenset[int],
    end_id: int,
    sampling: Sampling,
) -> Iterator[Read]:
    """Write ``attempts`` drafts side by side with ``prompt.names[0]``, read by ``prompt.names[1]`` if there is one.

    A draft is yielded when it ends, in the order of ending; whoever has heard enough closes the generator. They are
    those of :func:`~mlx_rsgwm.pipeline.drafting.draft`: each attempt has its own random stream. Whatever of ``end_ids``
    ended a draft, the reader is asked for the probability of ``end_id``, the one in training rows. Without a reader
    the log-probabilities are empty.
    """
    hidden, head = parts
    readers = len(prompt.names) - 1
    count = sampling.max_tokens
    stream = np.stack([uniforms(sampling.seed, question, attempt, count) for attempt in attempts])
    written: list[list[int]] = [[] for _ in attempts]
    read: list[list[float]] = [[] for _ in attempts]
    left = list(range(len(attempts)))
    caches, states = prompt.repeated(len(attempts))
    for step in range(count):
        width = len(left)
        logits = head(states[:, None])[:, 0]
        uniform = mx.array(stream[left, step])
        tokens, certain = choose(logits[:width], uniform, sampling.temperature, sampling.top_p)
        mx.eval(logits, tokens, certain)
        if not mx.all(certain).item():
            tokens = choose_exact(logits[:width], uniform, sampling.temperature, sampling.top_p)
        chosen: Any = tokens.tolist()
        if readers:
            targets = mx.array([end_id if token in end_ids else token for token in chosen])
            values: Any = cross_entropy(logits[width:].astype(mx.float32), targets).tolist()
            for row, value in zip(left, values, strict=True):
                read[row].append(-value)
        keep = []
        for position, (row, token) in enumerate(zip(left, chosen, strict=True)):
            ended = token in end_ids
            if not ended:
                written[row].append(token)
            if ended or step == count - 1:
                yield Read(attempts[row], DraftTokens(tuple(written[row]), ended), tuple(read[row]))
            else:
                keep.append(position)
        if not keep:
            return
        if len(keep) < width:
            left = [left[position] for position in keep]
            tokens = tokens[mx.array(keep)]
            rows = mx.array([position + width * group for group in range(1 + readers) for position in keep])
            caches = [_taken(cache, rows) for cache in caches]
        with slots.using_rows([name for name in prompt.names for _ in left]):
            both = mx.concatenate([tokens] * (1 + readers)) if readers else tokens
            states = hidden(both[:, None], cache=caches)[:, -1]
            mx.eval(states)


def _taken(cache: Any, rows: mx.array) -> BatchKVCache:
    """A new cache with the ``rows`` of an old one, which keeps what it has."""
    taken: Any = BatchKVCache([0] * rows.size)
    taken.keys, taken.values = (x[rows, :, : cache._idx] for x in (cache.keys, cache.values))
    taken.offset, taken.left_padding, taken._idx = cache.offset[rows], cache.left_padding[rows], cache._idx
    found: BatchKVCache = taken
    return found
