"""PEFT to MLX: an opened PEFT folder as an :class:`Adapter` whose arrays are still on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.adapter import Adapter, LoraSpec, versions
from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.module_names import MIXTRAL, ONE_EXPERT, SWITCH, Names, needs_parameter
from mlx_rsgwm.converters.peft_config import config_notes, config_problems, is_head, rank_of, scale_of, selects
from mlx_rsgwm.converters.peft_derived import derive_parameters
from mlx_rsgwm.converters.peft_experts import GATE_UP, parameter_names, split_experts, split_gate_up
from mlx_rsgwm.converters.peft_folder import Groups, PeftFolder, group_arrays
from mlx_rsgwm.converters.peft_heads import head_problems, head_trained_apart, hold_other
from mlx_rsgwm.converters.peft_names import SAVED, is_embedding, is_other_tower, key_of, layer_of, model_order
from mlx_rsgwm.converters.peft_sidecar import (
    ROW_HASHES,
    SIDECAR_FOLDER,
    Sidecar,
    read_sidecar,
    restore,
    rows_of_changed,
)
from mlx_rsgwm.converters.peft_uniform import (
    NAMES,
    Folding,
    Update,
    choose_folding,
    common_scale,
    fold,
    widen_rank,
)
from mlx_rsgwm.converters.resized_vocabulary import resized_layers
from mlx_rsgwm.converters.untied_base import untied_layers
from mlx_rsgwm.converters.weight_map import Link, describe_link
from mlx_rsgwm.errors import AdapterError, raise_problems


@dataclass
class Layout:
    """What of a PEFT file's form mlx-lm's does not show, so that a conversion back can restore it.

    ``names``: transformers' names where they are not the ones we would write. ``experts``: ``each`` or ``stacked``.
    ``folded``: modules whose scale went into lora_b. ``tied``: one embedding pair stands for embedding and head.
    ``derived``: replaced parameters, by our names, that PEFT's file has not (see ``peft_derived``).
    ``untied``: the base ties embedding and head, and the adapter has them apart. ``rows``: those of embedding and head,
    where the vocabulary was resized.
    """

    names: dict[str, str] = field(default_factory=dict)
    experts: str | None = None
    folded: dict[str, Folding] = field(default_factory=dict)
    tied: bool = False
    derived: list[str] = field(default_factory=list)
    untied: bool = False
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        folded = {name: Folding(**one) for name, one in (value.get("folded") or {}).items()}
        names, derived = dict(value.get("names") or {}), list(value.get("derived") or [])
        untied, rows = bool(value.get("untied")), int(value.get("rows") or 0)
        return cls(names, value.get("experts"), folded, bool(value.get("tied")), derived, untied, rows)


@dataclass
class Reading:
    """How a folder is read.

    ``strict``: refuse what PEFT would only warn of. ``language_only``: leave out what is of a tower for images or
    sound. ``notes``: what the user is told after. ``left_out``: modules left out, as transformers calls them.
    """

    strict: bool = False
    language_only: bool = False
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read_peft(
    folder: PeftFolder, base: BaseLayers | None, described: Mapping[str, Any] | None, reading: Reading | None = None
) -> Adapter:
    """The adapter in ``folder``, its arrays lazy.

    Args:
        folder: as :func:`peft_folder.open_peft` found it.
        base: the base's layers; without them shapes, names and the selection of modules are not compared with it.
        described: what manifests keep of the base, None when it is not known.

    Raises:
        AdapterError: one line with every reason: a PEFT option without a counterpart, wrong names, shapes or dtypes,
            modules the base has not or the configuration does not select, another base than it was trained on.
    """
    config = folder.config
    reading = reading or Reading()
    problems = config_problems(config)
    sound = not problems
    arrays, metadata = folder.arrays()
    groups, found = group_arrays(arrays, config, sound)
    if not arrays:
        found.append("holds no arrays")
    if not sound:
        raise_problems(str(folder.path), problems + found, AdapterError)
    sidecar = read_sidecar(folder.path, config, folder.sha256)
    layout = Layout()
    copies: dict[str, mx.array] = {}
    if base is not None:
        found += _other_towers(groups, base, reading)
        copies = _take_copies(groups, base)
    with ExitStack() as stack:
        if base is not None and base.tied and head_trained_apart(groups, config):
            layout.untied = True
            if groups.tokens:
                found.append("trained token rows beside a head apart from the embedding have no counterpart")
            base = stack.enter_context(untied_layers(base))
            hold_other(groups, base, layout)
        if base is not None:
            before = set(groups.whole)
            base, layout.rows = resized_layers(base, groups, found)
            layout.derived += [base.names.mlx_parameters(name)[0] for name in groups.whole if name not in before]
        return _read_groups(folder, groups, found, copies, sidecar, layout, base, described, reading, metadata)


def _read_groups(
    folder: PeftFolder,
    groups: Groups,
    found: list[str],
    copies: dict[str, mx.array],
    sidecar: Sidecar | None,
    layout: Layout,
    base: BaseLayers | None,
    described: Mapping[str, Any] | None,
    reading: Reading,
    metadata: Mapping[str, str],
) -> Adapter:
    """The adapter that sorted arrays make, on a base that has a head of its own where they need one."""
    config = folder.config
    names = base.names if base is not None else Names((described or {}).get("model_type"))
    updates, wrong = build_updates(groups, config, sidecar, layout, names)
    found += wrong + _depth_problems(updates, groups, described)
    found += head_problems(updates, groups, layout, base)
    beside: dict[str, mx.array] = {}
    found += derive_parameters(groups, config, base, beside, layout.derived)
    if base is not None:
        found += _fit_problems(updates, groups, base)
        found += _missing_problems(updates, config, base, reading)
    reading.notes += config_notes(config)
    if layout.untied:
        reading.notes.append(
            "its head is apart from the embedding, which the base ties; rsgwm fuse makes an untied model"
        )
    if layout.rows:
        reading.notes.append(
            f"its vocabulary has {layout.rows} rows, not the base's; rsgwm fuse makes a model with its tokenizer"
        )
    if not updates and not groups.whole and not found:
        found.append("holds no LoRA arrays")
    raise_problems(str(folder.path), list(dict.fromkeys(found)), AdapterError)
    if copies:
        reading.notes.append(f"saved with the base's own values, no change: {', '.join(copies)}")
    adapter = _assemble(folder, updates, groups, layout, sidecar, described, names)
    adapter.kept |= {f"{name}{SAVED}": value for name, value in {**copies, **groups.beside}.items()} | beside
    if sidecar is not None:
        adapter = restore(adapter, sidecar)
        _require_same_base(adapter, described)
    if not adapter.manifest:
        adapter.manifest = _manifest(folder, adapter, metadata, layout, described, reading.left_out)
    if sidecar is None and (rows := rows_of_changed(folder.path, folder.path.name)) is not None:
        adapter.manifest[ROW_HASHES] = rows
        reading.notes.append(
            f"changed since {SIDECAR_FOLDER}/ was written: of what is kept there only the hashes of training rows count"
        )
    raise_problems(str(folder.path), adapter.shape_problems(), AdapterError)
    return adapter


def _other_towers(groups: Groups, base: BaseLayers, reading: Reading) -> list[str]:
    """Take what is trained outside of the language model out of ``groups``; a problem unless that was asked for."""
    present = {name.rpartition(".")[0] for name in base.parameters}
    tables: tuple[dict[str, Any], ...] = (groups.pairs, groups.embeddings, groups.magnitudes, groups.copies)
    tables += (groups.tokens, groups.lora_biases)
    modules = {module: module for table in tables for module in table}
    modules |= {name: name.rpartition(".")[0] for name in groups.whole}
    outside = {
        name: module
        for name, module in modules.items()
        if is_other_tower(module) and base.names.mlx_module(module) not in present
    }
    if not outside:
        return []
    for table in (*tables, groups.whole):
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


def early_problems(folder: PeftFolder) -> list[str]:
    """What is wrong with an adapter whatever its base, so that none need be fetched for it."""
    problems = config_problems(folder.config)
    arrays, _ = folder.arrays()
    groups, found = group_arrays(arrays, folder.config, not problems)
    if not problems:
        found += build_updates(groups, folder.config, None, Layout(), Names())[1]
    return problems + found


def build_updates(
    groups: Groups, config: Mapping[str, Any], sidecar: Sidecar | None, layout: Layout, names: Names
) -> tuple[list[Update], list[str]]:
    """Every module's update in mlx-lm's layout and the model's order; fills ``layout``; what is wrong with them."""
    problems: list[str] = []
    updates: list[Update] = []
    each: dict[tuple[str, str], dict[int, str]] = {}
    for module, pair in groups.pairs.items():
        if one := ONE_EXPERT.fullmatch(module):
            projection = MIXTRAL.get(one["projection"], one["projection"])
            each.setdefault((one["block"], projection), {})[int(one["expert"])] = module
        elif module.endswith((".experts", ".experts.base_layer")):
            found, wrong = _stacked(module, pair, config, sidecar, names)
            updates += found
            problems += wrong
            layout.experts = "stacked"
        elif reason := _unselected(module, config):
            problems.append(reason)
        else:
            found, wrong = _linear(module, pair, config, groups, names)
            updates += found
            problems += wrong
    for (block, projection), modules in each.items():
        found, wrong = _gathered(block, projection, modules, groups, config, names)
        updates += found
        problems += wrong
        layout.experts = "each"
    for module, pair in groups.embeddings.items():
        if reason := _unselected(module, config):
            problems.append(reason)
        found, wrong = _linear(module, pair, config, groups, names)
        updates += found
        problems += wrong
    if config.get("use_dora"):
        for update in updates:
            if is_embedding(update.module):
                problems.append(f"{update.source}: PEFT's DoRA on embeddings scales columns, mlx-lm's rows")
            elif update.a.ndim == 3:
                problems.append(f"{update.source}: mlx-lm has no DoRA on experts")
            elif update.magnitude is None:
                problems.append(f"{update.source} has no lora_magnitude_vector, which DoRA needs")
    else:
        problems += [f"{name} has a lora_magnitude_vector, but use_dora is off" for name in groups.magnitudes]
    updates.sort(key=lambda update: model_order(update.module))
    # What a conversion back would call them by rule is not kept: it may have no base at hand.
    layout.names = {
        update.module: update.source
        for update in updates
        if update.source != default_source(update.module, layout.experts, names.model_type)
    }
    return updates, problems


