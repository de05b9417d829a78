"""Drafts of one prompt, written side by side, where drafts that say the same are written once.

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

from mlx_rsgwm.logits import Parts
from mlx_rsgwm.pipeline.drafting import DraftTokens
from mlx_rsgwm.pipeline.prompts import Prefilled, joined, taken
from mlx_rsgwm.pipeline.sampling import Sampling, choose, choose_exact, uniforms

Caches = Sequence[BatchKVCache]


@dataclass(frozen=True)
class _Row:
    tokens: tuple[int, ...]
    attempts: tuple[int, ...]


@dataclass(frozen=True)
class _Batch:
    """Rows of one length, all read, and the logits (rows, vocabulary) of what follows."""

    rows: tuple[_Row, ...]
    caches: Caches
    logits: mx.array

    @property
    def length(self) -> int:
        return len(self.rows[0].tokens)


@dataclass(frozen=True)
class _Aside:
    """A row that nobody waits for. Its last token is not read; the others are in row ``place`` of ``caches``."""

    row: _Row
    caches: Caches
    place: int
    end: int


class Writer:
    """Drafts of one prompt, each with its own random stream, written no further than they are asked for.

    They are those of :func:`~mlx_rsgwm.pipeline.drafting.draft`. The adapter that drafts must be active during every
    step. A draft that left its row while nobody waited for it goes on from there: a retry reads nothing again.
    ``ended``: the finished drafts by attempt.
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
        count = sampling.max_tokens
        self._stream = {attempt: uniforms(sampling.seed, question, attempt, count) for attempt in attempts}
        logits = self._head(prefilled.last[:, None])[:, 0]
        start = [taken(cache, mx.array([0])) for cache in prefilled.caches]
        self._batches = [_Batch((_Row((), tuple(attempts)),), start, logits)]
        self._aside: list[_Aside] = []
        self.ended: dict[int, DraftTokens] = {}

    def step(self, wanted: Collection[int]) -> None:
        """One token more for those of the ``wanted`` attempts that have written least, or the end of them."""
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
        self._aside += [_Aside(row, batch.caches, place, end) for place, row in followers if (place, row) not in stay]
        if not stay:
            return
        places = [place for place, _ in stay]
        same = places == list(range(len(batch.rows)))
        caches = batch.caches if same else [taken(cache, mx.array(places)) for cache in batch.caches]
        self._read([row for _, row in stay], caches)

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
        found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for (place, attempt), token in zip(riding, chosen, strict=True):
            written = batch.rows[place].tokens
            if token in self._end_ids:
                self.ended[attempt] = DraftTokens(written, True)
            elif batch.length + 1 == self._sampling.max_tokens:
                self.ended[attempt] = DraftTokens((*written, token), False)
            else:
                found.setdefault((place, (*written, token)), []).append(attempt)
        return [(place, _Row(written, tuple(attempts))) for (place, written), attempts in found.items()]

    def _wake(self, wanted: Collection[int]) -> None:
        waking = [one for one in self._aside if any(attempt in wanted for attempt in one.row.attempts)]
        for one in waking:
            self._aside.remove(one)
            self._read([one.row], [taken(cache, mx.array([one.place]), one.end) for cache in one.caches])

    def _read(self, rows: Sequence[_Row], caches: Caches) -> None:
        """Read the last token of every row, and put the rows beside those of their length."""
        ids = mx.array([[row.tokens[-1]] for row in rows])
        logits = self._head(self._hidden(ids, cache=caches)[:, -1:])[:, 0]
        batch = _Batch(tuple(rows), caches, logits)
        other = next((one for one in self._batches if one.length == batch.length), None)
        if other is not None:
            self._batches.remove(other)
            beside = [joined(first, second) for first, second in zip(other.caches, batch.caches, strict=True)]
            batch = _Batch((*other.rows, *rows), beside, mx.concatenate([other.logits, logits]))
        self._batches.append(batch)
        mx.async_eval(batch.logits)
