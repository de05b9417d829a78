"""A model as several adapters read the same rows: one batch, in which every adapter has its copy of them.

Row ``i`` of adapter ``t`` is row ``t · rows + i`` of what comes out. What lies below the first layer that any adapter
changes is the same for all, and is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_rsgwm.data.template import Template
from mlx_rsgwm.inference.draft import Signals
from mlx_rsgwm.inference.pool import together
from mlx_rsgwm.inference.prefix_cache import CachedPrefixes, LowerLayerCache, remembering
from mlx_rsgwm.inference.verifier import Reader, VerifierInput, read_by_each
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import Hidden, LayerSplit, Parts


class PoolLayers:
    """The parts of a model for several ``adapters`` by slot name.

    ``split``: the layers that none of the adapters changes, apart from the rest; None where there are none.
    """

    def __init__(
        self, slots: AdapterSlots, adapters: Sequence[str | None], parts: Parts, split: LayerSplit | None
    ) -> None:
        self._slots, self._adapters = slots, tuple(adapters)
        self._hidden, self._head = parts
        self._split = split

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
        """Hidden states (adapters · rows, tokens, dims) of ``ids`` (rows, tokens) by every adapter, one after another.

        ``cache`` holds rows as :meth:`copies` has them.
        """
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
        with self._rows(inputs.shape[0]):
            return layers(mx.concatenate([inputs] * len(self._adapters)), cache=cache)

    def _rows(self, count: int) -> Any:
        return self._slots.using_rows([name for name in self._adapters for _ in range(count)])


class PoolReader(Reader):
    """Several adapters as the verifier: all read each draft in one batch, ``rule`` makes one reading of theirs.

    ``split_of``: the layers that neither these adapters nor the drafter change, apart from the rest.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        adapters: Sequence[str],
        template: Template,
        parts: Parts,
        caches: int | None,
        split_of: Callable[[], LayerSplit | None],
        rule: str,
    ) -> None:
        super().__init__(slots, adapters, template, parts, caches)
        self._split_of, self._rule = split_of, rule

    def _layers(self) -> PoolLayers:
        shared = self._split_of() if self._caches is not None else None
        return PoolLayers(self._slots, self.adapters, self.parts, shared)

    def remembering(self, question: str) -> tuple[list[int], Parts]:
        """:meth:`prompt`, and the parts with which drafts after it are read: the prompt once by each adapter."""
        prompt, layers = self.prompt(question), self._layers()
        hidden = remembering(self._slots.model, layers.hidden, prompt, layers.copies(self._caches or 0))
        return prompt, (hidden, layers.head)

    def lower_cache(self, split: LayerSplit, prefixes: CachedPrefixes | None, prompt: Sequence[int]) -> LowerLayerCache:
        """What reads on, by every adapter, where the drafter's lower layers have read."""
        upper = self._layers().above(split)
        return LowerLayerCache(self._slots.model, upper, prefixes, prompt, adapters=len(self.adapters))

    def _read(
        self, readings: Sequence[VerifierInput], parts: Parts | None, lower_cache: LowerLayerCache | None
    ) -> list[Signals]:
        copies: Sequence[int] = ()
        if parts is None:
            layers = self._layers()
            parts, copies = layers.parts, layers.copies(self._caches or 0)
        with self._slots.using(None):  # for the layers below all of them: whatever was active is not
            by_each = read_by_each(parts, readings, self.verdict_ids, lower_cache, copies, len(self.adapters))
        return [together(said, self._rule) for said in zip(*by_each, strict=True)]


def in_order(slots: AdapterSlots, names: Sequence[str]) -> tuple[str, ...]:
    """The slots of a pool by their adapters' hashes, so that scores do not depend on how they are given."""
    return tuple(names) if len(names) < 2 else tuple(sorted(names, key=lambda name: slots.adapter(name).weights_hash()))


def reader_of(
    slots: AdapterSlots,
    verifiers: Sequence[str],
    template: Template,
    parts: Parts,
    caches: int | None,
    split_of: Callable[[], LayerSplit | None],
    rule: str,
) -> Reader:
    """The reader of a verifier: of several adapters, of one, or of the bare base where there is none."""
    if len(verifiers) > 1:
        return PoolReader(slots, verifiers, template, parts, caches, split_of, rule)
    return Reader(slots, tuple(verifiers) or (None,), template, parts, caches)