def _unselected(module: str, config: Mapping[str, Any]) -> str | None:
    """Why PEFT would leave a module's arrays out, or None; a head is adapted with its embedding where it is tied."""
    tied = config.get("ensure_weight_tying") and is_head(module)
    if tied or selects(config, module) or selects(config, f"{module}.weight"):
        return None
    return f"the configuration does not select {module}, so PEFT would not apply its arrays"


def default_source(module: str, experts: str | None, model_type: str | None) -> str:
    """What transformers calls an adapted module by rule; of experts the parameter, or the first one's layer."""
    names = Names(model_type)
    one = SWITCH.fullmatch(module)
    if one is None or experts is None:
        return names.transformers_module(module)
    block = names.experts_block(module.rpartition(".")[0])
    if experts == "each":
        return f"{block}.experts.0.{one['projection']}"
    return f"{block}.experts.{'gate_up_proj' if one['projection'] in GATE_UP else one['projection']}"


def _linear(
    module: str, pair: Mapping[str, mx.array], config: Mapping[str, Any], groups: Groups, names: Names
) -> tuple[list[Update], list[str]]:
    """The update of a linear layer or an embedding in mlx-lm, or why there is none."""
    named = module if selects(config, module) else f"{module}.weight"
    ours = names.mlx_modules(module)
    link = names.link(f"{ours[0]}.weight")
    magnitude = groups.magnitudes.get(module)
    if len(ours) > 1:
        return [], [f"{module} is split in mlx-lm into {', '.join(ours)}"]
    factor: Any = 1.0
    if link is not None:
        if link.axes is None or link.shifted:
            return [], [f"{module}: {describe_link(ours[0], link)}, so its update cannot be carried over"]
        factor = link.scale
        if link.scaled and (magnitude is not None or (module in groups.embeddings and not isinstance(factor, float))):
            return [], [
                f"{module}: mlx-lm multiplies this weight as it loads it, which DoRA and embeddings cannot follow"
            ]
    update = Update(
        ours[0], module, pair["a"].T, pair["b"].T, magnitude, rank_of(config, named), scale_of(config, named), factor
    )
    return [update], []


