"""Many named adapters on one resident base: switching changes one name, no weight moves.

The wrapped layers compute what mlx-lm's ``LoRALinear`` computes, so outputs equal mlx-lm's own loading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.fit_check import check_fit, dora_changes_nothing, find_module
from mlx_rsgwm.models.linux_products import product

LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LowRank:
    """What one adapter adds to one layer: a (in, r), b (r, out), scale; DoRA's ``gain``, see :func:`_gain`, (out,)."""

    a: mx.array
    b: mx.array
    scale: float
    gain: mx.array | None = None


@dataclass
class ActiveAdapter:
    """Which adapter the wrapped layers apply. Shared by all layers of one model.

    ``runs``: (name, first row, last row + 1) of a batch, name None for the bare base; None at the end for all
    the rest. ``retired``: another :class:`AdapterSlots` has the model now, so selecting here would change nothing.
    """

    runs: tuple[tuple[str | None, int, int | None], ...] = ((None, 0, None),)
    retired: bool = False

    @property
    def name(self) -> str | None:
        """The adapter of all rows; None for the bare base, and where rows differ."""
        return self.runs[0][0] if len(self.runs) == 1 else None


class Slots(nn.Module):
    """A layer with several low-rank updates, of which the active one is added, to each run of rows its own."""

    def __init__(self, layer: nn.Module, active: ActiveAdapter) -> None:
        super().__init__()
        self.linear = layer
        self.active = active
        # The leading underscore keeps these out of parameters(): they belong to no checkpoint of the base.
        self._factors: dict[str, tuple[LowRank, ...]] = {}  # of a sum of adapters several

    @property
    def bare(self) -> nn.Module:
        """The layer without slots, which an adapter has to fit."""
        layer: nn.Module = self.linear
        return layer

    def _update(self, x: mx.array, y: mx.array, apply: Callable[[mx.array, mx.array, LowRank], mx.array]) -> mx.array:
        def updated(name: str | None, x: mx.array, y: mx.array) -> mx.array:
            for factors in self._factors.get(name or "", ()):
                y = apply(x, y, factors)
            return y

        runs = self.active.runs
        if len(runs) == 1:
            return updated(runs[0][0], x, y)
        return mx.concatenate([updated(name, x[start:stop], y[start:stop]) for name, start, stop in runs], axis=0)


class SlotLinear(Slots):
    """A linear layer, dense or quantised: y + scale · (x A) B; for DoRA, without the bias, gain ⊙ that."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._update(x, self.linear(x), self._apply)

    def _apply(self, x: mx.array, y: mx.array, update: LowRank) -> mx.array:
        added = (update.scale * product(product(x, update.a.T), update.b.T)).astype(x.dtype)
        if update.gain is None:
            return y + added
        bias = self.linear.bias if "bias" in self.linear else None
        plain = (y if bias is None else y - bias) + added
        scaled: mx.array = update.gain.astype(x.dtype) * plain
        return scaled if bias is None else scaled + bias


class SlotEmbedding(Slots):
    """An embedding: rows of W + scale · A B, and the same matrix when it is used as the output head."""

    def __call__(self, ids: mx.array) -> mx.array:
        def apply(ids: mx.array, y: mx.array, update: LowRank) -> mx.array:
            return y + (update.scale * (update.a[ids] @ update.b)).astype(y.dtype)

        return self._update(ids, self.linear(ids), apply)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of states ``x`` (rows, …, dims)."""

        def apply(x: mx.array, y: mx.array, update: LowRank) -> mx.array:
            return y + (update.scale * ((x @ update.b.T) @ update.a.T)).astype(y.dtype)

        return self._update(x, self.linear.as_linear(x), apply)


