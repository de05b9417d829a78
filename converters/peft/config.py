"""PEFT's ``adapter_config.json``: what of it linear LoRA and DoRA can represent, which modules it selects, their ranks
and scales.

A field is either harmless, must have one of a few values, or must be empty. A field that is in none of the tables is
another tool's, which PEFT ignores and which is told; but where a PEFT newer than these tables wrote the file, it may be
an option of that version, and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from mlx_rsgwm.core.patterns import LONGEST_NAME, compile_pattern
from mlx_rsgwm.models.token_layers import is_head

# PEFT fields that may have any value here, because the arrays and the scale already say what they did.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",  # PEFT 0.2: merged while evaluating
    "peft_version",
    "qalora_group_size",
    "peft_type",
    "revision",
    "runtime_config",
    "velora_config",  # another backward pass; what was trained is plain LoRA
}

# PEFT fields that are understood here, and checked by ``_value_problems``.
UNDERSTOOD = {
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}

# PEFT fields that must have one of these values (a missing one has the first), and what any other would mean.
REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "task_type": ((None, "CAUSAL_LM"), "only adapters of causal language models are converted"),
    "bias": (("none", "lora_only", "all"), "PEFT has none, lora_only and all"),
    "init_lora_weights": (
        (True, False, "gaussian", "eva", "orthogonal", "mica"),
        "its initialisation changes the base weights; save it with path_initial_model_for_weight_conversion",
    ),
}

# PEFT fields that must be empty, and what they ask for; also of PEFT 0.2 and of forks whose arithmetic is another.
REFUSED = {
    "enable_lora": "LoRA on parts of a fused layer (PEFT 0.2)",
    "use_mora": "MoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "routing between adapters (Arrow)",
    "kasa_config": "KaSA, which changes the base weights",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "monteclora_config": "Monte Carlo LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
LARGEST_NUMBER = 2**63  # a float holds it, with room for a product; JSON has integers of any size
ALL_LINEAR = "all-linear"
TABLES_VERSION = (0, 21)  # of PEFT, whose every LoRA option the tables above have
AT_END = r"(.*\.)?({})$"  # how PEFT matches the keys of rank_pattern and alpha_pattern
LAYER_IN = r"{}\.(?P<layer>\d+)\."  # how it finds a layer's number, at the start of any part of a name
ANY_NAME = r"[^.]*"


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Everything in a PEFT ``adapter_config.json`` that mlx-lm's LoRA and DoRA cannot represent, by field name."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type is {config.get('peft_type')!r}: only linear LoRA is converted"]
    problems = []
    for name, (allowed, reason) in REQUIRED.items():
        value = config.get(name, allowed[0])
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
            problems.append(f"{name} is {value!r}: {reason}")
    for name, value in config.items():
        if name in HARMLESS or name in UNDERSTOOD or name in REQUIRED or value in (None, False, {}, []):
            continue
        if what := REFUSED.get(name):
            problems.append(f"{name} asks for {what}, which has no counterpart")
        elif _is_newer(config.get("peft_version")):
            problems.append(f"{name} is an option of PEFT {config['peft_version']} that this version does not know")
    return problems + _value_problems(config)


def config_notes(config: Mapping[str, Any]) -> list[str]:
    """What is ignored in a configuration without :func:`config_problems`: fields of other tools, which PEFT ignores."""
    known = HARMLESS | UNDERSTOOD | REQUIRED.keys() | REFUSED.keys()
    foreign = sorted(name for name, value in config.items() if name not in known and value not in (None, False, {}, []))
    return [f"ignored, as PEFT does: {', '.join(foreign)}"] if foreign else []


def _is_newer(version: Any) -> bool:
    """Whether a ``peft_version`` is above :data:`TABLES_VERSION`; older files have none."""
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return numbers is not None and (int(numbers[1]), int(numbers[2])) > TABLES_VERSION


def _value_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not _is_rank(rank):
        problems.append(f"r must be a whole number of at least 1, found {rank!r}")
    if not _is_alpha(alpha):
        problems.append(f"lora_alpha must be a finite number other than 0, found {alpha!r}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout must be in [0, 1), found {dropout!r}")
    if config.get("target_modules") is None and not config.get("target_parameters"):
        problems.append(
            "target_modules is missing: PEFT then takes its defaults for the model's class and drops other arrays; "
            "name the modules that were trained"
        )
    for name in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(config.get(name) or False, bool):
            problems.append(f"{name} must be true or false, found {config[name]!r}")
    for name, is_sound, kind in (("rank_pattern", _is_rank, "rank"), ("alpha_pattern", _is_alpha, "alpha")):
        table = config.get(name) or {}
        if not isinstance(table, Mapping):
            problems.append(f"{name} must map module names to numbers, found {table!r}")
            continue
        problems += [f"{name}: {key!r} has {kind} {item!r}" for key, item in table.items() if not is_sound(item)]
        problems += [f"{name}: {reason}" for key in table if (reason := pattern_problem(key, AT_END))]
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"):
        value = config.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if isinstance(value, str) and name in ("modules_to_save", "target_parameters"):
            problems.append(f"{name}: not a list")
        elif not all(isinstance(item, str) for item in items):
            problems.append(f"{name} must be a list of names, found {value!r}")
        elif name == "layers_pattern" or isinstance(value, str):
            check = _layers_problem if name == "layers_pattern" else pattern_problem
            problems += [f"{name}: {reason}" for item in items if (reason := check(item))]
    tokens = config.get("trainable_token_indices") or []
    lists = list(tokens.values()) if isinstance(tokens, Mapping) else [tokens]
    if not all(isinstance(rows, list) and all(isinstance(row, int) for row in rows) for rows in lists):
        problems.append(f"trainable_token_indices must be token ids, or lists of them by module, found {tokens!r}")
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(isinstance(number, int) for number in numbers):
        problems.append(f"layers_to_transform must be layer numbers, found {layers!r}")
    return problems


def pattern_problem(pattern: str, form: str = "{}") -> str | None:
    """Why a regular expression of somebody else's file is not used here, in the ``form`` in which PEFT matches it."""
    try:
        compile_pattern(pattern)
        compile_pattern(form.format(pattern))
    except ValueError as error:
        return str(error)
    return None


