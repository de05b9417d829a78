"""Rows of several adapters written side by side on one base: read prompts, draw tokens, read them, let rows go.

A row is one text under way. The decoder knows adapters by their slots and nothing of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from mlx_rsgwm.inference.grafting import Chain
from mlx_rsgwm.inference.prefix_cache import GROWTH
from mlx_rsgwm.inference.row_batch import RowBatch
from mlx_rsgwm.models.row_batches import can_batch
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import LayerSplit, split_head, split_layers
from mlx_rsgwm.serving.grammar import Grammar
from mlx_rsgwm.serving.prefixes import Known, Lower, PrefixStore
from mlx_rsgwm.serving.reading import ChainsReading, Reading, TextsReading
from mlx_rsgwm.serving.row_sampling import Pick, RowSampling, pick


@dataclass(eq=False)
class Row:
    """A text under way: its prompt, the slot of its adapter (None: the bare base), how and how far it is written.

    ``uniforms``: its random stream, a number for each of the tokens that it may have. ``owner``: whose it is, for the
    engine. ``cached``: how many of its first tokens were not read for it, being known. ``grammar``: what it may write.
    ``chain``: what is replaced as the prompt's last token is read. ``lower``: its first tokens as other adapters may
    read them on.
    """

    prompt: tuple[int, ...]
    slot: str | None
    sampling: RowSampling
    uniforms: np.ndarray
    end_ids: frozenset[int]
    owner: Any = None
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    grammar: Grammar | None = None
    chain: Chain | None = None
    lower: Lower | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """All its tokens, the prompt's first."""
        return (*self.prompt, *self.tokens)

    @property
    def longest(self) -> int:
        """Positions that it takes up at most."""
        return len(self.prompt) + len(self.uniforms)


@dataclass
class _Batch:
    """Rows whose tokens are all read, and the place of each in ``arrays``: rows of one prompt share it while they say
    the same, as attempts at a question mostly begin."""

    rows: list[Row]
    places: list[int]
    arrays: RowBatch


