"""PEFT's LoRA pairs as updates of mlx-lm's modules: linear layers, embeddings, experts single or stacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.module_names import MIXTRAL, ONE_EXPERT, SWITCH, Names
from mlx_rsgwm.converters.peft.config import rank_of, scale_of, selects
from mlx_rsgwm.converters.peft.experts import GATE_UP, parameter_names, split_experts, split_gate_up
from mlx_rsgwm.converters.peft.folder import Groups
from mlx_rsgwm.converters.peft.layout import Layout
from mlx_rsgwm.converters.peft.names import model_order
from mlx_rsgwm.converters.peft.sidecar import Sidecar
from mlx_rsgwm.converters.peft.uniform import Update
from mlx_rsgwm.converters.weight_map import Link, describe_link
from mlx_rsgwm.models.token_layers import is_embedding, is_head


def build_updates(
    groups: Groups, config: Mapping[str, Any], sidecar: Sidecar | None, layout: Layout, names: Names
) -> tuple[list[Update], list[str]]:
    """Every module's update in mlx-lm's layout and the model's order; fills ``layout``; what is wrong with them."""
    problems: list[str] = []
    updates: list[Update] = []
    each: dict[tuple[str, str], dict[int, str]] = {}
    for module, pair in groups.pairs.items():
        if match := ONE_EXPERT.fullmatch(module):
            projection = MIXTRAL.get(match["projection"], match["projection"])
            each.setdefault((match["block"], projection), {})[int(match["expert"])] = module
        elif module.endswith((".experts", ".experts.base_layer")):
            built, wrong = _stacked(module, pair, config, sidecar, names)
            updates += built
            problems += wrong
            layout.experts = "stacked"
        elif reason := _unselected(module, config):
            problems.append(reason)
        else:
            built, wrong = _linear(module, pair, config, groups, names)
            updates += built
            problems += wrong
    for (block, projection), modules in each.items():
        built, wrong = _gathered(block, projection, modules, groups, config, names)
        updates += built
        problems += wrong
        layout.experts = "each"
    for module, pair in groups.embeddings.items():
        if reason := _unselected(module, config):
            problems.append(reason)
        built, wrong = _linear(module, pair, config, groups, names)
        updates += built
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
    match = SWITCH.fullmatch(module)
    if match is None or experts is None:
        return names.transformers_module(module)
    block = names.experts_block(module.rpartition(".")[0])
    if experts == "each":
        return f"{block}.experts.0.{match['projection']}"
    return f"{block}.experts.{'gate_up_proj' if match['projection'] in GATE_UP else match['projection']}"


def _linear(
    module: str, pair: Mapping[str, mx.array], config: Mapping[str, Any], groups: Groups, names: Names
) -> tuple[list[Update], list[str]]:
    """The update of a linear layer or an embedding in mlx-lm, or why there is none."""
    named = module if selects(config, module) else f"{module}.weight"
    mlx_names = names.mlx_modules(module)
    link = names.link(f"{mlx_names[0]}.weight")
    magnitude = groups.magnitudes.get(module)
    if len(mlx_names) > 1:
        return [], [f"{module} is split in mlx-lm into {', '.join(mlx_names)}"]
    factor: Any = 1.0
    if link is not None:
        if link.axes is None or link.shifted:
            return [], [f"{module}: {describe_link(mlx_names[0], link)}, so its update cannot be carried over"]
        factor = link.scale
        if link.scaled and module in groups.embeddings and not isinstance(factor, float):
            return [], [f"{module}: mlx-lm multiplies the rows of this embedding one by one, which LoRA cannot follow"]
    update = Update(
        mlx_names[0],
        module,
        pair["a"].T,
        pair["b"].T,
        magnitude,
        rank_of(config, named),
        scale_of(config, named),
        factor,
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
    if not wrapped or (inner and len(wrapped) != 2):
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
    ranks, scales = {rank_of(config, source) for source in ordered}, {scale_of(config, source) for source in ordered}
    alike = all(len({(pair[leaf].shape, pair[leaf].dtype) for pair in pairs}) == 1 for leaf in "ab")
    if not alike or len(ranks) != 1 or len(scales) != 1:
        return [], [f"{block}: the experts' {projection} differ in rank, scale, shape or dtype"]
    if reason := next((cause for module in ordered if (cause := _unselected(module, config))), None):
        return [], [reason]
    a, b = mx.stack([pair["a"] for pair in pairs]), mx.stack([pair["b"] for pair in pairs])
    switch = names.switch_layers(block)
    if wrong := expert_problems(switch, names):
        return [], wrong
    name = f"{switch}.{projection}"
    return [Update(name, ordered[0], a, b, None, ranks.pop(), scales.pop())], []


def gate_up_of(modules: Iterable[str]) -> dict[str, list[str]]:
    """``{block: [gate_proj, up_proj]}`` of the adapted ones of every block's expert layers."""
    by_block: dict[str, list[str]] = {}
    for module in modules:
        match = SWITCH.fullmatch(module)
        if match and match["projection"] in GATE_UP:
            by_block.setdefault(match["block"], []).append(match["projection"])
    return {block: sorted(names) for block, names in by_block.items()}
