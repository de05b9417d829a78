"""PEFT to MLX: an opened PEFT folder as an :class:`Adapter` whose arrays are still on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import mlx.core as mx

from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.module_names import Names
from mlx_rsgwm.converters.peft.config import config_notes, config_problems, scale_of
from mlx_rsgwm.converters.peft.derived import derive_parameters
from mlx_rsgwm.converters.peft.fit import (
    depth_problems,
    fit_problems,
    missing_problems,
    missing_saved,
    other_towers,
    saved_modules,
    take_copies,
    take_other_weights,
)
from mlx_rsgwm.converters.peft.folder import Groups, PeftFolder, group_arrays
from mlx_rsgwm.converters.peft.heads import head_problems, head_trained_apart, hold_other
from mlx_rsgwm.converters.peft.layout import Layout, PeftReading
from mlx_rsgwm.converters.peft.names import SAVED, key_of, layer_of
from mlx_rsgwm.converters.peft.sidecar import (
    ROW_HASHES,
    SIDECAR_FOLDER,
    Sidecar,
    read_sidecar,
    restore,
    rows_of_changed,
)
from mlx_rsgwm.converters.peft.uniform import (
    Folding,
    Update,
    choose_folding,
    common_scale,
    fold_scale,
    scaled_magnitude,
    widen_rank,
)
from mlx_rsgwm.converters.peft.updates import build_updates
from mlx_rsgwm.converters.resized_vocabulary import resized_layers
from mlx_rsgwm.converters.untied_base import untied_layers
from mlx_rsgwm.core.dtypes import NAMES
from mlx_rsgwm.core.errors import AdapterError, raise_problems
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.models.adapter import Adapter, LoraSpec


def read_peft(
    folder: PeftFolder, base: BaseLayers | None, described: Mapping[str, Any] | None, reading: PeftReading | None = None
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
    reading = reading or PeftReading()
    problems = config_problems(config)
    sound = not problems
    arrays, metadata = folder.arrays()
    groups, wrong = group_arrays(arrays, config, sound)
    if not arrays:
        wrong.append("holds no arrays")
    if not sound:
        raise_problems(str(folder.path), problems + wrong, AdapterError)
    sidecar = read_sidecar(folder.path, config, folder.sha256)
    layout = Layout()
    copies: dict[str, mx.array] = {}
    wrong += missing_saved(saved_modules(groups), config, base, reading)
    if base is not None:
        wrong += other_towers(groups, base, reading)
        copies = take_copies(groups, base)
    with ExitStack() as stack:
        if base is not None and base.tied and head_trained_apart(groups, config):
            layout.untied = True
            if groups.tokens:
                wrong.append("trained token rows beside a head apart from the embedding have no counterpart")
            base = stack.enter_context(untied_layers(base))
            hold_other(groups, base, layout)
        if base is not None:
            before = set(groups.full)
            base, layout.rows = resized_layers(base, groups, wrong)
            if not layout.rows:
                take_other_weights(groups, base, reading)
            layout.derived += [base.names.mlx_parameters(name)[0] for name in groups.full if name not in before]
        return _read_groups(folder, groups, wrong, copies, sidecar, layout, base, described, reading, metadata)


def _read_groups(
    folder: PeftFolder,
    groups: Groups,
    problems: list[str],
    copies: dict[str, mx.array],
    sidecar: Sidecar | None,
    layout: Layout,
    base: BaseLayers | None,
    described: Mapping[str, Any] | None,
    reading: PeftReading,
    metadata: Mapping[str, str],
) -> Adapter:
    """The adapter that sorted arrays make, on a base that has a head of its own where they need one."""
    config = folder.config
    names = base.names if base is not None else Names((described or {}).get("model_type"))
    updates, wrong = build_updates(groups, config, sidecar, layout, names)
    problems += wrong + depth_problems(updates, groups, described)
    problems += head_problems(updates, groups, layout, base)
    beside: dict[str, mx.array] = {}
    problems += derive_parameters(groups, config, base, beside, layout.derived)
    if base is not None:
        problems += fit_problems(updates, groups, base)
        problems += missing_problems(updates, config, base, reading)
    reading.notes += config_notes(config)
    if layout.untied:
        reading.notes.append(
            "its head is apart from the embedding, which the base ties; rsgwm fuse makes an untied model, and "
            "mlx_lm.generate and mlx_lm.fuse cannot use this folder"
        )
    if layout.rows:
        reading.notes.append(
            f"its vocabulary has {layout.rows} rows, not the base's; rsgwm fuse makes a model with its tokenizer"
        )
    if not updates and not groups.full and not problems:
        problems.append("holds no LoRA arrays")
    raise_problems(str(folder.path), list(dict.fromkeys(problems)), AdapterError)
    if copies:
        reading.notes.append(f"saved with the base's own values, no change: {', '.join(copies)}")
    adapter = _assemble(folder, updates, groups, layout, sidecar, described, names)
    adapter.kept |= {f"{name}{SAVED}": value for name, value in {**copies, **groups.beside}.items()} | beside
    if sidecar is not None:
        adapter = restore(adapter, sidecar)
        _require_same_base(adapter, described)
    if not adapter.manifest:
        adapter.named_base, adapter.base_assumed = folder.base_name, described is not None
        adapter.manifest = _manifest(folder, adapter, metadata, layout, described, reading.left_out)
    if sidecar is None and (rows := rows_of_changed(folder.path, folder.path.name)) is not None:
        adapter.manifest[ROW_HASHES] = rows
        reading.notes.append(
            f"changed since {SIDECAR_FOLDER}/ was written: of what is kept there only the hashes of training rows count"
        )
    raise_problems(str(folder.path), adapter.shape_problems(), AdapterError)
    return adapter


def early_problems(folder: PeftFolder) -> list[str]:
    """What is wrong with an adapter whatever its base, so that none need be fetched for it."""
    problems = config_problems(folder.config)
    arrays, _ = folder.arrays()
    groups, wrong = group_arrays(arrays, folder.config, not problems)
    if not problems:
        wrong += build_updates(groups, folder.config, None, Layout(), Names())[1]
    return problems + wrong


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
    kept_arrays = {f"{names.mlx_module(module)}.weight": value for module, value in groups.copies.items()}
    rank = max(update.rank for update in updates) if updates else int(config["r"])
    scale = common_scale(update.scale for update in updates) if updates else scale_of(config)
    if any(update.scale != scale for update in updates):
        layout.folded = _choose_foldings(folder, sidecar, scale, {update.module for update in updates}, names)
    for update in updates:
        if update.has_factor:  # an original of its own is simpler than to find a product that divides back
            layout.folded[update.module] = Folding(NAMES[update.b.dtype], "float32", kept=True)
            kept_arrays[f"{update.module}.factor"] = mx.array(update.factor, dtype=mx.float32)
    weights = {}
    modules = [update.module for update in updates]
    while updates:
        update = updates.pop(0)
        b = update.b
        if how := layout.folded.get(update.module):
            if how.kept:
                kept_arrays[f"{update.module}.lora_b"] = b
            b = fold_scale(b, update.scale / scale * update.factor, how.folded)
        weights[f"{update.module}.lora_a"], weights[f"{update.module}.lora_b"] = widen_rank(update.a, b, rank)
        if update.magnitude is not None:
            weights[f"{update.module}.m"] = update.magnitude
            if update.has_factor:
                kept_arrays[f"{update.module}.m"] = update.magnitude
                weights[f"{update.module}.m"] = scaled_magnitude(update.magnitude, update.factor)
    full = {}
    for name, value in groups.full.items():
        (mlx_name, *_), rule = names.mlx_parameters(name), names.by_rule
        link = names.link(mlx_name)
        if link is not None and not link.plain:
            kept_arrays[f"{mlx_name}.original"] = value
            value = link.apply(value)
        if rule.transformers_parameter(mlx_name) != name:
            layout.names[mlx_name] = name
        full[mlx_name] = value
    keys, num_layers = keys_of(modules, (described or {}).get("num_layers"))
    spec = LoraSpec(
        rank=rank,
        scale=scale,
        dropout=float(config.get("lora_dropout") or 0.0),
        keys=keys,
        num_layers=num_layers,
        fine_tune_type="dora" if config.get("use_dora") else "lora",
    )
    return Adapter(spec, weights, origin=folder.path, full=dict(sorted(full.items())), kept=kept_arrays)


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


def keys_of(modules: list[str], depth: int | None) -> tuple[tuple[str, ...], int]:
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
