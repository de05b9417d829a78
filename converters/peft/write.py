"""MLX to PEFT: the configuration and the lazy arrays of a PEFT folder that means what an :class:`Adapter` means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.module_names import (
    LOST_BY_PEFT,
    MAMBA_LAYERS,
    MAMBA_TYPES,
    NEEDS_BASE,
    SWITCH,
    Names,
    needs_parameter,
)
from mlx_rsgwm.converters.peft.config import alpha_for, rank_of, scale_of, selects
from mlx_rsgwm.converters.peft.experts import GATE_UP, join_gate_up, stack_experts
from mlx_rsgwm.converters.peft.fit import size_problems
from mlx_rsgwm.converters.peft.layout import Layout
from mlx_rsgwm.converters.peft.names import PREFIX, SAVED, key_of, layer_of, model_order
from mlx_rsgwm.converters.peft.uniform import (
    common_scale,
    filled_with_zeros,
    fold_scale,
    narrow_rank,
    same_bits,
    scaled_magnitude,
    unfold,
)
from mlx_rsgwm.converters.peft.updates import default_source, expert_problems, gate_up_of
from mlx_rsgwm.converters.untied_base import adapts_head, untied_layers
from mlx_rsgwm.converters.weight_map import describe_link
from mlx_rsgwm.core.dtypes import NAMES, name_of
from mlx_rsgwm.core.errors import AdapterError, raise_problems
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.token_layers import is_embedding


@dataclass(frozen=True)
class PeftForm:
    """How an adapter looks in PEFT's format.

    ``config``: adapter_config.json but for the base's name. ``layout``: the form it came with and gets back, else None.
    ``names``: the base's, for a plain form. ``joined``: blocks whose gate and up become one pair. ``tied``: the
    embedding's pair is the head's as well.
    """

    config: dict[str, Any]
    layout: Layout | None
    names: Names
    joined: dict[str, list[str]] = field(default_factory=dict)
    tied: bool = False


def unconvertible(adapter: Adapter) -> list[str]:
    """Every reason why an adapter has no PEFT form."""
    if adapter.spec.is_full:
        return ["it is a full fine-tune, which PEFT has no form for; make a model of it (rsgwm fuse)"]
    problems = []
    dora = adapter.spec.fine_tune_type == "dora"
    known = (adapter.manifest.get("base") or {}).get("model_type") is not None
    for module in adapter.modules():
        a = adapter.weights.get(f"{module}.lora_a")
        if a is not None and a.ndim == 3:
            match = SWITCH.fullmatch(module)
            if match is None:
                problems.append(f"{module}: only experts with gate_proj, up_proj and down_proj have a known PEFT form")
            elif match["switch"] == "experts" and not known:
                problems.append(f"{module}: without its base, only experts named switch_mlp have a known PEFT form")
            if dora:
                problems.append(f"{module}: PEFT has no DoRA on experts")
        elif is_embedding(module) and dora:
            problems.append(f"{module}: mlx-lm's DoRA on embeddings scales rows, PEFT's columns")
    for name, value in {**adapter.weights, **adapter.full}.items():
        if value.dtype not in NAMES:
            kind = name_of(value.dtype)
            problems.append(f"{name} is {kind}; {', '.join(NAMES.values())} are converted")
    return problems


def peft_form(
    adapter: Adapter, probe: Callable[[], dict[str, mx.array]], base: Callable[[bool], BaseLayers | None]
) -> PeftForm:
    """The form of ``adapter`` in PEFT: the one it came with if nothing was changed since, else a plain one.

    Args:
        adapter: sound, and without :func:`unconvertible` parts.
        probe: gives its weights once more, to consume; asked for adapters that came from PEFT only.
        base: the base's layers, None where it is not at hand and need not be (False); not asked for an own form.

    Raises:
        AdapterError: naming the modules that transformers or PEFT have not, or not as mlx-lm has them.
    """
    source = adapter.manifest.get("source") or {}
    config = source.get("config")
    model_type = (adapter.manifest.get("base") or {}).get("model_type")
    if source.get("format") == "peft" and isinstance(config, dict) and "layout" in source:
        layout = Layout.from_json(source["layout"])
        if source.get("modules") == len(adapter.modules()) and _unchanged(adapter, config, layout, probe()):
            return PeftForm(config, layout, Names(model_type), tied=layout.tied)
    embedded = any(map(is_embedding, [*adapter.modules(), *(name.rpartition(".")[0] for name in adapter.full)]))
    layers = base(embedded or model_type in NEEDS_BASE)
    tied = embedded and layers is not None and layers.tied
    if layers is not None and layers.tied and adapts_head(adapter):  # PEFT has the two apart, too
        tied = False
        with untied_layers(layers) as untied:
            names = untied.names
    else:
        names = layers.names if layers is not None else Names(model_type)
    raise_problems(adapter.where, [*size_problems(adapter, layers), *_plain_problems(adapter, names)], AdapterError)
    joined = gate_up_of(module for module in adapter.modules() if SWITCH.fullmatch(module))
    return PeftForm(_plain_config(adapter, joined, tied, names), None, names, joined, tied)


def _plain_problems(adapter: Adapter, names: Names) -> list[str]:
    """Modules and parameters whose update has no place in transformers' model, or that PEFT cannot put one on."""
    problems: list[str] = []
    for module in adapter.modules():
        parameter = f"{module}.weight"
        link = names.link(parameter)
        if adapter.weights[f"{module}.lora_a"].ndim == 3:
            problems += expert_problems(module.rpartition(".")[0], names)
        elif names.weights is not None and (link is None or link.axes is None or link.shifted):
            problems.append(f"{describe_link(parameter, link)}, so its update cannot be carried over")
        if names.model_type in MAMBA_TYPES and module.endswith(MAMBA_LAYERS):
            problems.append(f"{module}: PEFT puts no LoRA on this layer of a Mamba model")
        if (lost := LOST_BY_PEFT.get(names.model_type or "")) and lost in names.transformers_module(module):
            problems.append(
                f"{module}: PEFT 0.21 does not find the arrays of {names.transformers_module(module)} again"
            )
        if f"{module}.m" in adapter.weights and needs_parameter(names.transformers_module(module), names.model_type):
            problems.append(f"{module}: PEFT reaches this layer as a parameter only, where it has no DoRA")
    adapted = set(adapter.modules())
    for name in adapter.full:
        link = names.link(name)
        if name.endswith(".weight") and name.rpartition(".")[0] in adapted:
            problems.append(
                f"{name} is replaced and adapted at once, which PEFT has no form for; rsgwm fuse applies both"
            )
        if names.weights is not None and (link is None or link.axes is None):
            problems.append(f"{describe_link(name, link)}, so it cannot be replaced there")
    return list(dict.fromkeys(problems))