def _stacked(
    module: str,
    pair: Mapping[str, mx.array],
    config: Mapping[str, Any],
    sidecar: Sidecar | None,
    names: Names,
) -> tuple[list[Update], list[str]]:
    """The updates of a stacked parameter: two for gate and up, one for down."""
    experts = module.removesuffix(".base_layer")
    wrapped = parameter_names(config, experts)
    inner = module.endswith(".base_layer")
    if len(wrapped) != (2 if inner else len(wrapped)) or not wrapped:
        return [], [f"target_parameters do not say which parameter of {experts} the arrays of {module} are for"]
    parameter = f"{experts}.{wrapped[0] if inner else wrapped[-1]}"
    rank, scale = rank_of(config, parameter), scale_of(config, parameter)
    if pair["a"].shape[0] % rank or (parameter.endswith("gate_up_proj") and pair["b"].shape[0] % 2):
        return [], [f"{module} has lora_A {pair['a'].shape}, which does not have rank {rank} for every expert"]
    switch = names.switch_layers(experts.removesuffix(".experts"))
    if wrong := expert_problems(switch, names):
        return [], wrong
    a, b = split_experts(pair["a"], pair["b"], rank)
    if parameter.endswith("down_proj"):
        return [Update(f"{switch}.down_proj", parameter, a, b, None, rank, scale)], []
    parts = split_gate_up(a, b, sidecar.joined.get(switch.rpartition(".")[0], ()) if sidecar else ())
    return [
        Update(f"{switch}.{name}", parameter, part_a, part_b, None, int(part_a.shape[1]), scale)
        for name, (part_a, part_b) in parts.items()
    ], []


