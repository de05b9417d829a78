"""Drafts written side by side, where drafts of a prompt that say the same are written once.

At low temperature the attempts at a question mostly begin alike, and often are alike. Attempts that have written the
same tokens so far are one row of the batch; where their random streams choose different tokens, the row is split.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache

from mlx_rsgwm.logits import Below, Parts
from mlx_rsgwm.pipeline.drafting import DraftTokens
from mlx_rsgwm.pipeline.prompts import Prefilled, Trail, joined, read_on, taken
from mlx_rsgwm.pipeline.sampling import Sampling, choose, choose_exact, uniforms

Caches = Sequence[BatchKVCache]
Key = tuple[int, int]  # place of the question, number of the attempt


@dataclass(frozen=True)
class _Row:
    tokens: tuple[int, ...]
    attempts: tuple[Key, ...]


@dataclass(frozen=True)
class _Batch:
    """Rows of one length, all read, and the logits (rows, vocabulary) of what follows.

    ``middle``: the states (rows, prompt and length, dims) between lower and upper layers, where the model is split.
    """

    rows: tuple[_Row, ...]
    caches: Caches
    logits: mx.array
    middle: mx.array | None

    @property
    def length(self) -> int:
        return len(self.rows[0].tokens)


@dataclass(frozen=True)
class _Aside:
    """A row that nobody waits for. Its last token is not read; the others are row ``place`` of a batch, whose caches
    may have gone further than ``end`` since."""

    row: _Row
    batch: _Batch
    place: int
    end: int


class Writer:
    """Drafts of some prompts, each with its own random stream, written no further than they are asked for.

    A draft goes by the place of its question and the number of its attempt.

    They are those of :func:`~mlx_rsgwm.pipeline.drafting.draft`. The adapter that drafts must be active during every
    step. A draft that left its row while nobody waited for it goes on from there: a retry reads nothing again.
    ``ended``: the finished drafts. ``trails``: where the model is split, how its lower layers read them.
    """

    def __init__(
        self,
        parts: Parts,
        prefilled: Prefilled,
        questions: Sequence[str],
        attempts: Sequence[int],
        end_ids: frozenset[int],
        sampling: Sampling,
        below: Below | None = None,
    ) -> None:
        self._hidden, self._head = parts
        self._below, self._prompts = below, prefilled.prompts
        self._sampling = sampling
        self._end_ids = end_ids
        count = sampling.max_tokens
        self._stream = {
            (place, attempt): uniforms(sampling.seed, question, attempt, count)
            for place, question in enumerate(questions)
            for attempt in attempts
        }
        logits = self._head(prefilled.last[:, None])[:, 0]
        start = [taken(cache, mx.arange(len(questions))) for cache in prefilled.caches]
        rows = tuple(_Row((), tuple((place, attempt) for attempt in attempts)) for place in range(len(questions)))
        self._batches = [_Batch(rows, start, logits, prefilled.middle)]
        self._aside: list[_Aside] = []
        self.ended: dict[Key, DraftTokens] = {}
        self.trails: dict[tuple[int, ...], Trail] = {}

    def step(self, wanted: Collection[Key]) -> None:
        """One token more for those of the ``wanted`` attempts that have written least, or the end of them."""
        wanted = set(wanted)
        self._wake(wanted)
        waited_for = [
            batch for batch in self._batches if any(attempt in wanted for row in batch.rows for attempt in row.attempts)
        ]
        if not waited_for:
            return
        batch = min(waited_for, key=lambda one: one.length)
        self._batches.remove(batch)
        followers = self._followers(batch)
        stay = [(place, row) for place, row in followers if any(attempt in wanted for attempt in row.attempts)]
        end = batch.caches[0]._idx if batch.caches else 0
        self._aside += [_Aside(row, batch, place, end) for place, row in followers if (place, row) not in stay]
        if not stay:
            return
        places = [place for place, _ in stay]
        caches, middle = batch.caches, batch.middle
        if places != list(range(len(batch.rows))):
            rows = mx.array(places)
            caches = [taken(cache, rows) for cache in caches]
            middle = None if middle is None else middle[rows]
        self._read([row for _, row in stay], caches, middle)

    def _followers(self, batch: _Batch) -> list[tuple[int, _Row]]:
        """The rows that come of a batch's rows with one token more, each with its row's place; ends are noted."""
        riding = [(place, attempt) for place, row in enumerate(batch.rows) for attempt in row.attempts]
        rows = mx.array([place for place, _ in riding])
        uniform = mx.array(np.array([self._stream[attempt][batch.length] for _, attempt in riding]))
        temperature, top_p = self._sampling.temperature, self._sampling.top_p
        tokens, certain = choose(batch.logits, uniform, temperature, top_p, rows)
        mx.eval(tokens, certain)
        if not mx.all(certain).item():
            tokens = choose_exact(batch.logits, uniform, temperature, top_p, rows)
        chosen: Any = tokens.tolist()
        found: dict[tuple[int, tuple[int, ...]], list[Key]] = {}
        for (place, attempt), token in zip(riding, chosen, strict=True):
            written = batch.rows[place].tokens
            if token in self._end_ids or batch.length + 1 == self._sampling.max_tokens:
                finished = token in self._end_ids
                self.ended[attempt] = DraftTokens(written if finished else (*written, token), finished)
                self._keep_trail(batch, place)
            else:
                found.setdefault((place, (*written, token)), []).append(attempt)
        return [(place, _Row(written, tuple(attempts))) for (place, written), attempts in found.items()]

    def _keep_trail(self, batch: _Batch, place: int) -> None:
        if self._below is None or batch.middle is None:
            return
        row = batch.rows[place]
        prompt = self._prompts[row.attempts[0][0]]
        tokens = (*prompt, *row.tokens)
        if tokens not in self.trails:
            lower, end = batch.caches[: self._below.count], batch.middle.shape[1]
            middle = batch.middle[place : place + 1, end - len(tokens) :]
            self.trails[tokens] = Trail(tokens, middle, lower, place, end)

    def _wake(self, wanted: Collection[Key]) -> None:
        groups: dict[tuple[int, int], list[_Aside]] = {}
        for one in [one for one in self._aside if any(attempt in wanted for attempt in one.row.attempts)]:
            self._aside.remove(one)
            groups.setdefault((id(one.batch), one.end), []).append(one)
        for group in groups.values():
            batch, rows = group[0].batch, mx.array([one.place for one in group])
            middle = None if batch.middle is None else batch.middle[rows]
            caches = [taken(cache, rows, group[0].end) for cache in batch.caches]
            self._read([one.row for one in group], caches, middle)

    def _read(self, rows: Sequence[_Row], caches: Caches, middle: mx.array | None) -> None:
        """Read the last token of every row, and put the rows beside those of their length."""
        ids = mx.array([[row.tokens[-1]] for row in rows])
        states, between = read_on(self._hidden, self._below, ids, caches)
        if middle is not None and between is not None:
            middle = mx.concatenate([middle, between], axis=1)
        logits = self._head(states[:, -1:])[:, 0]
        batch = _Batch(tuple(rows), caches, logits, middle)
        other = next((one for one in self._batches if one.length == batch.length), None)
        if other is not None:
            self._batches.remove(other)
            beside = [joined(first, second) for first, second in zip(other.caches, batch.caches, strict=True)]
            if other.middle is not None and middle is not None:
                middle = mx.concatenate([other.middle, middle])
            batch = _Batch((*other.rows, *rows), beside, mx.concatenate([other.logits, logits]), middle)
        self._batches.append(batch)
        mx.async_eval(batch.logits)
