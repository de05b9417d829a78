"""PEFT's ``adapter_config.json``: what of it mlx-lm's linear LoRA can represent, and what alpha means.

A field is either harmless, must have one of a few values, or must be empty; a field that is in none of the tables
must be empty too, so that a PEFT option newer than this file is refused by name and never silently ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# PEFT fields that may have any value here, because the arrays and the scale already say what they did.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "peft_type",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "use_rslora",
}

# PEFT fields that must have one of these values (a missing one has the first), and what any other would mean.
REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "task_type": ((None, "CAUSAL_LM"), "only adapters of causal language models are converted"),
    "bias": (("none",), "trained biases have no counterpart"),
    "init_lora_weights": (
        (True, False, "gaussian", "eva", "orthogonal"),
        "its initialisation changes the base weights; save it with path_initial_model_for_weight_conversion",
    ),
}

# PEFT fields that must be empty, and what they ask for.
REFUSED = {
    "use_dora": "DoRA",
    "rank_pattern": "ranks that differ between modules",
    "alpha_pattern": "scales that differ between modules",
    "modules_to_save": "fully trained modules",
    "lora_bias": "a bias on lora_B",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters (expert stacks)",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "megatron_config": "Megatron layers",
}


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Everything in a PEFT ``adapter_config.json`` that linear LoRA in mlx-lm cannot represent, by field name."""
    problems = []
    if config.get("peft_type") != "LORA":
        return [f"peft_type is {config.get('peft_type')!r}: only linear LoRA is converted"]
    for name, (allowed, reason) in REQUIRED.items():
        value = config.get(name, allowed[0])
        if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
            problems.append(f"{name} is {value!r}: {reason}")
    for name, value in config.items():
        if name in HARMLESS or name in REQUIRED or value is None or value in (False, {}, []):
            continue
        what = REFUSED.get(name)
        problems.append(
            f"{name} asks for {what}, which is not converted yet" if what else f"{name} is an unknown PEFT option"
        )
    rank: Any
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not _is_number(rank) or rank != int(rank) or rank < 1:
        problems.append(f"r must be a whole number of at least 1, found {rank!r}")
    if not _is_number(alpha) or alpha == 0:
        problems.append(f"lora_alpha must be a finite number other than 0, found {alpha!r}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout must be in [0, 1), found {dropout!r}")
    if not isinstance(config.get("use_rslora", False), bool):
        problems.append(f"use_rslora must be true or false, found {config['use_rslora']!r}")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def scale_of(config: Mapping[str, Any]) -> float:
    """PEFT's scaling: alpha / r, or alpha / sqrt(r) with rank stabilisation."""
    alpha, rank = config["lora_alpha"], config["r"]
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def alpha_for(scale: float, rank: int) -> int | float:
    """The alpha with ``alpha / rank == scale``, an integer where there is one.

    The product can be one unit in the last place off; then a neighbour usually divides back exactly. Where none
    does, PEFT sees the nearest scale and the sidecar keeps ours.
    """
    alpha = scale * rank
    for candidate in (float(round(alpha)), alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf)):
        if candidate / rank == scale:
            return int(candidate) if candidate.is_integer() else candidate
    return alpha
