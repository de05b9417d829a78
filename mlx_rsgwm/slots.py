"""Many named adapters on one resident base: switching changes one name, no weight moves.

The wrapped layers compute what mlx-lm's ``LoRALinear`` computes, so outputs equal mlx-lm's own loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_rsgwm.adapter import Adapter
from mlx_rsgwm.base import Base
from mlx_rsgwm.errors import AdapterError, RsgwmError, raise_problems


@dataclass
class ActiveAdapter:
    """Which adapter the wrapped layers apply; None is the bare base. Shared by all layers of one model.

    ``retired``: another :class:`AdapterSlots` has taken the model over, so selecting here would change nothing.
    """

    name: str | None = None
    retired: bool = False


class SlotLinear(nn.Module):
    """A linear layer with several low-rank updates, of which the active one is added: y + scale · (x A) B."""

    def __init__(self, linear: nn.Module, active: ActiveAdapter) -> None:
        super().__init__()
        self.linear = linear
        self.active = active
        # The leading underscore keeps these out of parameters(): they belong to no checkpoint of the base.
        self._factors: dict[str, tuple[mx.array, mx.array, float]] = {}

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        factors = self._factors.get(self.active.name) if self.active.name is not None else None
        if factors is None:
            return y
        a, b, scale = factors
        return y + (scale * ((x @ a) @ b)).astype(x.dtype)


class AdapterSlots:
    """Named adapters on one base model. Loading wraps layers once; ``use`` selects in constant time.

    A model has one set of slots: a new one takes the model over, and the former refuses any further use.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model: Any = base.model
        self._active = ActiveAdapter()
        self._loaded: dict[str, Adapter] = {}
        unwrap(self.model)

    @property
    def active(self) -> str | None:
        return self._active.name

    def names(self) -> list[str]:
        return list(self._loaded)

    def adapter(self, name: str) -> Adapter:
        """The loaded adapter of that name."""
        if name not in self._loaded:
            raise RsgwmError(f"no adapter named {name!r} is loaded; there are: {', '.join(self._loaded) or 'none'}")
        return self._loaded[name]

    def use(self, name: str | None) -> None:
        """Make one loaded adapter the active one, or none of them (the bare base)."""
        self._require_model()
        if name is not None:
            self.adapter(name)
        self._active.name = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """``use`` for the length of a block; the former choice comes back even after an error."""
        before = self._active.name
        self.use(name)
        try:
            yield
        finally:
            self._active.name = before

    def load(self, name: str, adapter: Adapter) -> None:
        """Put an adapter into the slot ``name``, replacing what was there.

        Raises:
            AdapterError: when it was made for another base, names a module the model has not, has another shape, or
                would change nothing at all (every product B·A is zero). The model is left as it was.
        """
        self._require_model()
        check_fit(self.base, adapter)
        wrapped = {}
        for module, a, b in adapter.factors():
            layer = _find_module(self.model, module)
            if not isinstance(layer, SlotLinear):
                layer = SlotLinear(layer, self._active)
                wrapped[module] = layer
            layer._factors[name] = (a, b, adapter.spec.scale)
        if wrapped:
            self.model.update_modules(tree_unflatten(list(wrapped.items())))
        if name in self._loaded:
            for module in set(self._loaded[name].modules()) - set(adapter.modules()):
                _find_module(self.model, module)._factors.pop(name, None)
        self._loaded[name] = adapter

    def unload(self, name: str) -> None:
        """Forget an adapter; if it was active, the bare base is."""
        for module in self.adapter(name).modules():
            _find_module(self.model, module)._factors.pop(name, None)
        del self._loaded[name]
        if self._active.name == name:
            self._active.name = None

    def _require_model(self) -> None:
        if self._active.retired:
            raise RuntimeError("these slots were replaced: another AdapterSlots was made for the same base")

    def nbytes(self) -> dict[str, int]:
        """Bytes that each adapter's arrays take."""
        return {name: sum(value.nbytes for value in adapter.weights.values()) for name, adapter in self._loaded.items()}


def unwrap(model: Any) -> None:
    """Put the plain layers back and retire the slots that wrapped them."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, SlotLinear)]
    for _, module in wrapped:
        module.active.name, module.active.retired = None, True
    if wrapped:
        model.update_modules(tree_unflatten([(name, module.linear) for name, module in wrapped]))


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a dense or quantised linear layer."""
    rows, columns = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        columns = columns * 32 // layer.bits
    return columns, rows


def check_fit(base: Base, adapter: Adapter) -> None:
    """Raise one :class:`AdapterError` with everything that keeps ``adapter`` from applying to ``base``."""
    if adapter.spec.fine_tune_type != "lora":
        raise AdapterError(f"{adapter.where}: {adapter.spec.fine_tune_type} adapters cannot be put into a slot")
    fingerprint = adapter.base_fingerprint
    if fingerprint is not None and fingerprint != base.fingerprint:
        trained_on = (adapter.manifest.get("base") or {}).get("name", "another base")
        raise AdapterError(
            f"{adapter.where} was made for {trained_on} (fingerprint {fingerprint[:12]}), not for "
            f"{base.name} ({base.fingerprint[:12]}); pass the base it was made for"
        )
    problems = []
    for module, a, b in adapter.factors():
        layer = _find_module(base.model, module)
        if isinstance(layer, SlotLinear):
            layer = layer.linear
        if layer is None:
            problems.append(f"the model has no module {module}")
        elif not isinstance(layer, (nn.Linear, nn.QuantizedLinear)):
            problems.append(f"{module} is a {type(layer).__name__}, not a linear layer")
        else:
            expected = linear_shape(layer)
            if (a.shape[0], b.shape[1]) != expected:
                problems.append(
                    f"{module}: adapter is {a.shape[0]}→{b.shape[1]}, the model's layer {expected[0]}→{expected[1]}"
                )
    raise_problems(f"{adapter.where} does not fit {base.name}", problems, AdapterError)
    norms = [mx.max(mx.abs(a)) * mx.max(mx.abs(b)) for _, a, b in adapter.factors()]
    if not mx.any(mx.stack(norms) > 0).item():
        raise AdapterError(f"{adapter.where} would change nothing: every product B·A is zero")


def _find_module(model: nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return found
