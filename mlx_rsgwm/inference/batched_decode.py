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

from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.inference.prefix_cache import GROWTH, CachedPrefix, Prefilled, prefill, select_rows
from mlx_rsgwm.inference.row_batch import RowBatch
from mlx_rsgwm.inference.sampling import Sampling, choose, choose_exact, uniforms
from mlx_rsgwm.models.split import LayerSplit, Parts

Key = tuple[int, int]  # place of the question, number of the attempt


@dataclass(frozen=True)
class _Row:
    tokens: tuple[int, ...]
    attempts: tuple[Key, ...]


@dataclass(frozen=True)
class _Batch:
    """Rows, all read, and their arrays."""

    rows: tuple[_Row, ...]
    arrays: RowBatch


@dataclass(frozen=True)
class _ParkedRow:
    """A row that nobody waits for. Its last token is not read; the others are row ``place`` of a batch, whose caches
    may have gone further than ``end`` since."""

    row: _Row
    batch: _Batch
    place: int
    end: int


class BatchedDecoder:
    """Drafts of some prompts, each with its own random stream, written no further than they are asked for.

    A draft goes by the place of its question (the first that came in is 0) and the number of its attempt.

    They are those of :func:`~mlx_rsgwm.inference.generate.draft`, and have no text yet. The adapter that drafts must be
    active in :meth:`read` and every :meth:`step`. A draft that left its row while nobody waited for it goes on from
    there: a retry reads nothing again. Prompts that come in later are written beside those that are under way.
    ``ended``: the finished drafts. ``prefixes``: where the model is split, how its lower layers read them.
    """

    def __init__(
        self,
        model: Any,
        parts: Parts,
        end_ids: frozenset[int],
        sampling: Sampling,
        split: LayerSplit | None = None,
    ) -> None:
        self._model, self._parts = model, parts
        self._split = split
        self._sampling = sampling
        self._end_ids = end_ids
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._streams: dict[Key, np.ndarray] = {}
        self._batch: _Batch | None = None
        self._parked: list[_ParkedRow] = []
        self._next = 0
        self.ended: dict[Key, Draft] = {}
        self.prefixes: dict[tuple[int, ...], CachedPrefix] = {}

    def read(self, prompts: Sequence[Sequence[int]], questions: Sequence[str], attempts: Sequence[int]) -> range:
        """Read the prompts of more questions, and :meth:`add` them."""
        return self.add(prefill(self._model, self._parts[0], prompts, self._split), questions, attempts)

    def add(self, prefilled: Prefilled, questions: Sequence[str], attempts: Sequence[int]) -> range:
        """More questions with their prompts, read by the adapter that drafts, and the attempts that each may make;
        returns their places."""
        places = range(self._next, self._next + len(questions))
        self._next = places.stop
        self._prompts |= dict(zip(places, prefilled.prompts, strict=True))
        for place, question in zip(places, questions, strict=True):
            for attempt in attempts:
                stream = uniforms(self._sampling.seed, question, attempt, self._sampling.max_tokens)
                self._streams[place, attempt] = stream
        logits = self._parts[1](prefilled.last[:, None])[:, 0]
        start = [select_rows(cache, mx.arange(len(questions))) for cache in prefilled.caches]
        rows = tuple(_Row((), tuple((place, attempt) for attempt in attempts)) for place in places)
        self._take_in(rows, RowBatch(start, logits, prefilled.middle))
        return places

    def forget(self, place: int) -> None:
        """Let go of all that is kept of a question."""
        prompt = self._prompts.pop(place)
        self._parked = [parked for parked in self._parked if parked.row.attempts[0][0] != place]
        for key in [key for key in self._streams if key[0] == place]:
            del self._streams[key]
            self.ended.pop(key, None)
        for tokens in [tokens for tokens in self.prefixes if tokens[: len(prompt)] == prompt]:
            del self.prefixes[tokens]

    def written(self, key: Key) -> tuple[int, ...]:
        """The tokens of an attempt so far."""
        if key in self.ended:
            return self.ended[key].tokens
        rows = self._batch.rows if self._batch is not None else ()
        return next((row.tokens for row in rows if key in row.attempts), ())

    def step(self, wanted: Collection[Key]) -> None:
        """One token more for each of the ``wanted`` attempts, or the end of it."""
        wanted = set(wanted)
        self._wake(wanted)
        batch, self._batch = self._batch, None
        if batch is None:
            return
        followers = self._followers(batch)
        stay = [(place, row) for place, row in followers if any(attempt in wanted for attempt in row.attempts)]
        parked = [(place, row) for place, row in followers if (place, row) not in stay]
        self._parked += [_ParkedRow(row, batch, place, batch.arrays.length) for place, row in parked]
        if not stay:
            return
        rows = [row for _, row in stay]
        self._read_last(rows, self._remaining(batch, [place for place, _ in stay], rows))

    def _remaining(self, batch: _Batch, places: list[int], rows: Sequence[_Row]) -> RowBatch:
        """Some of a batch's rows, without padding that none of them needs."""
        needed = max(len(self._prompts[row.attempts[0][0]]) + len(row.tokens) - 1 for row in rows)
        spare = batch.arrays.length - needed
        if places == list(range(len(batch.rows))) and spare < GROWTH:
            return batch.arrays
        return batch.arrays.select(places, spare)

    def _followers(self, batch: _Batch) -> list[tuple[int, _Row]]:
        """The rows that come of a batch's rows with one token more, each with its row's place; ends are noted."""
        riding = [
            (place, attempt) for place, row in enumerate(batch.rows) for attempt in row.attempts
            if attempt in self._streams
        ]  # fmt: skip
        if not riding:
            return []
        rows = mx.array([place for place, _ in riding])
        uniform = mx.array(
            np.array([self._streams[attempt][len(batch.rows[place].tokens)] for place, attempt in riding])
        )
        temperature, top_p = self._sampling.temperature, self._sampling.top_p
        tokens, certain = choose(batch.arrays.logits, uniform, temperature, top_p, rows)
        mx.eval(tokens, certain)
        if not mx.all(certain).item():
            tokens = choose_exact(batch.arrays.logits, uniform, temperature, top_p, rows)
        chosen: Any = tokens.tolist()
        followers: dict[tuple[int, tuple[int, ...]], list[Key]] = {}
        for (place, attempt), token in zip(riding, chosen, strict=True):
            written = batch.rows[place].tokens
            if token in self._end_ids or len(written) + 1 == self._sampling.max_tokens:
                finished = token in self._end_ids
                self.ended[attempt] = Draft(attempt[1], written if finished else (*written, token), finished)
                self._keep_prefix(batch, place)
            else:
                followers.setdefault((place, (*written, token)), []).append(attempt)
        return [(place, _Row(written, tuple(attempts))) for (place, written), attempts in followers.items()]

    def _keep_prefix(self, batch: _Batch, place: int) -> None:
        arrays = batch.arrays
        if self._split is None or arrays.middle is None:
            return
        row = batch.rows[place]
        prompt = self._prompts[row.attempts[0][0]]
        tokens = (*prompt, *row.tokens)
        if tokens not in self.prefixes:
            end = arrays.length
            middle = arrays.middle[place : place + 1, end - len(tokens) :]
            lower = arrays.caches[: self._split.count]
            if self._next > 1:  # a view would keep the whole batch, as the caches do
                middle, lower = mx.contiguous(middle), ()
                mx.async_eval(middle)
            self.prefixes[tokens] = CachedPrefix(tokens, middle, lower, place, end)

    def _wake(self, wanted: Collection[Key]) -> None:
        groups: dict[tuple[int, int], list[_ParkedRow]] = {}
        for parked in [row for row in self._parked if any(attempt in wanted for attempt in row.row.attempts)]:
            self._parked.remove(parked)
            groups.setdefault((id(parked.batch), parked.end), []).append(parked)
        for group in groups.values():
            arrays = group[0].batch.arrays.select([parked.place for parked in group], end=group[0].end)
            self._read_last([parked.row for parked in group], arrays)

    def _read_last(self, rows: Sequence[_Row], arrays: RowBatch) -> None:
        """Read the last token of every row, and put the rows beside those that are under way."""
        self._take_in(rows, arrays.read([row.tokens[-1] for row in rows], self._parts, self._split))

    def _take_in(self, rows: Sequence[_Row], arrays: RowBatch) -> None:
        other = self._batch
        if other is not None:
            rows, arrays = (*other.rows, *rows), other.arrays.beside(arrays)
        self._batch = _Batch(tuple(rows), arrays)
        mx.async_eval(arrays.logits)
