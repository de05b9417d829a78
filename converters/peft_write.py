"""MLX to PEFT: the configuration and the lazy arrays of a PEFT folder that means what an :class:`Adapter` means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_rsgwm.adapter import Adapter
from mlx_rsgwm.converters.peft_config import alpha_for, rank_of, scale_of
from mlx_rsgwm.converters.peft_experts import GATE_UP, join_gate_up, stack_experts
from mlx_rsgwm.converters.peft_names import (
    MIXTRAL,
    PREFIX,
    ROUTER,
    SWITCH,
    is_embedding,
    key_of,
    layer_of,
    model_order,
    transformers_module,
)
from mlx_rsgwm.converters.peft_read import Layout, gate_up_of
from mlx_rsgwm.converters.peft_uniform import (
    NAMES,
    common_scale,
    filled_with_zeros,
    fold,
    narrow_rank,
    same_bits,
    unfold,
)

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class PeftForm:
    """How an adapter looks in PEFT's format.

    ``config``: adapter_config.json but for the base's name. ``layout``: the form it came with and gets back, else None.
    ``joined``: blocks whose gate and up become one pair. ``tied``: the embedding's pair is the head's as well.
    """

    config: dict[str, Any]
    layout: Layout | None
    joined: dict[str, list[str]] = field(default_factory=dict)
    tied: bool = False


def unconvertible(adapter: Adapter) -> list[str]:
    """Every reason why an adapter has no PEFT form."""
    problems = []
    dora = adapter.spec.fine_tune_type == "dora"
    for module in adapter.modules():
        a = adapter.weights.get(f"{module}.lora_a")
        if a is not None and a.ndim == 3:
            if not SWITCH.fullmatch(module):
                problems.append(f"{module}: only expert layers named switch_mlp have a known PEFT form")
            if dora:
                problems.append(f"{module}: PEFT has no DoRA on experts")
        elif is_embedding(module) and dora:
            problems.append(f"{module}: mlx-lm's DoRA on embeddings scales rows, PEFT's columns")
    for name, value in {**adapter.weights, **adapter.full}.items():
        if value.dtype not in NAMES:
            kind = str(value.dtype).removeprefix("mlx.core.")
            problems.append(f"{name} is {kind}; {', '.join(NAMES.values())} are converted")
    return problems


def peft_form(adapter: Adapter, probe: Callable[[], Arrays], is_tied: Callable[[], bool]) -> PeftForm:
    """The form of ``adapter`` in PEFT: the one it came with if nothing was changed since, else a plain one.

    Args:
        adapter: sound, and without :func:`unconvertible` parts.
        probe: gives its weights once more, to consume; asked for adapters that came from PEFT only.
        is_tied: whether the base's head is its embedding; asked for adapters of embeddings only.
    """
    source = adapter.manifest.get("source") or {}
    config = source.get("config")
    if source.get("format") == "peft" and isinstance(config, dict) and "layout" in source:
        layout = Layout.from_json(source["layout"])
        if source.get("modules") == len(adapter.modules()) and _unchanged(adapter, config, layout, probe()):
            return PeftForm(config, layout, tied=layout.tied)
    joined = gate_up_of(module for module in adapter.modules() if SWITCH.fullmatch(module))
    tied = any(map(is_embedding, adapter.modules())) and is_tied()
    return PeftForm(_plain_config(adapter, joined, tied), None, joined, tied)


def peft_arrays(adapter: Adapter, form: PeftForm) -> Arrays:
    """PEFT's arrays for ``adapter``, lazy; its weights are consumed."""
    layout, config = form.layout, form.config
    model_type = (adapter.manifest.get("base") or {}).get("model_type")
    scale = adapter.spec.scale
    arrays: Arrays = {}
    modules = adapter.modules()
    blocks: dict[str, dict[str, tuple[mx.array, mx.array]]] = {}
    for module in modules:
        a, b = adapter.weights.pop(f"{module}.lora_a"), adapter.weights.pop(f"{module}.lora_b")
        magnitude = adapter.weights.pop(f"{module}.m", None)
        name = PREFIX + _source_name(module, model_type, layout)
        if layout is not None:
            a, b = narrow_rank(a, b, _original_rank(module, config, layout, model_type))
            if how := layout.folded.get(module):
                ratio = _original_scale(module, config, layout, model_type) / scale
                b = adapter.kept[f"{module}.lora_b"] if how.kept else unfold(b, ratio, how.dtype)
        if a.ndim == 3:
            block, _, projection = module.rpartition(".switch_mlp.")
            blocks.setdefault(block, {})[projection] = (a, b)
        elif is_embedding(module):
            arrays |= {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T}
            if form.tied:
                head = f"{PREFIX}lm_head"
                arrays |= {f"{head}.lora_A.weight": b, f"{head}.lora_B.weight": a}
        else:
            arrays |= {f"{name}.lora_A.weight": a.T, f"{name}.lora_B.weight": b.T}
        if magnitude is not None:
            arrays[f"{name}.lora_magnitude_vector"] = magnitude
    for block, pairs in blocks.items():
        arrays |= _expert_arrays(block, pairs, model_type, form)
    arrays |= _whole_arrays(adapter, model_type, layout, modules)
    copies = [name for name in adapter.kept if name.endswith(".weight")] if layout is not None else []
    for name in copies:
        theirs = transformers_module(name.removesuffix(".weight"), model_type)
        arrays[f"{PREFIX}{theirs}.base_layer.weight"] = adapter.kept[name]
    return arrays