def peft_arrays(adapter: Adapter, form: PeftForm) -> dict[str, mx.array]:
    """PEFT's arrays for ``adapter``, lazy; its weights are consumed."""
    layout, config, names = form.layout, form.config, form.names
    scale = adapter.spec.scale
    arrays: dict[str, mx.array] = {}
    modules = adapter.modules()
    blocks: dict[str, dict[str, tuple[mx.array, mx.array]]] = {}
    for module in modules:
        a, b = adapter.weights.pop(f"{module}.lora_a"), adapter.weights.pop(f"{module}.lora_b")
        magnitude = adapter.weights.pop(f"{module}.m", None)
        name = PREFIX + _source_name(module, names, layout)
        link = names.link(f"{module}.weight")
        if link is not None and link.scaled and b.ndim == 2:
            b = (b / mx.array(link.scale, dtype=mx.float32)).astype(b.dtype)
            if magnitude is not None:
                magnitude = (magnitude / mx.abs(mx.array(link.scale, dtype=mx.float32))).astype(magnitude.dtype)
        if layout is not None:
            magnitude = adapter.kept.get(f"{module}.m", magnitude)
            a, b = narrow_rank(a, b, _original_rank(module, config, layout, names))
            if how := layout.folded.get(module):
                ratio = _original_scale(module, config, layout, names) / scale
                b = adapter.kept[f"{module}.lora_b"] if how.kept else unfold(b, ratio, how.dtype)
        if a.ndim == 3:
            switch, _, projection = module.rpartition(".")
            blocks.setdefault(switch, {})[projection] = (a, b)
        elif is_embedding(module):
            arrays |= {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T}
            if form.tied:
                head = f"{PREFIX}{names.head}"
                arrays |= {f"{head}.lora_A.weight": b, f"{head}.lora_B.weight": a}
        else:
            arrays |= {f"{name}.lora_A.weight": a.T, f"{name}.lora_B.weight": b.T}
        if magnitude is not None:
            arrays[f"{name}.lora_magnitude_vector"] = magnitude
    for switch, pairs in blocks.items():
        arrays |= _expert_arrays(switch, pairs, form)
    arrays |= _whole_arrays(adapter, names, layout, modules, form.tied)
    if layout is not None:
        arrays |= _copies(adapter.kept, {_source_name(module, names, layout) for module in modules})
    copies = [name for name in adapter.kept if name.endswith(".weight")] if layout is not None else []
    for name in copies:
        peft_name = _source_name(name.removesuffix(".weight"), names, layout)
        arrays[f"{PREFIX}{peft_name}.base_layer.weight"] = adapter.kept[name]
    return arrays


