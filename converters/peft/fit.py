"""A PEFT adapter beside its base: what the base has not, has otherwise, or has already."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import mlx.core as mx

from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.module_names import needs_parameter
from mlx_rsgwm.converters.peft.config import saves_whole, selects
from mlx_rsgwm.converters.peft.folder import Groups
from mlx_rsgwm.converters.peft.layout import PeftReading
from mlx_rsgwm.converters.peft.names import is_other_tower, layer_of
from mlx_rsgwm.converters.peft.uniform import Update
from mlx_rsgwm.converters.weight_map import describe_link
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.token_layers import is_embedding, is_head


def other_towers(groups: Groups, base: BaseLayers, reading: PeftReading) -> list[str]:
    """Take what is trained outside of the language model out of ``groups``; a problem unless that was asked for."""
    present = {name.rpartition(".")[0] for name in base.parameters}
    tables: tuple[dict[str, Any], ...] = (groups.pairs, groups.embeddings, groups.magnitudes, groups.copies)
    tables += (groups.tokens, groups.lora_biases)
    modules = {module: module for table in tables for module in table}
    modules |= {name: name.rpartition(".")[0] for name in groups.full}
    outside = {
        name: module
        for name, module in modules.items()
        if is_other_tower(module) and base.names.mlx_module(module) not in present
    }
    if not outside:
        return []
    for table in (*tables, groups.full):
        for name in outside.keys() & table.keys():
            del table[name]
    reading.left_out += dict.fromkeys(outside.values())
    count = len(reading.left_out)
    shown = ", ".join(reading.left_out[:2]) + (f" and {count - 2} more" if count > 2 else "")
    if not reading.language_only:
        return [
            f"it also trains the tower for images or sound, which mlx-lm has not ({shown}); "
            "--language-only converts the language model's part"
        ]
    reading.notes.append(f"left out, for mlx-lm has the language model alone: {shown}")
    return []


def depth_problems(updates: Iterable[Update], groups: Groups, described: Mapping[str, Any] | None) -> list[str]:
    """A line for every layer that the described base is too shallow to have; none where its depth is unknown."""
    depth = (described or {}).get("num_layers")
    if depth is None:
        return []
    names = [update.source for update in updates] + list(groups.full)
    beyond = sorted({layer for name in names if (layer := layer_of(name)) is not None and layer >= depth})
    return [f"layer {layer} is not in the base model, which has {depth} layers" for layer in beyond]


def take_copies(groups: Groups, base: BaseLayers) -> dict[str, mx.array]:
    """Take those parameters out of ``groups.full`` whose values are the base's own: they are no change at all."""
    embedding = next((f"{name}.weight" for name, layer in base.layers.items() if layer.kind == "embedding"), "")
    places = {}
    for name in groups.full:
        mlx_names = base.names.mlx_parameters(name)
        if base.tied and is_head(name.rpartition(".")[0]):  # its array is the embedding's
            mlx_names = [embedding]
        link = base.names.link(mlx_names[0])
        if len(mlx_names) == 1 and (link is None or link.axes is not None):
            places[name] = mlx_names[0]
    present = base.read_arrays(set(places.values()))
    copies = {}
    for name, place in places.items():
        value, link = groups.full[name], base.names.link(place)
        if link is not None and sorted(value.shape) == sorted(base.parameters.get(place, ())):
            value = link.apply(value)
        if place in present and value.shape == present[place].shape and _same_values(value, present[place]):
            copies[name] = groups.full.pop(name)
    return copies


def take_other_weights(groups: Groups, base: BaseLayers, reading: PeftReading) -> None:
    """Weights below LoRA that PEFT saved and that are not this base's: PEFT loads them, so they replace the base's.

    Training in another float type rounds them, which is no change; nothing is known of a packed base's.
    """
    names = {module: f"{base.names.mlx_module(module)}.weight" for module in groups.copies}
    present = base.read_arrays(set(names.values()))
    for module, value in groups.copies.items():
        mlx_name = names[module]
        old, link = present.get(mlx_name), base.names.link(mlx_name)
        packed = f"{mlx_name.removesuffix('.weight')}.scales" in base.parameters
        if old is None or packed or (link is not None and not link.plain) or old.shape != value.shape:
            continue
        if f"{module}.weight" not in groups.full and not _same_but_for_rounding(value, old):
            groups.full[f"{module}.weight"] = value
            reading.notes.append(f"the weight below LoRA of {module} is not this base's, and replaces it")


def _same_but_for_rounding(value: mx.array, old: mx.array) -> bool:
    """Whether ``value`` is ``old``, or what is left of it in one of the types that models are trained in."""
    return any(_same_values(value, old.astype(kind)) for kind in (old.dtype, value.dtype, mx.bfloat16, mx.float16))


def _same_values(value: mx.array, other: mx.array) -> bool:
    """Whether two arrays hold the same numbers; widening to float32 is exact."""
    return bool(mx.array_equal(value.astype(mx.float32), other.astype(mx.float32)).item())


