"""What was read stays for a while: a conversation's next turn, or another question after the same words, reads on.

Texts are kept by the slot of the adapter that read them. A slot is named by what the adapter holds, so what is kept of
one that was unloaded is still right if it comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rsgwm.inference.prefix_cache import select_rows

FEWEST = 32  # tokens that two texts have in common, at least, for which the rest is read by itself

Ids = tuple[int, ...]


@dataclass(eq=False)
class _Text:
    ids: Ids
    caches: list[Any]
    nbytes: int


class PrefixStore:
    """Caches of texts, each a row by itself without padding; the least recently used go first.

    ``most``: bytes of all of them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._texts: dict[str | None, list[_Text]] = {}
        self._order: dict[_Text, str | None] = {}  # least recently used first
        self.nbytes = 0

    def keep(self, slot: str | None, ids: Ids, caches: Sequence[Any], place: int) -> None:
        """Keep row ``place`` of caches whose last positions hold ``ids``; shorter texts that it begins with go."""
        if len(ids) < FEWEST:
            return
        rows, end = mx.array([place]), caches[0]._idx
        row = [select_rows(cache, rows, start=end - len(ids)) for cache in caches]
        arrays: list[mx.array] = [array for cache in row for array in self._arrays(cache)]
        mx.async_eval(arrays)
        nbytes = sum(array.nbytes for array in arrays)
        if nbytes > self._most:
            return
        for other in [other for other in self._texts.get(slot, ()) if ids[: len(other.ids)] == other.ids]:
            self._drop(other)
        text = _Text(ids, row, nbytes)
        self._texts.setdefault(slot, []).append(text)
        self._order[text] = slot
        self.nbytes += nbytes
        while self.nbytes > self._most:
            self._drop(next(iter(self._order)))

    def longest(self, slot: str | None, ids: Ids) -> tuple[int, list[Any]] | None:
        """How many tokens of a text are known, all but its last at most, and new caches that hold them."""
        known = [(common(text.ids, ids[:-1]), text) for text in self._texts.get(slot, ())]
        count, text = max(known, key=lambda each: each[0], default=(0, None))
        if text is None or count < FEWEST:
            return None
        self._order[text] = self._order.pop(text)
        return count, [select_rows(cache, mx.array([0]), length=count) for cache in text.caches]

    @staticmethod
    def _arrays(cache: Any) -> tuple[mx.array, mx.array]:
        return cache.keys, cache.values

    def _drop(self, text: _Text) -> None:
        slot = self._order.pop(text)
        self._texts[slot].remove(text)
        if not self._texts[slot]:
            del self._texts[slot]  # sums of adapters have ever new names
        self.nbytes -= text.nbytes


def common(first: Ids, second: Ids) -> int:
    """How many tokens two texts begin with alike."""
    least, most = 0, min(len(first), len(second))
    while least < most:
        middle = (least + most + 1) // 2
        if first[:middle] == second[:middle]:
            least = middle
        else:
            most = middle - 1
    return least
