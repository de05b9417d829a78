"""Whether an adapter fits a base: by what it records, by the names of bases, and by the layers' kinds and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rsgwm.core.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import ALIASES, Base, base_for, local_base
from mlx_rsgwm.models.base_folder import base_difference, fingerprint_of, weights_fingerprint
from mlx_rsgwm.models.token_layers import is_head

MAGNITUDE_ROUNDING = 2**-8  # of norms that were computed in bfloat16


def hub_name(name: str) -> str:
    """A base's Hub id, where ``name`` is an alias for it; else ``name``."""
    return ALIASES[name].hub_id if name in ALIASES else name


def names_other_base(adapter: Adapter, name: str) -> bool:
    """Whether what another tool's configuration calls the base of ``adapter`` is not the base ``name``.

    An alias is its Hub id, and names that end alike are one. Of others the weights decide, where both are on this
    machine; nothing is fetched.
    """
    recorded, given = hub_name(adapter.named_base), hub_name(name)
    if not recorded or Path(recorded).name.casefold() == Path(given).name.casefold():
        return False
    folders = [local_base(place) for place in (adapter.named_base, name)]
    try:
        prints = [weights_fingerprint(folder) for folder in folders if folder is not None]
    except RsgwmError:  # one of them is not whole
        return True
    return len(prints) < 2 or bool(base_difference(prints[0], prints[1]))


def other_base_note(adapter: Adapter, name: str) -> str:
    """One line on an adapter of which :func:`names_other_base` holds."""
    return (
        f"{adapter.where} says that it was trained on {adapter.named_base}, not on {name}; its names and shapes are "
        "all that is compared"
    )


def untied_hint(module: str) -> str:
    """What to do, in brackets, where the ``module`` that a model has not is an output head."""
    return (
        " (its head is its embedding; rsgwm fuse makes an untied model of base and adapter)" if is_head(module) else ""
    )


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a dense or quantised linear layer; of an embedding, (dims, entries)."""
    rows, columns = layer.weight.shape
    if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        columns = columns * 32 // layer.bits
    return columns, rows


def base_of(adapter: Adapter, given: str | None, progress: Progress = SILENT) -> tuple[str, Path]:
    """Name and folder of the base of ``adapter``: the ``given`` one, else the one that it records; not loaded.

    Raises:
        AdapterError: its weights or tokenizer are not the recorded ones.
        RsgwmError: neither is there, or it cannot be had.
    """
    name, folder = base_for(adapter.where, given, adapter.base_name, progress)
    check_made_for(adapter, name, fingerprint_of(folder), weights_only=True)
    return name, folder


def check_made_for(adapter: Adapter, name: str, fingerprint: str, weights_only: bool = False) -> None:
    """Raise when ``adapter`` records another base than the one called ``name``, by fingerprint; no weight is needed.

    ``weights_only``: see :meth:`Adapter.base_problem`.
    """
    problem = adapter.base_problem(name, fingerprint, weights_only)
    if problem:
        raise AdapterError(f"{problem}; pass the base it was made for")


def check_fit(base: Base, adapter: Adapter) -> None:
    """Raise one :class:`AdapterError` with everything that keeps ``adapter`` from applying to ``base``."""
    adapter.require_factors_only("be put into a slot")
    check_made_for(adapter, base.name, base.fingerprint)
    problems = []
    for module, a, b in adapter.factors():
        layer = find_module(base.model, module)
        layer = getattr(layer, "bare", layer)  # of slots, the layer below
        embedding = isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding))
        if layer is None:
            problems.append(f"the model has no module {module}{untied_hint(module)}")
        elif not embedding and not isinstance(layer, (nn.Linear, nn.QuantizedLinear)):
            problems.append(f"{module} is a {type(layer).__name__}, neither a linear layer nor an embedding")
        elif embedding and f"{module}.m" in adapter.weights:
            problems.append(f"{module} is an embedding; DoRA there is not supported")
        elif a.ndim != 2:
            problems.append(f"{module}: lora_a has shape {a.shape}; layers of experts cannot be put into a slot")
        else:
            expected = linear_shape(layer)[::-1] if embedding else linear_shape(layer)
            if (a.shape[0], b.shape[1]) != expected:
                problems.append(
                    f"{module}: adapter is {a.shape[0]}→{b.shape[1]}, the model's layer {expected[0]}→{expected[1]}"
                )
    raise_problems(f"{adapter.where} does not fit {base.name}", problems, AdapterError)
    norms = [mx.max(mx.abs(a)) * mx.max(mx.abs(b)) for _, a, b in adapter.factors()]
    # A DoRA adapter may do all its work by the magnitudes.
    if adapter.spec.fine_tune_type == "lora" and not mx.any(mx.stack(norms) > 0).item():
        raise AdapterError(f"{adapter.where} would change nothing: every product B·A is zero")


def dora_changes_nothing(adapter: Adapter, gains: Iterable[mx.array]) -> bool:
    """Whether a DoRA adapter is as before any training: every lora_b zero, every magnitude the norm that the base has.

    ``gains``: the magnitudes by those norms, (out,) of every module. An adapter with magnitudes alone to its credit
    cannot have every lora_b at exactly zero and them within rounding, for one step of training moves both.
    """
    if adapter.spec.fine_tune_type != "dora" or not adapter.changes_nothing():
        return False
    return all((mx.abs(gain - 1) <= MAGNITUDE_ROUNDING).all().item() for gain in gains)


def fitting_modules(base: Base, adapter: Adapter) -> dict[str, nn.Module]:
    """The layers of ``base`` that ``adapter`` adapts.

    Raises:
        AdapterError: it was made for another base, or a layer is missing or of another shape; everything is named.
    """
    adapter.require_factors_only("be read here")
    check_made_for(adapter, base.name, base.fingerprint)
    known = dict(base.model.named_modules())
    fitting: dict[str, nn.Module] = {}
    problems = []
    for name, a, b in adapter.factors():
        module = known.get(name)
        if not isinstance(module, (nn.Linear, nn.QuantizedLinear)):
            problems.append(f"the model has no linear layer {name}{untied_hint(name) if module is None else ''}")
        elif (a.shape[0], b.shape[1]) != linear_shape(module):
            inputs, outputs = linear_shape(module)
            problems.append(f"{name}: adapter is {a.shape[0]}→{b.shape[1]}, the model's layer {inputs}→{outputs}")
        else:
            fitting[name] = module
    raise_problems(f"{adapter.where} does not fit {base.name}", problems, AdapterError)
    return fitting


def find_module(model: nn.Module, name: str) -> Any:
    """The module of that full name; None where there is none."""
    node: Any = model
    for part in name.split("."):
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return node