def expert_problems(switch: str, names: Names) -> list[str]:
    """Why the stacked experts ``switch`` of mlx-lm are not those of transformers in order, gate's rows before up's."""
    problems = []
    for projection in (*GATE_UP, "down_proj"):
        parameter = f"{switch}.{projection}.weight"
        link = names.link(parameter)
        if names.weights is None or parameter not in names.weights.names():
            continue
        if link is None or link.scaled or link.shifted or not _in_order(link, projection):
            problems.append(f"{describe_link(parameter, link)}, in an order or size of its own that PEFT's has not")
    return problems


def _in_order(link: Link, projection: str) -> bool:
    """Whether every expert's rows follow each other as in its own matrix, or in its half of gate and up's."""
    if link.axes is not None:
        return link.plain
    for expert, parts in enumerate(link.parts):
        if len(parts) != 1 or parts[0].transposed:
            return False
        rows, place = parts[0].rows, parts[0].expert
        start = len(rows) if place is not None and projection == "up_proj" else 0
        if place not in (None, expert) or not (rows == np.arange(start, start + len(rows))).all():
            return False
    return True


def _gathered(
    block: str,
    projection: str,
    modules: Mapping[int, str],
    groups: Groups,
    config: Mapping[str, Any],
    names: Names,
) -> tuple[list[Update], list[str]]:
    """One update of stacked experts from those of single ones, which must be there without a gap and alike."""
    missing = sorted(set(range(max(modules) + 1)) - set(modules))
    if missing:
        return [], [f"{block} has no {projection} of expert {', '.join(map(str, missing))}, only of others"]
    ordered = [modules[expert] for expert in sorted(modules)]
    pairs = [groups.pairs[module] for module in ordered]
    ranks, scales = {rank_of(config, one) for one in ordered}, {scale_of(config, one) for one in ordered}
    alike = all(len({(pair[leaf].shape, pair[leaf].dtype) for pair in pairs}) == 1 for leaf in "ab")
    if not alike or len(ranks) != 1 or len(scales) != 1:
        return [], [f"{block}: the experts' {projection} differ in rank, scale, shape or dtype"]
    if reason := next((found for module in ordered if (found := _unselected(module, config))), None):
        return [], [reason]
    a, b = mx.stack([pair["a"] for pair in pairs]), mx.stack([pair["b"] for pair in pairs])
    switch = names.switch_layers(block)
    if wrong := expert_problems(switch, names):
        return [], wrong
    name = f"{switch}.{projection}"
    return [Update(name, ordered[0], a, b, None, ranks.pop(), scales.pop())], []


def _depth_problems(updates: Iterable[Update], groups: Groups, described: Mapping[str, Any] | None) -> list[str]:
    depth = (described or {}).get("num_layers")
    if depth is None:
        return []
    names = [update.source for update in updates] + list(groups.whole)
    beyond = sorted({layer for name in names if (layer := layer_of(name)) is not None and layer >= depth})
    return [f"layer {layer} is not in the base model, which has {depth} layers" for layer in beyond]