class RowDecoder:
    """All rows under way on the base of ``slots``; ``prefixes``: bytes of texts that are kept once they are written.

    Where the model keeps other than plain key–value caches rows cannot share a batch: each is a batch of its own.
    """

    def __init__(self, slots: AdapterSlots, prefixes: int = 0) -> None:
        self.slots = slots
        self.prefixes = PrefixStore(prefixes)
        self.parts = split_head(slots.model)
        self.together = can_batch(slots.model)
        self._batches: list[_Batch] = []
        self._layers = len(make_prompt_cache(slots.model))
        self._first_changed: dict[str | None, int] = {}
        self._splits: dict[int, LayerSplit | None] = {}
        self.bytes_a_token = self._measure()

    @property
    def rows(self) -> list[Row]:
        """The rows under way whose texts are read."""
        return [row for batch in self._batches for row in batch.rows]

    def fresh(self, padding: Sequence[int]) -> list[Any]:
        """Empty caches for as many texts, padded on the left."""
        caches: list[Any] = make_prompt_cache(self.slots.model)
        if not self.together:
            return caches
        batched: list[Any] = [BatchKVCache(list(padding)) for _ in caches]
        for cache in batched:
            cache.step = GROWTH
        return batched

    def read(self, rows: Sequence[Row]) -> list[Reading]:
        """What reads the texts of new rows; one for all of them that have nothing known, where the model allows it."""
        chains = [row for row in rows if row.chain is not None]
        plain = [row for row in rows if row.chain is None]
        if not self.together:
            return [*(TextsReading(self, [row]) for row in plain), *(ChainsReading(self, [row]) for row in chains)]
        texts: dict[tuple[str | None, tuple[int, ...]], list[Row]] = {}
        for row in plain:
            texts.setdefault((row.slot, row.ids), []).append(row)
        known = {text: self._known(*text) for text in texts}
        new = [row for text, alike in texts.items() if known[text] is None for row in alike]
        readings = [TextsReading(self, alike, known[text]) for text, alike in texts.items() if known[text] is not None]
        prompts: dict[tuple[Any, ...], list[Row]] = {}
        for row in chains:
            prompts.setdefault((row.slot, row.prompt, len(row.tokens)), []).append(row)
        return [
            *readings,
            *([TextsReading(self, new)] if new else []),
            *(ChainsReading(self, alike) for alike in prompts.values()),
        ]

    def _known(self, slot: str | None, ids: tuple[int, ...]) -> Known | None:
        """What spares the most of a text's reading: all layers of its first tokens, or the lower ones of more."""
        known, shared = self.prefixes.longest(slot, ids), self.prefixes.shared(ids, self.first_changed(slot))
        if known is None or shared is None or shared.lower is None:
            return known or shared
        return known if known.count * self._layers >= shared.count * shared.lower.layers else shared

    def first_changed(self, slot: str | None) -> int:
        """The first layer that an adapter changes; of the base, their number."""
        if slot not in self._first_changed:
            self._first_changed[slot] = self.slots.first_changed([] if slot is None else [slot])
        return self._first_changed[slot]

    @property
    def boundary(self) -> int:
        """So many layers are changed by none of the adapters but those that change the first one; 0 for none."""
        slots = (*self.slots.names(), *self.slots.sums())
        self._first_changed = {slot: self.first_changed(slot) for slot in (None, *slots)}  # of no others any more
        changed = [self._first_changed[slot] for slot in slots if self._first_changed[slot]]
        return min(changed, default=0) if self.together else 0

    def split(self, layers: int) -> LayerSplit | None:
        """The first ``layers`` layers apart from the rest; None where there are none, or the model is not built so."""
        if layers not in self._splits:
            self._splits[layers] = split_layers(self.slots.model, layers)
        return self._splits[layers]

    def take_in(self, rows: Sequence[Row], places: Sequence[int], arrays: RowBatch) -> None:
        """Rows whose texts are read, each at a place in ``arrays``."""
        batch = _Batch(list(rows), list(places), arrays)
        if self.together and self._batches:
            other = self._batches.pop()
            first = other.arrays.logits.shape[0]
            places = [*other.places, *(first + place for place in places)]
            batch = _Batch([*other.rows, *rows], places, other.arrays.beside(arrays))
        self._batches.append(batch)

    def drop(self, rows: Collection[Row]) -> None:
        """Let rows go; for a while their texts stay known. Their places go with the next token."""
        for batch in self._batches if rows else ():
            placed = list(zip(batch.rows, batch.places, strict=True))
            self._remember(batch, {place: row for row, place in placed if row in rows})
            left = [(row, place) for row, place in placed if row not in rows]
            batch.rows, batch.places = [row for row, _ in left], [place for _, place in left]
        self._batches = [batch for batch in self._batches if batch.rows]

    def draw(self) -> list[tuple[Row, Pick | Exception]]:
        """The next token of every row, which is not yet read and not yet among its ``tokens``; or why there is none."""
        drawn: list[tuple[Row, Pick | Exception]] = []
        for batch in self._batches:
            logits = batch.arrays.logits
            if batch.places != list(range(logits.shape[0])):
                logits = logits[mx.array(batch.places)]
            try:
                drawn += zip(batch.rows, _picks(batch.rows, logits), strict=True)
            except Exception:
                # Whatever it was, each row by itself shows whose it is.
                drawn += [(row, _pick_alone(row, logits[at : at + 1])) for at, row in enumerate(batch.rows)]
        return drawn

    def read_last(self) -> None:
        """Read the last token of every row; once for those that share a place and drew the same.

        Rows of one adapter come to stand side by side, for each run of them is a product of its own.
        """
        for batch in self._batches:
            texts: dict[tuple[str, int, int], list[Row]] = {}
            for row, place in zip(batch.rows, batch.places, strict=True):
                texts.setdefault((row.slot or "", place, row.tokens[-1]), []).append(row)
            order = sorted(texts)
            arrays, places = batch.arrays, [place for _, place, _ in order]
            if places != list(range(arrays.logits.shape[0])):
                arrays = arrays.select(places, arrays.padding(places))
            with self.slots.using_rows([texts[text][0].slot for text in order]):
                batch.arrays = arrays.read([token for _, _, token in order], self.parts)
            batch.rows = [row for text in order for row in texts[text]]
            batch.places = [place for place, text in enumerate(order) for _ in texts[text]]
            mx.async_eval(batch.arrays.logits)

    def forget(self) -> list[Row]:
        """Let all rows go after a failure, whatever state their caches are in; returns them, to be read anew."""
        rows = self.rows
        self._batches = []
        return rows

    def _remember(self, batch: _Batch, leaving: Mapping[int, Row]) -> None:
        """Keep what is read of rows that leave a batch, by their places; of chains nothing, which have other states
        than their texts."""
        leaving = {place: row for place, row in leaving.items() if row.chain is None}
        if not leaving or not self.together:
            return
        caches = batch.arrays.caches
        padding: Any = caches[0].left_padding.tolist()
        for place, row in leaving.items():
            self.prefixes.keep(row.slot, row.ids[: batch.arrays.length - padding[place]], caches, place, row.lower)

    def _measure(self) -> int:
        """Bytes that a token takes in the caches; also warms the model up."""
        caches = self.fresh([0])
        hidden, head = self.parts
        mx.eval(head(hidden(mx.zeros((1, GROWTH), dtype=mx.int32), cache=caches)[:, -1:]))
        return max(1, sum(_bytes_a_position(cache) for cache in caches))


def _bytes_a_position(cache: Any) -> int:
    """Bytes of a layer's cache for a token; of caches that do not grow by token, all that they take, in 256 parts."""
    keys = getattr(cache, "keys", None)
    return int(cache.nbytes) // (keys.shape[2] if isinstance(keys, mx.array) and keys.ndim == 4 else 256)


def _picks(rows: Sequence[Row], logits: mx.array) -> list[Pick]:
    return pick(
        logits,
        [row.sampling for row in rows],
        [float(row.uniforms[len(row.tokens)]) for row in rows],
        [row.prompt for row in rows],
        [row.tokens for row in rows],
        [None if row.grammar is None else row.grammar.allowed() for row in rows],
    )


def _pick_alone(row: Row, logits: mx.array) -> Pick | Exception:
    try:
        return _picks([row], logits)[0]
    except Exception as error:
        return error
