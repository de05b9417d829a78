"""A base's config.json as mlx-lm has to be told it, so that it computes what transformers computes.

mlx-lm's models take the fields they know and pass over the rest without a word: fields that transformers 5 writes in
other places, defaults that only transformers has, and settings that they do not compute at all. The first two are
supplied here; the last are refused by name. ``bench/base_configs.py`` changes one field after the other and compares
logits; what it found stands in the tables below.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.models.base_folder import first_line, read_config
from mlx_rsgwm.models.foreign_quantisation import quantisation_settings, refuse_foreign_quantisation
from mlx_rsgwm.models.rope import correct_rotations
from mlx_rsgwm.models.stored_head import refuse_other_head
from mlx_rsgwm.models.window import modules_of, source_of, unapplied_window

ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# Fields that change what is computed. Where a model of mlx-lm does not read one, transformers' default is built in.
COMPUTED = (
    *("hidden_act", "hidden_activation", "activation_function", "mamba_hidden_act", "mlp_hidden_act"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv", "qk_layernorm"),
    *("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
    *("rope_interleave", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "use_qk_norm", "qk_norm"),
    *("use_parallel_residual", "attention_dropout_scale", "routed_scaling_factor", "norm_topk_prob", "topk_method"),
    *("scoring_func", "n_group", "topk_group", "time_step_min", "time_step_limit", "mup_enabled", "scale_emb"),
    *("scale_depth", "dim_model_base", "attention_chunk_size", "attn_temperature_tuning", "swiglu_limit"),
    *("use_bidirectional_attention",),
)
GPT2_PREFIX = "transformer."
SAME_ACTIVATION = (
    {"silu", "swish"},
    {"gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"},
    {"gelu", "gelu_python"},
)
# Fields that a model of mlx-lm reads and computes with wrongly: the values with which it is right.
RIGHT_WITH: dict[str, dict[str, tuple[Any, ...]]] = {
    "falcon_h1": {
        "hidden_act": ("silu", "swish"),
        "key_multiplier": (1, None),
        "attention_in_multiplier": (1, None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "projectors_bias": (False, None),
        "mamba_proj_bias": (False, None),
    },
    "gpt_bigcode": {"multi_query": (True, None)},
    "jamba": {"num_experts": (1,)},  # it weighs the chosen experts among themselves
    "mamba2": {"n_groups": (1, None), "layer_norm_epsilon": (1e-5, None), "hidden_act": ("silu", "swish")},
    "glm4_moe_lite": {"rms_norm_eps": (1e-5, 1e-6, None)},
    "nemotron_h": {"time_step_min": (0.001, None), "mamba_hidden_act": ("silu", "swish")},
}
# Models that scale the weights of the chosen experts only where there are several.
SEVERAL_EXPERTS = ("afmoe", "deepseek_v3", "deepseek_v32", "exaone_moe", "glm4_moe", "glm4_moe_lite")
# Activations that mlx-lm computes by another formula for the same function: logits differ by about 2e-4 of the largest.
NEARLY = {
    "gemma": "the exact GELU where this model has its tanh form",
    "gpt_bigcode": "another form of GELU",
    "gpt_neox": "another form of GELU",
    "starcoder2": "another form of GELU",
    "gemma3_text": "with a scale of the embedding rounded to bfloat16",
    "nemotron_h": "the state space layers by another form of the same sum",
}


def open_model(path: Path) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """The model in a folder, its arrays lazy, with the rotary embeddings and settings that its config.json means.

    Returns:
        the model, its configuration (config.json and what was supplied), and what the user should be told of it.

    Raises:
        RsgwmError: an architecture that mlx-lm has not, a quantisation that it does not read, arrays that do not fit,
            or settings that it would pass over.
    """
    from mlx_lm.utils import load_model

    written = read_config(path)
    refuse_foreign_quantisation(path, written)
    meant = transformers_config(written)
    try:
        supplied = supplied_fields(written, meant)
        model, config = load_model(path, lazy=True, model_config=supplied, get_model_classes=model_classes)
    except SystemExit:  # as mlx-lm's module of OLMo 1 ends the process where ai2-olmo is not installed
        raise RsgwmError(
            f"{path} needs a package that is not installed for mlx-lm's model {written.get('model_type')!r}"
        ) from None
    except Exception as error:  # any mismatch of config and weights may surface anywhere in mlx-lm
        told = first_line(error) if not str(error).startswith(("Received ", "Missing ")) else _names(error)
        method = quantisation_settings(written).get("quant_method")
        packed = f" (its weights are quantised by {method})" if method else ""
        raise RsgwmError(f"{path} cannot be loaded by mlx-lm{packed}: {told}") from error
    refuse_other_head(path, (name for name, _ in model.named_modules()))
    notes: list[str] = []
    if meant is not None:
        notes = _check(path, model, meant.get_text_config())
    return model, config, notes


def _names(error: Exception) -> str:
    """mlx's list of missing or superfluous arrays in one line, the first few by name."""
    lines = [line.strip().rstrip(".,") for line in str(error).splitlines() if line.strip()]
    more = f", and {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"{lines[0]} {', '.join(lines[1:4])}{more}"


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's classes of a model and its arguments; GPT-2's also for names as ``save_pretrained`` writes them."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    if config["model_type"] != "gpt2":
        return model_class, arguments

    class Prefixed(model_class):  # type: ignore[misc,valid-type]
        """mlx-lm's reads the arrays of the model below the head alone, without their prefix."""

        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            inner = {name.removeprefix(GPT2_PREFIX): value for name, value in weights.items()}
            dropped = (".attn.bias", ".attn.masked_bias")  # masks; a head is compared with its embedding elsewhere
            remaining = {name: value for name, value in inner.items() if not name.endswith(dropped)}
            if any(name.startswith(GPT2_PREFIX) for name in weights):
                remaining.pop("lm_head.weight", None)
            return dict(super().sanitize(remaining))

    return Prefixed, arguments