def _take_copies(groups: Groups, base: BaseLayers) -> dict[str, mx.array]:
    """Take those parameters out of ``groups.whole`` whose values are the base's own: they are no change at all."""
    embedding = next((f"{name}.weight" for name, layer in base.layers.items() if layer.kind == "embedding"), "")
    places = {}
    for name in groups.whole:
        ours = base.names.mlx_parameters(name)
        if base.tied and is_head(name.rpartition(".")[0]):  # its array is the embedding's
            ours = [embedding]
        link = base.names.link(ours[0])
        if len(ours) == 1 and (link is None or link.axes is not None):
            places[name] = ours[0]
    present = base.read_arrays(set(places.values()))
    copies = {}
    for name, place in places.items():
        value, link = groups.whole[name], base.names.link(place)
        if link is not None and sorted(value.shape) == sorted(base.parameters.get(place, ())):
            value = link.apply(value)
        if place in present and value.shape == present[place].shape and _same_values(value, present[place]):
            copies[name] = groups.whole.pop(name)
    return copies


def _same_values(one: mx.array, other: mx.array) -> bool:
    """Whether two arrays hold the same numbers; widening to float32 is exact."""
    return bool(mx.array_equal(one.astype(mx.float32), other.astype(mx.float32)).item())


def _fit_problems(updates: Iterable[Update], groups: Groups, base: BaseLayers) -> list[str]:
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
    for name, value in groups.whole.items():
        places = base.names.mlx_parameters(name)
        ours = places[0]
        link = base.names.link(ours)
        if len(places) > 1 or (link is not None and link.axes is None):
            problems.append(f"{name}: {describe_link(' and '.join(places), link)}, so it cannot be replaced")
            continue
        if ours not in base.parameters:
            problems.append(f"the base has no {ours}")
            continue
        packed = f"{ours.removesuffix('.weight')}.scales" in base.parameters
        layer = base.layers.get(ours.rpartition(".")[0])
        if packed and (layer is None or layer.kind == "experts"):
            problems.append(f"{ours} is quantised in the base and cannot be replaced")
            continue
        # A packed layer is replaced by a dense one.
        expected = layer.shape if packed and layer is not None else base.parameters[ours]
        if link is not None and sorted(value.shape) == sorted(expected):
            value = link.apply(value)
        if tuple(value.shape) != expected:
            problems.append(f"{ours} is {expected} in the base, {tuple(value.shape)} in the adapter")
    return problems