def _source_name(module: str, names: Names, layout: Layout | None) -> str:
    """transformers' name of a module; in an own form of experts' first layer, or their parameter."""
    if layout is None:
        return names.transformers_module(module)
    return layout.names.get(module) or default_source(module, layout.experts, names.model_type)


def _original_rank(module: str, config: Mapping[str, Any], layout: Layout, names: Names) -> int:
    return rank_of(config, _pattern_name(module, config, layout, names))


def _original_scale(module: str, config: Mapping[str, Any], layout: Layout, names: Names) -> float:
    return scale_of(config, _pattern_name(module, config, layout, names))


def _pattern_name(module: str, config: Mapping[str, Any], layout: Layout, names: Names) -> str:
    """The name by which PEFT's patterns know a module: a parameter's where it is one's."""
    name = _source_name(module, names, layout)
    return name if SWITCH.fullmatch(module) or selects(config, name) else f"{name}.weight"


def _unchanged(adapter: Adapter, config: Mapping[str, Any], layout: Layout, probe: dict[str, mx.array]) -> bool:
    """Whether the adapter still is what a PEFT folder of that configuration and layout converts to."""
    names = Names((adapter.manifest.get("base") or {}).get("model_type"))
    spec = adapter.spec
    modules = sorted(adapter.modules(), key=model_order)
    ranks = {module: _original_rank(module, config, layout, names) for module in modules}
    scales = {module: _original_scale(module, config, layout, names) for module in modules}
    factors = {module: adapter.kept[f"{module}.factor"] for module in modules if f"{module}.factor" in adapter.kept}
    if modules and (max(ranks.values()) != spec.rank or common_scale(scales.values()) != spec.scale):
        return False
    if float(config.get("lora_dropout") or 0.0) != spec.dropout:
        return False
    if set(layout.folded) != {module for module, scale in scales.items() if scale != spec.scale} | factors.keys():
        return False
    for module in modules:
        a, b = probe.pop(f"{module}.lora_a"), probe.pop(f"{module}.lora_b")
        if ranks[module] != spec.rank and not filled_with_zeros(a, b, ranks[module]):
            return False
        if how := layout.folded.get(module):
            ratio = scales[module] / spec.scale
            b = narrow_rank(a, b, ranks[module])[1]
            original = adapter.kept.get(f"{module}.lora_b") if how.kept else unfold(b, ratio, how.dtype)
            factor = np.array(factors[module]) if module in factors else 1.0
            if original is None or not same_bits(fold_scale(original, ratio * factor, how.folded), b):
                return False
        if (magnitude := adapter.kept.get(f"{module}.m")) is not None and not same_bits(
            scaled_magnitude(magnitude, np.array(factors[module])), adapter.weights[f"{module}.m"]
        ):
            return False
        if layout.experts == "stacked" and module.endswith("up_proj"):
            gate = adapter.weights.get(f"{module.removesuffix('up_proj')}gate_proj.lora_a")
            if gate is None or not same_bits(a, gate):
                return False
    return True


def _expert_arrays(switch: str, pairs: dict[str, tuple[mx.array, mx.array]], form: PeftForm) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    layout = form.layout
    if layout is not None and layout.experts == "each":
        for projection, (a, b) in pairs.items():
            first = _source_name(f"{switch}.{projection}", form.names, layout)
            for expert in range(a.shape[0]):
                name = PREFIX + first.replace(".experts.0.", f".experts.{expert}.")
                arrays |= {f"{name}.lora_A.weight": a[expert], f"{name}.lora_B.weight": b[expert]}
        return arrays
    stacked = {}
    if layout is not None and "gate_proj" in pairs:
        b = mx.concatenate([pairs[name][1] for name in GATE_UP], axis=1)
        stacked["gate_up_proj"] = (pairs["gate_proj"][0], b)
    elif any(name in pairs for name in GATE_UP):
        stacked["gate_up_proj"] = join_gate_up(pairs)
    if "down_proj" in pairs:
        stacked["down_proj"] = pairs["down_proj"]
    if layout is None:
        experts = f"{form.names.experts_block(switch)}.experts"
    else:
        experts = _source_name(f"{switch}.{next(iter(pairs))}", form.names, layout).rpartition(".")[0]
    for parameter, (a, b) in stacked.items():
        inner = ".base_layer" if parameter == "gate_up_proj" and len(stacked) == 2 else ""
        flat_a, flat_b = stack_experts(a, b)
        name = f"{PREFIX}{experts}{inner}"
        arrays |= {f"{name}.lora_A.weight": flat_a, f"{name}.lora_B.weight": flat_b}
    return arrays