def _source_name(module: str, model_type: str | None, layout: Layout | None) -> str:
    named = layout.names.get(module) if layout is not None else None
    if named:
        return named
    found = transformers_module(module, model_type)
    return found.replace(".block_sparse_moe.", ".mlp.") if ROUTER.fullmatch(found) and layout is None else found


def _expert_module(module: str, layout: Layout, model_type: str | None) -> str:
    """The name by which PEFT's patterns know an expert projection."""
    block, _, projection = module.rpartition(".switch_mlp.")
    block = transformers_module(block, model_type)
    if layout.experts == "each":
        return f"{block}.experts.0.{_projection_name(block, projection)}"
    return f"{_stacked_block(block)}.experts.{'gate_up_proj' if projection in GATE_UP else projection}"


def _projection_name(block: str, projection: str) -> str:
    if not block.endswith("block_sparse_moe"):
        return projection
    return next(theirs for theirs, ours in MIXTRAL.items() if ours == projection)


def _stacked_block(block: str) -> str:
    """transformers 5 calls every mixture of experts ``mlp``."""
    return block.removesuffix("block_sparse_moe") + "mlp" if block.endswith("block_sparse_moe") else block


def _pattern_name(module: str, layout: Layout, model_type: str | None) -> str:
    if SWITCH.fullmatch(module):
        return _expert_module(module, layout, model_type)
    return _source_name(module, model_type, layout)


def _original_rank(module: str, config: Mapping[str, Any], layout: Layout, model_type: str | None) -> int:
    return rank_of(config, _pattern_name(module, layout, model_type))


def _original_scale(module: str, config: Mapping[str, Any], layout: Layout, model_type: str | None) -> float:
    return scale_of(config, _pattern_name(module, layout, model_type))


def _unchanged(adapter: Adapter, config: Mapping[str, Any], layout: Layout, probe: Arrays) -> bool:
    """Whether the adapter still is what a PEFT folder of that configuration and layout converts to."""
    model_type = (adapter.manifest.get("base") or {}).get("model_type")
    spec = adapter.spec
    modules = sorted(adapter.modules(), key=model_order)
    ranks = {module: _original_rank(module, config, layout, model_type) for module in modules}
    scales = {module: _original_scale(module, config, layout, model_type) for module in modules}
    if modules and (max(ranks.values()) != spec.rank or common_scale(scales.values()) != spec.scale):
        return False
    if float(config.get("lora_dropout") or 0.0) != spec.dropout:
        return False
    if set(layout.folded) != {module for module, scale in scales.items() if scale != spec.scale}:
        return False
    for module in modules:
        a, b = probe.pop(f"{module}.lora_a"), probe.pop(f"{module}.lora_b")
        if ranks[module] != spec.rank and not filled_with_zeros(a, b, ranks[module]):
            return False
        if how := layout.folded.get(module):
            ratio = scales[module] / spec.scale
            b = narrow_rank(a, b, ranks[module])[1]
            original = adapter.kept.get(f"{module}.lora_b") if how.kept else unfold(b, ratio, how.dtype)
            if original is None or not same_bits(fold(original, ratio, how.folded), b):
                return False
        if layout.experts == "stacked" and module.endswith("up_proj"):
            gate = adapter.weights.get(f"{module.removesuffix('up_proj')}gate_proj.lora_a")
            if gate is None or not same_bits(a, gate):
                return False
    return True


