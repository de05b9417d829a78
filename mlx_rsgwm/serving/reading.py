"""Texts on their way into the caches, a piece at a time, so that rows under way need not wait for long prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np

from mlx_rsgwm.inference.grafting import grafted, states_at
from mlx_rsgwm.inference.prefix_cache import read_on, select_rows
from mlx_rsgwm.inference.row_batch import RowBatch
from mlx_rsgwm.serving.prefixes import Known, Lower

if TYPE_CHECKING:
    from mlx_rsgwm.serving.rows import Row, RowDecoder


class Reading(Protocol):
    """Rows whose texts are being read."""

    rows: Sequence[Row]

    @property
    def size(self) -> tuple[int, int]:
        """Texts, and their tokens that are still to be read."""

    def read_on(self, tokens: int) -> bool:
        """Read as many positions of every text; True once all are read, and the rows stand among the decoder's."""


class TextsReading:
    """Rows with equal texts are read once.

    ``known``: for rows of one text, what is known of it. Where the model is split, the states between its lower and
    upper layers are left to rows whose adapters leave the lower ones alone.
    """

    def __init__(self, decoder: RowDecoder, rows: Sequence[Row], known: Known | None = None) -> None:
        self.rows: Sequence[Row] = sorted(rows, key=lambda row: row.slot or "")
        self._decoder = decoder
        texts = list(dict.fromkeys((row.slot, row.ids) for row in self.rows))
        self._place = {text: place for place, text in enumerate(texts)}
        self._slots = [slot for slot, _ in texts]
        longest = max(len(ids) for _, ids in texts)
        self._padding = [longest - len(ids) for _, ids in texts]
        self._ids = np.array([[0] * pad + list(ids) for pad, (_, ids) in zip(self._padding, texts, strict=True)])
        self._lower = None if known is None else known.lower
        self._split = decoder.split(decoder.boundary if self._lower is None else self._lower.layers)
        self._middle: list[mx.array] = []
        caches = decoder.fresh(self._padding)
        if known is None:
            self._read, self._caches = 0, caches
        elif len(known.caches) == len(caches):
            self._read, self._caches = known.count, known.caches
        else:  # the upper layers read from the beginning
            self._read, self._caches = 0, [*known.caches, *caches[len(known.caches) :]]
        for row in self.rows:
            row.cached = self._read

    @property
    def size(self) -> tuple[int, int]:
        """Texts, and their tokens that are still to be read."""
        return self._ids.shape[0], self._ids.shape[1] - self._read

    def read_on(self, tokens: int) -> bool:
        """Read as many positions of every text; True once all are read, and the rows stand among the decoder's."""
        decoder = self._decoder
        with decoder.slots.using_rows(self._slots):
            states = self._states(tokens)
            self._read += states.shape[1]
            over = self._read == self._ids.shape[1]
            logits = decoder.parts[1](states[:, -1:])[:, 0] if over else states[:, -1]
            mx.eval(logits, [cache.state for cache in self._caches], self._middle)
        if over:
            places = [self._place[row.slot, row.ids] for row in self.rows]
            self._leave_lower(places)
            decoder.take_in(self.rows, places, RowBatch(self._caches, logits))
        return over

    def _states(self, tokens: int) -> mx.array:
        """The last hidden states (texts, positions, dims) of at most as many positions, which come next."""
        hidden, split, lower = self._decoder.parts[0], self._split, self._lower
        if split is not None and lower is not None and self._read < self._caches[0]._idx:
            # The lower layers know them; the others read on from there.
            end = min(self._read + tokens, lower.states.shape[1])
            return split.upper(lower.states[:, self._read : end], cache=self._caches[split.count :])
        states, middle = read_on(hidden, split, mx.array(self._ids[:, self._read : self._read + tokens]), self._caches)
        self._middle += [] if middle is None else [middle]
        return states

    def _leave_lower(self, places: Sequence[int]) -> None:
        if self._split is None:
            return
        middle = self._middle
        if self._lower is not None:
            middle = [self._lower.states, *middle]
        states = mx.concatenate(middle, axis=1)
        for row, place in zip(self.rows, places, strict=True):
            if states.shape[1] < self._ids.shape[1]:
                row.lower = self._lower  # of what else was known, the states are not
            elif self._decoder.first_changed(row.slot) >= self._split.count:
                row.lower = Lower(self._split.count, mx.contiguous(states[place : place + 1, self._padding[place] :]))
                mx.async_eval(row.lower.states)


class ChainsReading:
    """Grafted chains of one prompt, which is read once: what comes before its last token for all of them, that token
    with each chain's graft. All have written the same number of tokens, which are read behind it."""

    def __init__(self, decoder: RowDecoder, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._decoder = decoder
        self._before, self._last = rows[0].prompt[:-1], rows[0].prompt[-1]
        self._caches, self._read = decoder.fresh([0]), 0
        self._states: list[mx.array] = []

    @property
    def size(self) -> tuple[int, int]:
        """One text, and its tokens that are still to be read."""
        return 1, len(self._before) + 1 - self._read

    def read_on(self, tokens: int) -> bool:
        """Read as many positions of the prompt; True once all are read, and the rows stand among the decoder's."""
        decoder, chain = self._decoder, self.rows[0].chain
        assert chain is not None
        piece = self._before[self._read : self._read + tokens]
        with decoder.slots.using(self.rows[0].slot):
            if piece:
                states = states_at(decoder.slots.model, decoder.parts[0], mx.array([piece]), self._caches, chain.place)
                self._states += [] if states is None else [states]
                self._read += len(piece)
            over = self._read == len(self._before) and len(piece) < tokens
            if over:
                self._end()
        return over

    def _end(self) -> None:
        decoder, count = self._decoder, len(self.rows)
        chains = [row.chain for row in self.rows if row.chain is not None]
        hidden, head = decoder.parts
        caches = self._caches
        if count > 1:
            first = mx.zeros(count, dtype=mx.int32)
            caches = [select_rows(cache, first) for cache in caches] if self._read else decoder.fresh([0] * count)
        before = mx.concatenate(self._states, axis=1) if self._states else None
        kinds = [chain.kind for chain in chains]
        with grafted(decoder.slots.model, chains[0].place, before, [0], kinds, chains[0].seed):
            states = hidden(mx.full((count, 1), self._last), cache=caches)
        if self.rows[0].tokens:
            states = hidden(mx.array([row.tokens for row in self.rows]), cache=caches)
        logits = head(states[:, -1:])[:, 0]
        mx.eval(logits, [cache.state for cache in caches])
        decoder.take_in(self.rows, range(count), RowBatch(caches, logits))
