"""The one way to look into a layer of a model, or to change what it computes, for the length of a ``with`` block.

A hooked module gets a class of its own that calls the former one. So it keeps its parameters, their names and its kind
(``isinstance``, tied embeddings, LoRA, DoRA and packed layers work on), and the model is the same object afterwards.
Hooks of one module nest: a later one sees what an earlier one gives. All are taken off again, after an error, too.

A function compiled by ``mx.compile`` keeps what it was traced with: compile inside the block, and look at values in
uncompiled calls only, for in a compiled one they are placeholders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_rsgwm.core.errors import RsgwmError

Call = Callable[..., Any]  # a module's __call__: the module itself, then what it is called with


@contextmanager
def calls_wrapped(model: nn.Module, names: Iterable[str], wrap: Callable[[str, Call], Call]) -> Iterator[None]:
    """Calls of the modules ``names`` go through ``wrap(name, call)``, which is made once for each.

    Raises:
        RsgwmError: names that the model has not; nothing is hooked then.
    """
    hooked: list[tuple[Any, type, Any]] = []
    modules = _modules(model, names)
    try:
        for name, module in modules.items():
            kind: Any = type(module)
            namespace = {"__call__": wrap(name, kind.__call__), "__module__": kind.__module__}
            hooked.append((module, kind, type(kind.__name__, (kind,), namespace)))
            module.__class__ = hooked[-1][2]
        yield
    finally:
        for module, kind, calling in reversed(hooked):
            module.__class__ = kind
            del calling.__call__  # a class waits for the garbage collector, and would keep what its call holds


@contextmanager
def inputs_seen(model: nn.Module, names: Iterable[str], on_input: Callable[[str, mx.array], None]) -> Iterator[None]:
    """``on_input(name, x)`` is called before each of the modules ``names`` computes, x its first argument."""

    def wrap(name: str, call: Call) -> Call:
        def seen(module: Any, *arguments: Any, **options: Any) -> Any:
            on_input(name, _first(arguments, options))
            return call(module, *arguments, **options)

        return seen

    with calls_wrapped(model, names, wrap):
        yield


@contextmanager
def outputs_changed(
    model: nn.Module, names: Iterable[str], change: Callable[[str, mx.array, Any], Any]
) -> Iterator[None]:
    """Each of the modules ``names`` gives ``change(name, x, y)`` instead of its output y; x is its first argument.

    A ``change`` that returns y only looks. What some blocks return is a tuple, of which the state comes first.
    """

    def wrap(name: str, call: Call) -> Call:
        def changed(module: Any, *arguments: Any, **options: Any) -> Any:
            return change(name, _first(arguments, options), call(module, *arguments, **options))

        return changed

    with calls_wrapped(model, names, wrap):
        yield


@contextmanager
def modules_replaced(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules stand in the places of those named; the former ones come back at the end."""
    former = _modules(model, replacements)
    model.update_modules(tree_unflatten(list(replacements.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(former.items())))


def block_names(model: Any) -> list[str]:
    """Full names of the transformer blocks, ``model.layers``, in order."""
    places = {id(block): place for place, block in enumerate(model.layers)}
    names = {places[id(module)]: name for name, module in model.named_modules() if id(module) in places}
    return [names[place] for place in sorted(names)]


def module_at(model: nn.Module, path: str) -> Any:
    """The module of a dotted ``path``; the model itself of an empty one."""
    module: Any = model
    for part in filter(None, path.split(".")):
        module = module[int(part)] if isinstance(module, list) else module[part]
    return module


def _first(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    return arguments[0] if arguments else next(iter(options.values()))


def _modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    present = dict(model.named_modules())
    wanted = list(names)
    if missing := [name for name in wanted if name not in present]:
        raise RsgwmError(f"the model has no module {', '.join(missing)}")
    return {name: present[name] for name in wanted}