def _expert_arrays(
    block: str, pairs: dict[str, tuple[mx.array, mx.array]], model_type: str | None, form: PeftForm
) -> Arrays:
    theirs = transformers_module(block, model_type)
    arrays: Arrays = {}
    if form.layout is not None and form.layout.experts == "each":
        for projection, (a, b) in pairs.items():
            for expert in range(a.shape[0]):
                name = f"{PREFIX}{theirs}.experts.{expert}.{_projection_name(theirs, projection)}"
                arrays |= {f"{name}.lora_A.weight": a[expert], f"{name}.lora_B.weight": b[expert]}
        return arrays
    stacked = {}
    if form.layout is not None and "gate_proj" in pairs:
        b = mx.concatenate([pairs[name][1] for name in GATE_UP], axis=1)
        stacked["gate_up_proj"] = (pairs["gate_proj"][0], b)
    elif any(name in pairs for name in GATE_UP):
        stacked["gate_up_proj"] = join_gate_up(pairs)
    if "down_proj" in pairs:
        stacked["down_proj"] = pairs["down_proj"]
    for parameter, (a, b) in stacked.items():
        inner = ".base_layer" if parameter == "gate_up_proj" and len(stacked) == 2 else ""
        name = f"{PREFIX}{_stacked_block(theirs)}.experts{inner}"
        flat_a, flat_b = stack_experts(a, b)
        arrays |= {f"{name}.lora_A.weight": flat_a, f"{name}.lora_B.weight": flat_b}
    return arrays


def _whole_arrays(adapter: Adapter, model_type: str | None, layout: Layout | None, modules: list[str]) -> Arrays:
    """Trained parameters of the base: a bias sits in the layer that LoRA wraps, the rest where the base has it."""
    arrays = {}
    for name in list(adapter.full):
        module, _, leaf = name.rpartition(".")
        wrapped = ".base_layer" if leaf == "bias" and module in modules else ""
        theirs = transformers_module(module, model_type)
        arrays[f"{PREFIX}{theirs}{wrapped}.{leaf}"] = value = adapter.full.pop(name)
        if layout is not None and layout.tied and is_embedding(module):
            arrays[f"{PREFIX}lm_head.{leaf}"] = value
    return arrays


# --- the plain configuration ------------------------------------------------------------------------------------


def _plain_config(adapter: Adapter, joined: Mapping[str, list[str]], tied: bool) -> dict[str, Any]:
    spec = adapter.spec
    model_type = (adapter.manifest.get("base") or {}).get("model_type")
    depth = (adapter.manifest.get("base") or {}).get("num_layers")
    modules = adapter.modules()
    experts = [module for module in modules if SWITCH.fullmatch(module)]
    routers = [module for module in modules if ROUTER.fullmatch(module)]
    linear = [module for module in modules if module not in experts and module not in routers]
    targets, layers = _targets([transformers_module(module, model_type) for module in linear], depth)
    if tied and any(is_embedding(module) for module in linear):
        targets.append("lm_head")
    parameters = [f"{_source_name(router, model_type, None)}.weight" for router in routers]
    ranks, alphas = {}, {}
    for block in dict.fromkeys(module.rpartition(".switch_mlp.")[0] for module in experts):
        name = f"{_stacked_block(transformers_module(block, model_type))}.experts"
        if names := joined.get(block):
            parameters.append(f"{name}.gate_up_proj")
            if len(names) == 2:
                ranks[f"{name}.gate_up_proj"] = 2 * spec.rank
                alphas[f"{name}.gate_up_proj"] = alpha_for(spec.scale, 2 * spec.rank)
        if f"{block}.switch_mlp.down_proj" in experts:
            parameters.append(f"{name}.down_proj")
    whole = [name.rpartition(".") for name in adapter.full]
    saved = [transformers_module(module, model_type) for module, _, leaf in whole if leaf == "weight"]
    biases = any(leaf == "bias" and transformers_module(module, model_type) not in saved for module, _, leaf in whole)
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
    if len(inside) != len(layers) * len(keys) or any(not stem.endswith("layers") for stem in stems):
        return [*inside, *outside], None
    return [*keys, *outside], None if not layers or layers == list(range(depth or 0)) else layers
