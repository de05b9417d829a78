"""Rows written side by side: their caches, what follows each, and the step that reads a token more of all of them.

Drafts of ``ask`` (:mod:`~mlx_rsgwm.inference.batched_decode`) and texts of a server (``serving/rows.py``) are written
by it. It knows arrays and neither questions nor adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rsgwm.inference.prefix_cache import concat, read_on, select_rows
from mlx_rsgwm.models.split import LayerSplit, Parts


@dataclass(frozen=True)
class RowBatch:
    """Rows in ``caches``, padded on the left, and the ``logits`` (rows, vocabulary) of what follows each.

    ``middle``: the states (rows, length of the caches, dims) between lower and upper layers, where the model is split.
    All but :meth:`read` takes plain key–value caches.
    """

    caches: Sequence[Any]
    logits: mx.array
    middle: mx.array | None = None

    @property
    def length(self) -> int:
        """Positions in the caches."""
        return int(self.caches[0]._idx) if self.caches else 0

    def select(self, places: Sequence[int], start: int = 0, end: int | None = None) -> RowBatch:
        """Rows in another order, some of them or some more than once, from ``start``, before which all of them are
        padding, to ``end``; these keep nothing of the others."""
        rows = mx.array(list(places))
        caches = [select_rows(cache, rows, end, start) for cache in self.caches]
        middle = None if self.middle is None else self.middle[rows, start:end]
        return RowBatch(caches, self.logits[rows], middle)

    def padding(self, places: Sequence[int]) -> int:
        """Positions before all of the rows ``places``."""
        least: Any = self.caches[0].left_padding[mx.array(list(places))].min().item()
        return int(least)

    def beside(self, other: RowBatch) -> RowBatch:
        """The rows of both, these first; those of the shorter ones are padded on the left."""
        caches = [concat(first, second) for first, second in zip(self.caches, other.caches, strict=True)]
        middle = None
        if self.middle is not None and other.middle is not None:
            longest = max(self.length, other.length)
            parts = [(self.middle, self.length), (other.middle, other.length)]
            middle = mx.concatenate(
                [mx.pad(states, [(0, 0), (longest - length, 0), (0, 0)]) for states, length in parts]
            )
        return RowBatch(caches, mx.concatenate([self.logits, other.logits]), middle)

    def read(self, tokens: Sequence[int], parts: Parts, split: LayerSplit | None = None) -> RowBatch:
        """A token more of every row, by the adapters that are active; the caches grow where they are."""
        hidden, head = parts
        states, between = read_on(hidden, split, mx.array(list(tokens))[:, None], self.caches)
        middle = self.middle
        if middle is not None and between is not None:
            middle = mx.concatenate([middle, between], axis=1)
        return RowBatch(self.caches, head(states[:, -1:])[:, 0], middle)
