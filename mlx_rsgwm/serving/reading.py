"""Texts on their way into the caches, a piece at a time, so that rows under way need not wait for long prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_rsgwm.inference.grafting import grafted, states_at
from mlx_rsgwm.inference.prefix_cache import select_rows
from mlx_rsgwm.inference.row_batch import RowBatch

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

    With ``known``, for rows of one text: how many of its tokens are read already, and the caches that hold them.
    """

    def __init__(self, decoder: RowDecoder, rows: Sequence[Row], known: tuple[int, list[Any]] | None = None) -> None:
        self.rows: Sequence[Row] = sorted(rows, key=lambda row: row.slot or "")
        self._decoder = decoder
        texts = list(dict.fromkeys((row.slot, row.ids) for row in self.rows))
        self._place = {text: place for place, text in enumerate(texts)}
        self._slots = [slot for slot, _ in texts]
        longest = max(len(ids) for _, ids in texts)
        padding = [longest - len(ids) for _, ids in texts]
        self._ids = np.array([[0] * pad + list(ids) for pad, (_, ids) in zip(padding, texts, strict=True)])
        self._read, self._caches = known or (0, decoder.fresh(padding))
        for row in self.rows:
            row.cached = self._read

    @property
    def size(self) -> tuple[int, int]:
        """Texts, and their tokens that are still to be read."""
        return self._ids.shape[0], self._ids.shape[1] - self._read

    def read_on(self, tokens: int) -> bool:
        """Read as many positions of every text; True once all are read, and the rows stand among the decoder's."""
        decoder = self._decoder
        hidden, head = decoder.parts
        piece = mx.array(self._ids[:, self._read : self._read + tokens])
        with decoder.slots.using_rows(self._slots):
            states = hidden(piece, cache=self._caches)
            self._read += piece.shape[1]
            over = self._read == self._ids.shape[1]
            logits = head(states[:, -1:])[:, 0] if over else states[:, -1]
            mx.eval(logits, [cache.state for cache in self._caches])
        if over:
            places = [self._place[row.slot, row.ids] for row in self.rows]
            decoder.take_in(self.rows, places, RowBatch(self._caches, logits))
        return over


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