# --- what transformers reads in the file --------------------------------------------------------------------------


def transformers_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object, its defaults filled in; None of a type or a file that it does not read."""
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        return None
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its remarks are about its own use of the file
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(_plain_floats(dict(config)))
    except Exception:  # transformers checks types; what mlx-lm makes of such a file is for mlx-lm to say
        return None
    finally:
        logger.setLevel(level)


def _plain_floats(value: Any) -> Any:
    """A copy of JSON values; transformers 5 writes infinity as ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_floats(inner) for key, inner in value.items()}
    return [_plain_floats(item) for item in value] if isinstance(value, list) else value


def supplied_fields(config: Mapping[str, Any], meant: Any) -> dict[str, Any]:
    """Fields to hand to mlx-lm beyond those of config.json, which stay as they are."""
    text: Any = config.get("text_config")
    wrapped = isinstance(text, dict)
    supplied = _older_rope_fields(config)
    known = _fields_of(config)
    if meant is not None and not wrapped:
        defaults = {key: value for key, value in meant.to_dict().items() if key not in ROPE_FIELDS}
        defaults |= _older_rope_fields({"rope_parameters": getattr(meant, "rope_parameters", None)})
        defaults |= _renamed(defaults, known)
        supplied |= {
            key: value
            for key, value in defaults.items()
            if key in known
            and (config.get(key) is None or (key == "sliding_window_pattern" and isinstance(value, str)))
            and key not in supplied
            and value is not None
            and not key.endswith("_config")
        }
        supplied |= _required(known, {**config, **supplied}, meant)
    if wrapped:
        inner = {} if meant is None else _text_defaults(meant.get_text_config())
        given = {key: value for key, value in text.items() if value is not None or key not in inner}
        supplied["text_config"] = {**inner, **given, **_older_rope_fields(text)}
        if "vocab_size" in known and "vocab_size" not in config and "vocab_size" in text:
            supplied["vocab_size"] = text["vocab_size"]  # mlx-lm would take its own default for the language part's
    return supplied