def _missing_problems(
    updates: Iterable[Update], config: Mapping[str, Any], base: BaseLayers, reading: Reading
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
        return [f"the configuration selects {theirs}, but there are no arrays for it{noise}" for theirs in missing]
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    reading.notes.append(f"selected, but without arrays, so left as in the base: {shown}")
    return []


def base_names_missing(config: Mapping[str, Any], base: BaseLayers, adapted: set[str]) -> list[str]:
    """Linear layers of the base, as transformers calls them, that the configuration selects and that have no arrays.

    A router is no linear layer to transformers, nor is what PEFT takes for a name of experts.
    """
    missing = []
    experts = any(layer.kind == "experts" for layer in base.layers.values())
    for module, layer in base.layers.items():
        theirs = base.names.transformers_module(module)
        if layer.kind != "linear" or module in adapted or not config.get("target_modules"):
            continue
        if experts and needs_parameter(theirs, base.model_type):
            continue
        if selects(config, theirs):
            missing.append(theirs)
    return missing


def _shown(layer: Any) -> tuple[int, ...]:
    if layer.kind == "experts":
        return layer.experts, layer.outputs, layer.inputs
    return layer.outputs, layer.inputs


def _assemble(
    folder: PeftFolder,
    updates: list[Update],
    groups: Groups,
    layout: Layout,
    sidecar: Sidecar | None,
    described: Mapping[str, Any] | None,
    names: Names,
) -> Adapter:
    """One rank and one scale for all; arrays of PEFT's that have no place here are kept beside them."""
    config = folder.config
    kept = {f"{names.mlx_module(module)}.weight": value for module, value in groups.copies.items()}
    rank = max(update.rank for update in updates) if updates else int(config["r"])
    scale = common_scale(update.scale for update in updates) if updates else scale_of(config)
    if any(update.scale != scale for update in updates):
        layout.folded = _choose_foldings(folder, sidecar, scale, {update.module for update in updates}, names)
    for update in updates:
        if update.has_factor:  # an original of its own is simpler than to find a product that divides back
            layout.folded[update.module] = Folding(NAMES[update.b.dtype], "float32", kept=True)
            kept[f"{update.module}.factor"] = mx.array(update.factor, dtype=mx.float32)
    weights = {}
    modules = [update.module for update in updates]
    while updates:
        update = updates.pop(0)
        b = update.b
        if how := layout.folded.get(update.module):
            if how.kept:
                kept[f"{update.module}.lora_b"] = b
            b = fold(b, update.scale / scale * update.factor, how.folded)
        weights[f"{update.module}.lora_a"], weights[f"{update.module}.lora_b"] = widen_rank(update.a, b, rank)
        if update.magnitude is not None:
            weights[f"{update.module}.m"] = update.magnitude
    full = {}
    for name, value in groups.whole.items():
        (ours, *_), rule = names.mlx_parameters(name), names.by_rule
        link = names.link(ours)
        if link is not None and not link.plain:
            kept[f"{ours}.original"] = value
            value = link.apply(value)
        if rule.transformers_parameter(ours) != name:
            layout.names[ours] = name
        full[ours] = value
    keys, num_layers = _keys(modules, (described or {}).get("num_layers"))
    spec = LoraSpec(
        rank=rank,
        scale=scale,
        dropout=float(config.get("lora_dropout") or 0.0),
        keys=keys,
        num_layers=num_layers,
        fine_tune_type="dora" if config.get("use_dora") else "lora",
    )
    return Adapter(spec, weights, path=folder.path, full=dict(sorted(full.items())), kept=kept)


def _choose_foldings(
    folder: PeftFolder, sidecar: Sidecar | None, scale: float, modules: set[str], names: Names
) -> dict[str, Folding]:
    """How each other scale goes into its lora_b: looks at the values, module by module, and keeps none."""
    groups, _ = group_arrays(folder.arrays()[0], folder.config, sound=True)
    updates, _ = build_updates(groups, folder.config, sidecar, Layout(), names)
    del groups
    chosen = {}
    while updates:
        update = updates.pop()
        if update.scale != scale and update.module in modules:
            chosen[update.module] = choose_folding(update.b, update.scale / scale)
    return chosen


def _keys(modules: list[str], depth: int | None) -> tuple[tuple[str, ...], int]:
    """mlx-lm's ``keys`` and ``num_layers`` for exactly these modules.

    Names inside the block where every block from some one on has the same; else, and outside of the blocks, full
    names, which mlx-lm looks up in the whole model.
    """
    inside = [module for module in modules if layer_of(module) is not None]
    outside = tuple(module for module in modules if layer_of(module) is None)
    layers = sorted({layer for module in inside if (layer := layer_of(module)) is not None})
    keys = tuple(dict.fromkeys(key_of(module) for module in inside))
    if not inside:
        return outside, -1
    last = layers[-1] if depth is None else depth - 1
    regular = len(inside) == len(layers) * len(keys) and layers == list(range(layers[0], last + 1))
    if not regular or (depth is None and layers[0] != 0):
        return (*inside, *outside), -1
    return (*keys, *outside), -1 if depth is None else depth - layers[0]


def _manifest(
    folder: PeftFolder,
    adapter: Adapter,
    metadata: Mapping[str, str],
    layout: Layout,
    described: Mapping[str, Any] | None,
    left_out: list[str],
) -> dict[str, Any]:
    named = {"name": folder.config.get("base_model_name_or_path"), "fingerprint": None}
    return {
        "kind": "converted",
        "base": dict(described) if described is not None else named,
        "source": {
            "format": "peft",
            "config": _without(folder.config, left_out),
            "metadata": dict(metadata),
            "modules": len(adapter.modules()),
            "layout": layout.to_json(),
            **({"left_out": left_out} if left_out else {}),
        },
        "versions": versions(),
    }


def _without(config: Mapping[str, Any], left_out: list[str]) -> dict[str, Any]:
    """PEFT's configuration for what remains of an adapter: the modules left out are excluded by name."""
    if not left_out:
        return dict(config)
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        return {**config, "exclude_modules": "|".join([f"(?:{excluded})", *map(re.escape, left_out)])}
    return {**config, "exclude_modules": [*excluded, *left_out]}


def _require_same_base(adapter: Adapter, base: Mapping[str, Any] | None) -> None:
    given = (base or {}).get("fingerprint")
    problem = adapter.base_problem(str((base or {}).get("name")), given, weights_only=True) if given else ""
    if problem:
        raise AdapterError(problem)


def gate_up_of(modules: Iterable[str]) -> dict[str, list[str]]:
    """``{block: [gate_proj, up_proj]}`` of the adapted ones of every block's expert layers."""
    found: dict[str, list[str]] = {}
    for module in modules:
        one = SWITCH.fullmatch(module)
        if one and one["projection"] in GATE_UP:
            found.setdefault(one["block"], []).append(one["projection"])
    return {block: sorted(names) for block, names in found.items()}