def _layers_problem(pattern: str) -> str | None:
    """Why a ``layers_pattern`` is not used here: it is the name of a list of layers, or nearly."""
    if problem := pattern_problem(pattern, LAYER_IN):
        return problem
    plain = compile_pattern(pattern).ways[LONGEST_NAME] < 100 and ("|" not in pattern or "(" in pattern)
    return None if plain or pattern == ANY_NAME else f"{pattern[:60]!r} is not the name of a list of layers"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST_NUMBER < value < LARGEST_NUMBER


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value == int(value) and value >= 1


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and value != 0


# --- ranks and scales -------------------------------------------------------------------------------------------


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank PEFT gives to ``module`` (its full name in the base): rank_pattern's first match, else ``r``."""
    return int(_by_pattern(config.get("rank_pattern"), module, config["r"]))


def scale_of(config: Mapping[str, Any], module: str = "") -> float:
    """PEFT's scaling of a module: alpha / r, or alpha / sqrt(r) with rank stabilisation, both by pattern."""
    rank, alpha = rank_of(config, module), _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(table: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's ``get_pattern_key``: the first key that matches the end of the module's name."""
    for key, value in (table or {}).items():
        if compile_pattern(AT_END.format(key)).match(module):
            return value
    return default


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


# --- which modules ----------------------------------------------------------------------------------------------


def selects(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT, given this configuration, puts LoRA on a linear layer, embedding or parameter of that full name.

    PEFT's ``check_target_module_exists``; a configuration without targets of either kind is refused before.
    """
    if _excluded(config, module):
        return False
    targets = config.get("target_modules")
    if _is_parameter(module) and _ends(module, config.get("target_parameters") or ()):
        return True
    if targets is None:
        return not config.get("target_parameters")
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return not is_head(module)
        return compile_pattern(targets).fullmatch(module)
    if module in targets:
        return True
    return any(module.endswith("." + target) for target in targets) and _in_layers(config, module)


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith("." + end) for end in ends)


def _is_parameter(name: str) -> bool:
    """Whether a full name is a parameter's: ``X.weight``, or one of stacked experts."""
    return name.endswith((".weight", ".experts.gate_up_proj", ".experts.down_proj"))


def _excluded(config: Mapping[str, Any], module: str) -> bool:
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        return compile_pattern(excluded).fullmatch(module)
    if any(module == name or module.endswith("." + name) for name in excluded or ()):
        return True
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in config.get("modules_to_save") or ())


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or ANY_NAME
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if (matched := _layer_by(pattern, module)) is not None:
            return matched >= 0 and matched in (layers if isinstance(layers, list) else [layers])
    return False


@lru_cache(maxsize=1 << 13)  # adapters of one base have the same modules
def _layer_by(pattern: str, module: str) -> int | None:
    """The layer that a pattern finds in a module's name: −1 for a match without one, None for no match."""
    layer = compile_pattern(LAYER_IN.format(pattern)).compiled
    starts = [0, *(place + 1 for place, letter in enumerate(module) if letter == ".")]
    match = next(filter(None, (layer.match(module, start) for start in starts)), None)
    if match is None:
        return None
    return -1 if match["layer"] is None else int(match["layer"])


def token_rows(config: Mapping[str, Any], module: str) -> list[int]:
    """Token ids whose rows of an embedding or head PEFT trains, in the order of its array."""
    tokens = config.get("trainable_token_indices") or []
    if not isinstance(tokens, Mapping):
        return list(tokens)
    return next((rows for name, rows in tokens.items() if module == name or module.endswith(f".{name}")), [])


def saves_whole(config: Mapping[str, Any], module: str) -> bool:
    """Whether ``module`` is, or lies inside, one that PEFT trains and saves whole (``modules_to_save``)."""
    parts = module.split(".")
    ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(ancestor.endswith(saved) for saved in config.get("modules_to_save") or () for ancestor in ancestors)