def _required(known: Mapping[str, Any], given: Mapping[str, Any], meant: Any) -> dict[str, Any]:
    """Fields without which mlx-lm builds no model, by transformers' names or as it derives them; else null."""
    usual = {"rope_scaling": None, "sliding_window_pattern": None, "partial_rotary_factor": 1.0}
    missing = [key for key, field in known.items() if field.default is inspect.Parameter.empty and key not in given]
    values = {key: getattr(meant, key, usual.get(key)) for key in missing}
    hidden, heads = (getattr(meant, key, None) for key in ("hidden_size", "num_attention_heads"))
    derived = {"head_dim": hidden // heads if hidden and heads else None, "num_key_value_heads": heads}
    values = {key: derived.get(key) if value is None else value for key, value in values.items()}
    return {key: value for key, value in values.items() if value is not None or key in usual}


def config_for_mlx_lm(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the fields that :func:`open_model` supplies."""
    return {**config, **supplied_fields(config, transformers_config(config))}


def _text_defaults(meant: Any) -> dict[str, Any]:
    """What transformers takes for a language part's fields where the file says nothing."""
    values = {key: value for key, value in meant.to_dict().items() if value is not None and key not in ROPE_FIELDS}
    values |= _older_rope_fields({"rope_parameters": getattr(meant, "rope_parameters", None)})
    for key in ("architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config"):
        values.pop(key, None)
    return values | _renamed(values, {"sliding_window_pattern": None})


def _renamed(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' fields under the names that some of mlx-lm's models have for them."""
    renamed = {
        "rotary_emb_base": values.get("rope_theta"),
        "rotary_pct": values.get("partial_rotary_factor"),
        "n_ctx": values.get("n_positions"),
        "block_dim": values.get("hidden_size"),
        "sliding_window_pattern": _pattern(values.get("layer_types")),
    }
    pattern = known.get("sliding_window_pattern")
    if pattern is not None and "str" in str(pattern.annotation):
        renamed["sliding_window_pattern"] = _letters(values.get("layer_types"))
    return {key: value for key, value in renamed.items() if key in known and value is not None}


def _pattern(layer_types: Any) -> int | None:
    """Every how many layers one sees everything; None where that does not describe the layers."""
    if not isinstance(layer_types, list) or "full_attention" not in layer_types:
        return None
    pattern = layer_types.index("full_attention") + 1
    described = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(len(layer_types))]
    return pattern if described == layer_types else None


def _letters(layer_types: Any) -> str | None:
    """The layers as EXAONE writes them, L for a window and G for none."""
    if not isinstance(layer_types, list) or "sliding_attention" not in layer_types:
        return None
    return "".join("L" if kind == "sliding_attention" else "G" for kind in layer_types)


def _older_rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes ``rope_parameters``, which most of mlx-lm's models ignore without a word: the older fields.

    Where every layer type has the same table, that; different ones are left to the models that know them.
    """
    table = config.get("rope_parameters")
    if not isinstance(table, dict) or not table:
        return {}
    if all(isinstance(value, dict) for value in table.values()):
        by_type = {key: value for key, value in table.items() if isinstance(value, dict)}
        return _rope_fields_by_type(by_type, config)
    fields = {key: table[key] for key in ("rope_theta", "partial_rotary_factor") if key in table}
    scaling = {key: value for key, value in table.items() if key not in fields}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" or "mrope_section" in scaling:
        fields["rope_scaling"] = {**scaling, "type": kind, "rope_type": kind}
    return {key: value for key, value in fields.items() if config.get(key) is None}


def _rope_fields_by_type(tables: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's two thetas by their older names, a single table by its fields."""
    full, local = tables.get("full_attention"), tables.get("sliding_attention")
    if full is None:
        return {}
    fields = _older_rope_fields({"rope_parameters": full})
    if local is not None and "rope_theta" in local:
        fields["rope_local_base_freq"] = local["rope_theta"]
    return {key: value for key, value in fields.items() if config.get(key) is None}


def _module_of(config: Mapping[str, Any]) -> Any:
    """mlx-lm's module for a configuration; None where there is none."""
    from mlx_lm.utils import _get_classes

    try:
        model_class, _ = _get_classes(dict(config))
    except (ValueError, TypeError, SystemExit):
        return None
    return sys.modules[model_class.__module__]


def _fields_of(config: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    module = _module_of(config)
    return {} if module is None else inspect.signature(module.ModelArgs).parameters


# --- what mlx-lm made of it ---------------------------------------------------------------------------------------


def _check(path: Path, model: nn.Module, meant: Any) -> list[str]:
    """Correct rotations, refuse settings that are passed over; returns what to tell."""
    replaced, wrong = correct_rotations(model, meant)
    modules = modules_of(model)
    source = source_of(modules)
    names = [module.__name__.rpartition(".")[2] for module in modules]
    problems = [*_unread(meant, source), *_misread(meant, names), *_misplaced(meant, model), *_foreign_part(meant)]
    problems += [f"rope_parameters mean other rotary embeddings ({told})" for told in wrong]
    raise_problems(
        f"{path / 'config.json'}: mlx-lm would compute another model than transformers ({names[0]} does not know)",
        problems,
    )
    notes = [f"mlx-lm itself would run this model with {told}; corrected here" for told in replaced]
    nearly = [NEARLY[name] for name in names if name in NEARLY]
    notes += [f"mlx-lm computes {told}: logits differ by about 2e-4 of the largest" for told in nearly]
    window = unapplied_window(meant, model, source)
    if window is not None:
        notes.append(
            f"mlx-lm does not apply this model's window of {window:,} tokens: texts up to that length are as meant"
        )
    return notes


def window_left_out(path: Path, model: nn.Module) -> int | None:
    """The sliding window of the base in ``path`` that mlx-lm's ``model`` of it does not apply; None: there is none."""
    meant = transformers_config(read_config(path))
    return None if meant is None else unapplied_window(meant.get_text_config(), model, source_of(modules_of(model)))


def _unread(meant: Any, source: str) -> Iterator[str]:
    """Settings other than the default of their architecture, in fields that no line of mlx-lm's model mentions."""
    usual = type(meant)().to_dict()
    for key in COMPUTED:
        value = getattr(meant, key, None)
        if key not in usual or value is None or _alike(value, usual[key]):
            continue
        if not re.search(rf"\b(args|config|self)\.{key}\b", source):
            yield f"{key} {value!r} (it has {usual[key]!r} built in)"


def _misread(meant: Any, names: list[str]) -> Iterator[str]:
    for name in names:
        for key, right in RIGHT_WITH.get(name, {}).items():
            value = getattr(meant, key, None)
            if value not in right:
                yield f"{key} {value!r} (it is right with {right[0]!r} only)"
        if name in SEVERAL_EXPERTS and getattr(meant, "num_experts_per_tok", 2) == 1:
            yield "num_experts_per_tok 1 (it does not weigh a single expert)"


def _misplaced(meant: Any, model: Any) -> Iterator[str]:
    """Windows that mlx-lm would put on other layers."""
    arguments = getattr(getattr(model, "language_model", model), "args", None)
    pattern, kinds = getattr(arguments, "sliding_window_pattern", None), getattr(meant, "layer_types", None) or ()
    if isinstance(pattern, int) and pattern and kinds and _pattern(list(kinds)) != pattern:
        yield f"layer_types {list(kinds)} (it has a window on all but every layer of {pattern})"
    windowed = "sliding_attention" in (kinds or ())
    if getattr(meant, "model_type", "") == "exaone4" and meant.sliding_window and not windowed:
        yield f"sliding_window {meant.sliding_window} without a layer that has one (transformers rotates none then)"


def _foreign_part(meant: Any) -> Iterator[str]:
    """A part of a head to rotate, where the architecture rotates whole ones: transformers then mixes up dimensions."""
    table, usual = (getattr(config, "rope_parameters", None) or {} for config in (meant, type(meant)()))
    given, known = ({"": table} | {k: v for k, v in table.items() if isinstance(v, dict)} for table in (table, usual))
    part = next((v["partial_rotary_factor"] for v in given.values() if v.get("partial_rotary_factor")), 1.0)
    proportional = any(value.get("rope_type") == "proportional" for value in given.values())
    if part != 1.0 and not proportional and not any("partial_rotary_factor" in value for value in known.values()):
        yield f"partial_rotary_factor {part} (this architecture rotates whole heads)"


def _alike(value: Any, other: Any) -> bool:
    if value == other:
        return True
    return any(value in group and other in group for group in SAME_ACTIVATION if isinstance(value, str))
