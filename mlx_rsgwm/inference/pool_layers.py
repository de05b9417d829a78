"""A model as several adapters read the same rows: one batch, in which every adapter has its copy of them.

Row ``i`` of adapter ``t`` is row ``t · rows + i`` of what comes out. What lies below the first layer that any adapter
changes is the same for all, and is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import Hidden, LayerSplit, Parts


class PoolLayers:
    """The parts of a model for ``adapters`` by slot name (None: the bare base); for a single one, the parts themselves.

    ``split``: the layers that none of the adapters changes, apart from the rest; None where there are none.
    """

    def __init__(
        self, slots: AdapterSlots, adapters: Sequence[str | None], parts: Parts, split: LayerSplit | None
    ) -> None:
        self._slots, self._adapters = slots, tuple(adapters)
        self._hidden, self._head = parts
        self._split = split if len(self._adapters) > 1 else None

    @property
    def parts(self) -> Parts:
        """``hidden`` takes ids (rows, length) and gives states (adapters · rows, length, dims), which ``head`` takes,
        or as many states of each of them."""
        return self.hidden, self.head

    def copies(self, caches: int) -> list[int]:
        """For each of the model's ``caches``, how many adapters it keeps the rows of."""
        lower = 0 if self._split is None else self._split.count
        return [1] * lower + [len(self._adapters)] * (caches - lower)

    def hidden(self, ids: mx.array, cache: Any = None) -> mx.array:
        """Hidden states of ``ids`` by every adapter; ``cache`` holds rows as :meth:`copies` has them."""
        if self._split is None:
            return self._by_each(self._hidden, ids, cache)
        count = self._split.count
        lower, upper = (None, None) if cache is None else (cache[:count], cache[count:])
        return self._by_each(self._split.upper, self._split.lower(ids, cache=lower), upper)

    def head(self, states: mx.array) -> mx.array:
        """Logits of states (adapters · n, dims), the same number of every adapter."""
        with self._rows(states.shape[0] // len(self._adapters)):
            return self._head(states)

    def above(self, split: LayerSplit) -> LayerSplit:
        """``split`` with upper layers that read the rows once for every adapter."""

        def upper(states: mx.array, cache: Any = None) -> mx.array:
            return self._by_each(split.upper, states, cache)

        return replace(split, upper=upper)

    def _by_each(self, layers: Hidden, inputs: mx.array, cache: Any) -> mx.array:
        copies = inputs if len(self._adapters) == 1 else mx.concatenate([inputs] * len(self._adapters))
        with self._rows(inputs.shape[0]):
            return layers(copies, cache=cache)

    def _rows(self, count: int) -> Any:
        return self._slots.using_rows([name for name in self._adapters for _ in range(count)])


SplitOf = Callable[[], LayerSplit | None]