def _copies(kept_arrays: Mapping[str, mx.array], adapted: set[str]) -> dict[str, mx.array]:
    """What came with the base's own values and is kept, under PEFT's names again."""
    arrays = {}
    for name, value in kept_arrays.items():
        if name.endswith(SAVED):
            module, _, leaf = name.removesuffix(SAVED).rpartition(".")
            wrapped = ".base_layer" if leaf == "bias" and module in adapted else ""
            arrays[f"{PREFIX}{module}{wrapped}.{leaf}"] = value
    return arrays


def _whole_arrays(
    adapter: Adapter, names: Names, layout: Layout | None, modules: list[str], tied: bool
) -> dict[str, mx.array]:
    """Trained parameters of the base: a bias sits in the layer that LoRA wraps, the rest where the base has it."""
    arrays = {}
    for name in list(adapter.full):
        module, _, leaf = name.rpartition(".")
        wrapped = ".base_layer" if leaf == "bias" and module in modules else ""
        peft_name = (layout.names.get(name) if layout is not None else None) or names.transformers_parameter(name)
        peft_name = peft_name.removesuffix(f".{leaf}")
        value = adapter.full.pop(name)
        if layout is not None and name in layout.derived:
            continue
        link = names.link(name)
        if layout is not None and f"{name}.original" in adapter.kept:
            value = adapter.kept[f"{name}.original"]
        elif link is not None:
            value = link.undo(value)
        arrays[f"{PREFIX}{peft_name}{wrapped}.{leaf}"] = value
        if tied and is_embedding(module):
            arrays[f"{PREFIX}{names.head}.{leaf}"] = value
    return arrays


# --- the plain configuration ------------------------------------------------------------------------------------


def _plain_config(adapter: Adapter, joined: Mapping[str, list[str]], tied: bool, names: Names) -> dict[str, Any]:
    spec = adapter.spec
    depth = (adapter.manifest.get("base") or {}).get("num_layers")
    modules = adapter.modules()
    experts = [module for module in modules if SWITCH.fullmatch(module)]
    others = [names.transformers_module(module) for module in modules if module not in experts]
    alone = [module for module in others if needs_parameter(module, names.model_type)]
    linear = [module for module in others if module not in alone]
    targets, layers = _targets(linear, depth)
    if tied and any(map(is_embedding, linear)):
        targets.append(names.head)
    parameters = [f"{module}.weight" for module in alone]
    ranks, alphas = {}, {}
    for switch in dict.fromkeys(module.rpartition(".")[0] for module in experts):
        name = f"{names.experts_block(switch)}.experts"
        if projections := joined.get(switch.rpartition(".")[0]):
            parameters.append(f"{name}.gate_up_proj")
            if len(projections) == 2:
                ranks[f"{name}.gate_up_proj"] = 2 * spec.rank
                alphas[f"{name}.gate_up_proj"] = alpha_for(spec.scale, 2 * spec.rank)
        if f"{switch}.down_proj" in experts:
            parameters.append(f"{name}.down_proj")
    full = [name.rpartition(".") for name in adapter.full]
    saved = [names.transformers_module(module) for module, _, leaf in full if leaf == "weight"]
    if tied and any(map(is_embedding, saved)):
        saved.append(names.head)
    biases = any(leaf == "bias" and names.transformers_module(module) not in saved for module, _, leaf in full)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": spec.rank,
        "lora_alpha": alpha_for(spec.scale, spec.rank),
        "lora_dropout": 0.0 if parameters else spec.dropout,  # PEFT has no dropout on parameters
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
        "bias": "all" if biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_dora": spec.fine_tune_type == "dora",
        "use_rslora": False,
        **({"target_parameters": parameters} if parameters else {}),
    }


def _targets(modules: list[str], depth: int | None) -> tuple[list[str], list[int] | None]:
    """``target_modules`` and ``layers_to_transform`` that select exactly these modules.

    Names inside the block, matched as suffixes, when every adapted block has the same ones; full names otherwise, and
    for modules outside of the blocks, which PEFT takes whatever the layers.
    """
    inside = [module for module in modules if layer_of(module) is not None]
    outside = [module for module in modules if layer_of(module) is None]
    layers = sorted({layer for module in inside if (layer := layer_of(module)) is not None})
    keys = list(dict.fromkeys(key_of(module) for module in inside))
    stems = {module.split(f".{layer_of(module)}.")[0] for module in inside}
    if (
        len(inside) != len(layers) * len(keys)
        or any(key.count(".") == 0 for key in keys)
        or any(not stem.endswith("layers") for stem in stems)
    ):
        return [*inside, *outside], None
    return [*keys, *outside], None if not layers or layers == list(range(depth or 0)) else layers
