"""What was read stays for a while: a conversation's next turn, or another question after the same words, reads on.

Texts are kept by the slot of the adapter that read them. A slot is named by what the adapter holds, so what is kept of
one that was unloaded is still right if it comes back. What the layers below the first one that an adapter changes make
of a prompt is the same for all adapters that leave them alone, so that another one only reads on above them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_rsgwm.inference.prefix_cache import select_rows

FEWEST = 32  # tokens that two texts have in common, at least, for which the rest is read by itself
FEWEST_SHARED = 64  # likewise, where the upper layers are to read them all

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Lower:
    """A text's first tokens above the first ``layers`` layers, which what read it does not change: ``states`` (1,
    tokens, dims)."""

    layers: int
    states: mx.array


@dataclass(frozen=True)
class Known:
    """The first ``count`` tokens of a text, which ``caches`` hold, as new ones: of all layers, or of as many as
    ``lower`` has. ``lower`` may be of fewer tokens, where the caches are of all layers."""

    count: int
    caches: list[Any]
    lower: Lower | None


@dataclass(eq=False)
class _Text:
    ids: Ids
    caches: list[Any]
    lower: Lower | None
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

    def keep(self, slot: str | None, ids: Ids, caches: Sequence[Any], place: int, lower: Lower | None = None) -> None:
        """Keep row ``place`` of caches whose last positions hold ``ids``; shorter texts that it begins with go."""
        if len(ids) < FEWEST:
            return
        rows, end = mx.array([place]), caches[0]._idx
        row = [select_rows(cache, rows, start=end - len(ids)) for cache in caches]
        arrays: list[mx.array] = [array for cache in row for array in self._arrays(cache)]
        arrays += [] if lower is None else [lower.states]
        mx.async_eval(arrays)
        nbytes = sum(array.nbytes for array in arrays)
        if nbytes > self._most:
            return
        for other in [other for other in self._texts.get(slot, ()) if ids[: len(other.ids)] == other.ids]:
            self._drop(other)
        text = _Text(ids, row, lower, nbytes)
        self._texts.setdefault(slot, []).append(text)
        self._order[text] = slot
        self.nbytes += nbytes
        while self.nbytes > self._most:
            self._drop(next(iter(self._order)))

    def longest(self, slot: str | None, ids: Ids) -> Known | None:
        """The most tokens of a text that are known, all but its last at most."""
        known = [(common(text.ids, ids[:-1]), text) for text in self._texts.get(slot, ())]
        count, text = max(known, key=lambda each: each[0], default=(0, None))
        if text is None or count < FEWEST:
            return None
        return self._known(text, count, text.caches, text.lower)

    def shared(self, ids: Ids, layers: int) -> Known | None:
        """Likewise, as at most the first ``layers`` layers read it for whatever adapter."""
        known = [
            (min(common(text.ids, ids[:-1]), text.lower.states.shape[1]), text.lower, text)
            for text in self._order
            if text.lower is not None and text.lower.layers <= layers
        ]
        count, lower, text = max(known, key=lambda each: each[0] * each[1].layers, default=(0, None, None))
        if text is None or lower is None or count < FEWEST_SHARED:
            return None
        return self._known(text, count, text.caches[: lower.layers], lower)

    def _known(self, text: _Text, count: int, caches: Sequence[Any], lower: Lower | None) -> Known:
        self._order[text] = self._order.pop(text)
        if lower is not None and lower.states.shape[1] > count:
            lower = replace(lower, states=mx.contiguous(lower.states[:, :count]))  # a view would keep all of them
        return Known(count, [select_rows(cache, mx.array([0]), length=count) for cache in caches], lower)

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