class AdapterSlots:
    """Named adapters on one base model. Loading wraps layers once; ``use`` selects in constant time.

    A model has one set of slots: a new one takes the model over, and the former refuses any further use.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model: Any = base.model
        self._active = ActiveAdapter()
        self._loaded: dict[str, Adapter] = {}
        self._sums: dict[str, list[str]] = {}  # slots that hold a sum of adapters, and the modules that it changes
        unwrap(self.model)

    @property
    def active(self) -> str | None:
        """The name of the adapter in use; None for the bare base."""
        return self._active.name

    def names(self) -> list[str]:
        """Names of the loaded adapters, in the order in which they were loaded."""
        return list(self._loaded)

    def adapter(self, name: str) -> Adapter:
        """The loaded adapter of that name."""
        if name not in self._loaded:
            raise RsgwmError(f"no adapter named {name!r} is loaded; there are: {', '.join(self._loaded) or 'none'}")
        return self._loaded[name]

    def sums(self) -> list[str]:
        """Names of the slots that :meth:`add` filled."""
        return list(self._sums)

    def modules(self, name: str) -> list[str]:
        """The modules that a slot changes."""
        return self._sums[name] if name in self._sums else self.adapter(name).modules()

    def use(self, name: str | None) -> None:
        """Make one loaded adapter, or one sum of them, the active one, or none (the bare base)."""
        self._require_model()
        if name is not None:
            self.modules(name)
        self._active.runs = ((name, 0, None),)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """``use`` for the length of a block; the former choice comes back even after an error."""
        before = self._active.runs
        self.use(name)
        try:
            yield
        finally:
            self._active.runs = before

    @contextmanager
    def using_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """For the length of a block, row i of every batch goes through the adapter ``names[i]`` (None: the bare base).

        Rows of one adapter next to each other are computed together.
        """
        self._require_model()
        for name in set(names) - {None}:
            self.modules(str(name))
        before = self._active.runs
        starts = [index for index, name in enumerate(names) if index == 0 or name != names[index - 1]]
        self._active.runs = tuple(
            (names[start], start, stop) for start, stop in zip(starts, [*starts[1:], len(names)], strict=True)
        )
        try:
            yield
        finally:
            self._active.runs = before

    def load(self, name: str, adapter: Adapter) -> None:
        """Put an adapter into the slot ``name``, replacing what was there.

        Raises:
            AdapterError: when it was made for another base, names a module the model has not, has another shape, or
                would change nothing at all (every product B·A is zero, and DoRA's magnitudes are the base's norms). The
                model is left as it was.
        """
        self._require_model()
        check_fit(self.base, adapter)
        gains = self._gains(adapter)
        if dora_changes_nothing(adapter, gains.values()):
            raise AdapterError(
                f"{adapter.where} would change nothing: every product B·A is zero, and its magnitudes are the base's"
            )
        wrapped = {}
        for module, a, b in adapter.factors():
            layer = find_module(self.model, module)
            if not isinstance(layer, Slots):
                embedding = isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding))
                layer = (SlotEmbedding if embedding else SlotLinear)(layer, self._active)
                wrapped[module] = layer
            layer._factors[name] = (LowRank(a, b, adapter.spec.scale, gains.get(module)),)
        if wrapped:
            self.model.update_modules(tree_unflatten(list(wrapped.items())))
        former = self.modules(name) if name in self._loaded or name in self._sums else []
        for module in set(former) - set(adapter.modules()):
            find_module(self.model, module)._factors.pop(name, None)
        self._sums.pop(name, None)
        self._loaded[name] = adapter

    def _gains(self, adapter: Adapter) -> dict[str, mx.array]:
        """What DoRA multiplies every module's outputs by, (out,) float32; empty for LoRA."""
        gains = {}
        for module, a, b in adapter.factors():
            if (magnitude := adapter.weights.get(f"{module}.m")) is not None:
                layer = find_module(self.model, module)
                plain = layer.linear if isinstance(layer, Slots) else layer
                gains[module] = _gain(plain, a, b, adapter.spec.scale, magnitude)
        return gains

    def add(self, name: str, scales: Mapping[str, float]) -> None:
        """Fill an empty slot with Σ scale · adapter over loaded adapters; it has their arrays, no copies of them.

        Raises:
            RsgwmError: the slot is filled already.
            AdapterError: one is a DoRA, whose magnitudes make it no sum of its parts.
        """
        self._require_model()
        if name in self._loaded or name in self._sums:
            raise RsgwmError(f"the slot {name!r} is filled already")
        for part in scales:
            if self.adapter(part).spec.fine_tune_type == "dora":
                raise AdapterError(f"{self.adapter(part).where} is a DoRA, which cannot be scaled or added to others")
        modules = list(dict.fromkeys(module for part in scales for module in self.modules(part)))
        for module in modules:
            factors = find_module(self.model, module)._factors
            factors[name] = tuple(
                replace(update, scale=scale * update.scale)
                for part, scale in scales.items()
                for update in factors.get(part, ())
            )
        self._sums[name] = modules

    def unload(self, name: str) -> None:
        """Forget an adapter or a sum; if it was active, the bare base is."""
        for module in self.modules(name):
            find_module(self.model, module)._factors.pop(name, None)
        self._loaded.pop(name, None)
        self._sums.pop(name, None)
        if self._active.name == name:
            self.use(None)

    def _require_model(self) -> None:
        if self._active.retired:
            raise RuntimeError("these slots were replaced: another AdapterSlots was made for the same base")

    def nbytes(self) -> dict[str, int]:
        """Bytes that each adapter's arrays take; see :meth:`memory` for the base."""
        return {name: sum(value.nbytes for value in adapter.weights.values()) for name, adapter in self._loaded.items()}

    def first_changed(self, names: Iterable[str]) -> int:
        """Index of the first transformer layer that any of these adapters changes; 0 when one changes what is before.

        Below it the hidden states of a text are the same whichever of them is active.
        """
        lowest = len(self.model.layers)
        for module in (module for name in names for module in self.modules(name)):
            match = LAYER.match(module)
            if match:
                lowest = min(lowest, int(match[1]))
            elif module != "lm_head":
                return 0
        return lowest

    def memory(self) -> dict[str, Any]:
        """``{"base": bytes, "adapters": {name: bytes}}``: what is resident."""
        flat: Any = tree_flatten(self.model.parameters())
        return {"base": sum(value.nbytes for _, value in flat), "adapters": self.nbytes()}


def unwrap(model: Any) -> None:
    """Put the plain layers back and retire the slots that wrapped them."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, Slots)]
    for _, module in wrapped:
        module.active.runs, module.active.retired = ((None, 0, None),), True
    if wrapped:
        model.update_modules(tree_unflatten([(name, module.linear) for name, module in wrapped]))


def _gain(layer: Any, a: mx.array, b: mx.array, scale: float, magnitude: mx.array) -> mx.array:
    """m / ‖W + scale · BᵀAᵀ‖ by output unit, (out,) float32: what mlx-lm's DoRALinear computes anew at every call."""
    weight = layer.weight
    if isinstance(layer, nn.QuantizedLinear):
        weight = mx.dequantize(
            weight,
            layer.scales,
            getattr(layer, "biases", None),
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )
    adapted = weight.astype(mx.float32) + scale * (a.astype(mx.float32) @ b.astype(mx.float32)).T
    gain = magnitude.astype(mx.float32) / mx.sqrt(mx.square(adapted).sum(axis=1))
    mx.eval(gain)
    return gain