def fit_problems(updates: Iterable[Update], groups: Groups, base: BaseLayers) -> list[str]:
    """Modules the base has not, or has with other dimensions."""
    problems = []
    for update in updates:
        layer = base.layers.get(update.module)
        a, b = update.a.shape, update.b.shape
        if layer is None and f"{update.module}.weight" in base.parameters:
            problems.append(f"{update.source}: in mlx-lm {update.module} is no linear layer, so it has no LoRA there")
        elif layer is None:
            problems.append(f"the base has no {update.module}")
        elif len(a) == 3:
            if layer.kind != "experts" or (layer.experts, layer.outputs, layer.inputs) != (a[0], b[1], a[2]):
                problems.append(
                    f"{update.module} is {_shown(layer)} in the base, the adapter is for {a[0], b[1], a[2]}"
                )
        elif layer.kind == "experts" or (layer.outputs, layer.inputs) != (b[1], a[0]):
            problems.append(f"{update.module} is {_shown(layer)} in the base, the adapter is for {b[1], a[0]}")
        elif (layer.kind == "embedding") != (update.source in groups.embeddings):
            problems.append(f"{update.source} is a {layer.kind} in the base, its arrays are for another kind")
    for name, value in groups.full.items():
        places = base.names.mlx_parameters(name)
        mlx_name = places[0]
        link = base.names.link(mlx_name)
        if len(places) > 1 or (link is not None and link.axes is None):
            problems.append(f"{name}: {describe_link(' and '.join(places), link)}, so it cannot be replaced")
            continue
        if mlx_name not in base.parameters:
            problems.append(f"the base has no {mlx_name}")
            continue
        packed = f"{mlx_name.removesuffix('.weight')}.scales" in base.parameters
        layer = base.layers.get(mlx_name.rpartition(".")[0])
        if packed and (layer is None or layer.kind == "experts"):
            problems.append(f"{mlx_name} is quantised in the base and cannot be replaced")
            continue
        # A packed layer is replaced by a dense one.
        expected = layer.shape if packed and layer is not None else base.parameters[mlx_name]
        if link is not None and sorted(value.shape) == sorted(expected):
            value = link.apply(value)
        if tuple(value.shape) != expected:
            problems.append(f"{mlx_name} is {expected} in the base, {tuple(value.shape)} in the adapter")
    return problems


def missing_problems(
    updates: Iterable[Update], config: Mapping[str, Any], base: BaseLayers, reading: PeftReading
) -> list[str]:
    """Modules that are selected but have no arrays. PEFT warns and leaves them as they are, and so does this.

    Where its initialisation of a new pair is not zero, PEFT would add noise there: refused, as all is if strict.
    """
    missing = base_names_missing(config, base, {update.module for update in updates})
    if not missing:
        return []
    start = config.get("init_lora_weights", True)
    if reading.strict or not (start is True or start in ("gaussian", "eva")):
        noise = "" if reading.strict else f", and PEFT would fill them with noise (init_lora_weights is {start!r})"
        return [f"the configuration selects {name}, but there are no arrays for it{noise}" for name in missing]
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    reading.notes.append(f"selected, but without arrays, so left as in the base: {shown}")
    return []


def saved_modules(groups: Groups) -> set[str]:
    """Modules of which something was saved whole, as transformers calls them."""
    return {name.rpartition(".")[0] for name in groups.full} | groups.copies.keys() | groups.embeddings.keys()


def missing_saved(
    saved: Collection[str], config: Mapping[str, Any], base: BaseLayers | None, reading: PeftReading
) -> list[str]:
    """Modules that were to be saved whole and are not among those ``saved``. Nobody could say what they held.

    One that the base is known to have is a problem: PEFT saves and asks for each. Of any other name that is told, and a
    problem only if all is strict: a head that the base ties, or a name that finds nothing.
    """
    names = config.get("modules_to_save") or ()
    others: list[str] = []
    if names and base is not None:
        there = {base.names.mlx_module(module) for module in saved}
        modules = {name.rpartition(".")[0] for name in base.parameters}
        others = sorted(map(base.names.transformers_module, modules - there))
    lost = [name for name in others if saves_whole(config, name)]
    problems = [f"{name} was trained whole (modules_to_save), and is not in the file" for name in lost]
    known = [*saved, *lost]
    missing = [name for name in names if not any(saves_whole({"modules_to_save": [name]}, each) for each in known)]
    if reading.strict:
        return problems + [f"modules_to_save names {name}, and nothing of it was saved" for name in missing]
    if missing:
        shown = ", ".join(missing)
        reading.notes.append(f"modules_to_save names {shown}, of which nothing was saved: left as in the base")
    return problems


def base_names_missing(config: Mapping[str, Any], base: BaseLayers, adapted: set[str]) -> list[str]:
    """Linear layers of the base, as transformers calls them, that the configuration selects and that have no arrays.

    A router is no linear layer to transformers, nor is what PEFT takes for a name of experts.
    """
    missing = []
    experts = any(layer.kind == "experts" for layer in base.layers.values())
    for module, layer in base.layers.items():
        peft_name = base.names.transformers_module(module)
        if layer.kind != "linear" or module in adapted or not config.get("target_modules"):
            continue
        if experts and needs_parameter(peft_name, base.model_type):
            continue
        if selects(config, peft_name):
            missing.append(peft_name)
    return missing


def _shown(layer: Any) -> tuple[int, ...]:
    if layer.kind == "experts":
        return layer.experts, layer.outputs, layer.inputs
    return layer.outputs, layer.inputs


def size_problems(adapter: Adapter, base: BaseLayers | None) -> list[str]:
    """Modules whose factors are of other sizes than the base's layers, which PEFT would not load; none without a base.

    An embedding may have rows of tokens that the base has not, and none less.
    """
    problems = []
    for module in adapter.modules():
        layer = base.layers.get(module) if base is not None else None
        if layer is None:
            continue
        a, b = (adapter.weights[f"{module}.{leaf}"].shape for leaf in ("lora_a", "lora_b"))
        sizes = (a[-1], b[-2]) if layer.kind == "experts" else (a[0], b[-1])
        more = is_embedding(module) and sizes[0] > layer.inputs
        if sizes != (layer.inputs, layer.outputs) and not (more and sizes[1] == layer.outputs):
            wanted = f"{layer.inputs}→{layer.outputs}"
            problems.append(f"{module}: adapter is {sizes[0]}→{sizes[1]}, the base's layer {wanted}")
    return problems
