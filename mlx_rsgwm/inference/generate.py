"""Drafting: token ids in, completions out, many rows at once over one prefill of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.inference.sampling import Sampling, choose, choose_exact, uniforms
from mlx_rsgwm.models.row_batches import can_batch
from mlx_rsgwm.models.split import Parts

PREFILL_STEP = 2048


@dataclass(frozen=True)
class DraftRequest:
    """What is asked of the drafter: a prompt's ids, and the name of the random stream, question and attempt."""

    prompt: tuple[int, ...]
    question: str
    attempt: int


def draft(
    model: Any, parts: Parts, end_ids: frozenset[int], requests: Sequence[DraftRequest], sampling: Sampling
) -> list[Draft]:
    """Draft all requests in one batch, with the adapter that is active on ``model``; ``parts`` is its ``split_head``.
    The drafts have no text yet.

    Requests that share a prompt are prefilled once. Rows leave the batch when they end. Prompts are left-padded, which
    changes nothing but float round-off (masked keys get weight zero).
    """
    if not can_batch(model):  # one row at a time, through the model's own cache
        return [_decode(model, parts, end_ids, [request], sampling, batched=False)[0] for request in requests]
    return _decode(model, parts, end_ids, requests, sampling, batched=True)


def _decode(
    model: Any,
    parts: Parts,
    end_ids: frozenset[int],
    requests: Sequence[DraftRequest],
    sampling: Sampling,
    batched: bool,
) -> list[Draft]:
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    hidden, head = parts
    ids, caches, _ = unread(model, prompts, batched)
    for start in range(0, ids.shape[1], PREFILL_STEP):
        states = hidden(ids[:, start : start + PREFILL_STEP], cache=caches)
        mx.eval([cache.state for cache in caches])
    last = states[:, -1]
    if batched and len(requests) != len(prompts):
        rows = mx.array([row_of[request.prompt] for request in requests])
        for cache in caches:
            cache.filter(rows)
        last = last[rows]
    logits = head(last[:, None])[:, 0]

    stream = np.stack([uniforms(sampling.seed, r.question, r.attempt, sampling.max_tokens) for r in requests])
    written = write_drafts(parts, end_ids, caches, logits, sampling, stream)
    return [replace(row, attempt=request.attempt) for request, row in zip(requests, written, strict=True)]


def unread(model: Any, prompts: Sequence[Sequence[int]], batched: bool) -> tuple[mx.array, list[Any], list[int]]:
    """Prompts as ids (rows, length) padded on the left, empty caches for them, and by how much each is padded."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    caches: list[Any] = make_prompt_cache(model)
    if batched:
        caches = [BatchKVCache(padding) for _ in caches]
    ids = np.array([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    return mx.array(ids), caches, padding


def write_drafts(
    parts: Parts,
    end_ids: frozenset[int],
    caches: Sequence[Any],
    logits: mx.array,
    sampling: Sampling,
    stream: np.ndarray | None = None,
) -> list[Draft]:
    """Completions of rows that ``caches`` have read, from the ``logits`` (rows, vocabulary) of what follows.

    ``stream``: uniform numbers (rows, max_tokens); greedy decoding takes none. The drafts' attempt is 0.
    """
    hidden, head = parts
    count, rows = sampling.max_tokens, logits.shape[0]
    if stream is None:
        stream = np.zeros((rows, count), dtype=np.float32)
    written: list[list[int]] = [[] for _ in range(rows)]
    finished = [False] * rows
    rows_left = list(range(rows))
    for step in range(count):
        uniform = mx.array(stream[rows_left, step])
        tokens, certain = choose(logits, uniform, sampling.temperature, sampling.top_p)
        mx.eval(tokens, certain)
        if not mx.all(certain).item():
            tokens = choose_exact(logits, uniform, sampling.temperature, sampling.top_p)
        chosen: Any = tokens.tolist()
        keep = []
        for position, (row, token) in enumerate(zip(rows_left, chosen, strict=True)):
            if token in end_ids:
                finished[row] = True
            else:
                written[row].append(token)
                keep.append(position)
        if not keep or step == count - 1:
            break
        if len(keep) < len(rows_left):
            rows_left = [rows_left[position] for position in keep]
            indices = mx.array(keep)
            tokens = tokens[indices]
            for cache in caches:
                cache.filter(indices)
        logits = head(hidden(tokens[:, None], cache=caches))[:, 0]
    return [Draft(0, tuple(tokens), done) for tokens, done in zip(written, finished, strict=True)]
