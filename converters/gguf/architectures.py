"""The one table of llama.cpp's architectures: their model types, and their names in transformers' terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_rsgwm.converters.gguf.file import READABLE, GgufFile
from mlx_rsgwm.core.errors import RsgwmError

ROPE_FACTORS = "rope_freqs.weight"
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
COMMON = {
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """How one architecture of llama.cpp is called in transformers.

    ``model_type``: of the whole models that are read from and written to a file; ``also``: others that are written as
    one, with the same meaning; ``adapters``: those of which adapters alone have a form here. ``class_name``: what a
    model that is read is, empty where only adapters have a form. ``blocks``: names inside a block, llama.cpp's to
    transformers'. ``biases``: modules with a bias. ``interleaved``: query and key rows are in llama.cpp's own order.
    ``norm_offset``: what it adds to norms' weights. ``epsilon``: of the norms, transformers' name and llama.cpp's.
    ``partial_rotation``: a part of a head's dimensions may be rotated.
    """

    model_type: str
    class_name: str = ""
    blocks: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER_NAMES)
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    partial_rotation: bool = False
    also: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        {**COMMON, **ATTENTION, **GATED},
        interleaved=True,
        also=("mistral",),
        adapters=("mixtral",),
        extra={"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", {**COMMON, **ATTENTION, **GATED}, biases=tuple(ATTENTION)),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        {**COMMON, **ATTENTION, **GATED, **HEAD_NORMS},
        extra={"attention_bias": False},
    ),
    "gemma": Architecture(
        "gemma", "GemmaForCausalLM", {**COMMON, **ATTENTION, **GATED}, norm_offset=1.0, activation="gelu_pytorch_tanh"
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        {**COMMON, **ATTENTION, **GATED, **GEMMA_NORMS},
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**COMMON, **ATTENTION, **GATED, **GEMMA_NORMS, **HEAD_NORMS},
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        also=("gemma3",),
    ),
    "phi2": Architecture(
        "phi",
        "PhiForCausalLM",
        {
            **ATTENTION,
            "attn_norm": "input_layernorm",
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        biases=(*ATTENTION, "attn_norm", "attn_output", "ffn_up", "ffn_down", "output_norm", "output"),
        activation="gelu_new",
        outer={**OUTER_NAMES, "output_norm": "model.final_layernorm"},
        epsilon=("layer_norm_eps", "attention.layer_norm_epsilon"),
        partial_rotation=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {**COMMON, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "smollm3": Architecture("smollm3", interleaved=True),
    "granite": Architecture("granite", interleaved=True),
    "qwen2moe": Architecture("qwen2_moe"),
    "qwen3moe": Architecture("qwen3_moe"),
}
WHOLE = {name: architecture for name, architecture in ARCHITECTURES.items() if architecture.class_name}
# Model type: llama.cpp's architecture of whole models that are written as a file, and of adapters.
MODEL_TYPES = {kind: name for name, row in WHOLE.items() for kind in (row.model_type, *row.also)}
ADAPTER_TYPES = {
    kind: name for name, row in ARCHITECTURES.items() for kind in (row.model_type, *row.also, *row.adapters)
}
# What transformers' class takes for these is not in the file: their largest models divide by another number.
WIDE_QUERIES = {("gemma2", 46), ("gemma3", 62)}


def architecture_of(gguf: GgufFile) -> Architecture:
    """The architecture a file names.

    Raises:
        RsgwmError: one that is not read.
    """
    name = str(gguf.metadata.get("general.architecture"))
    if name not in WHOLE:
        raise RsgwmError(f"{gguf.path} has the architecture {name}; only {', '.join(WHOLE)} are converted from GGUF")
    return WHOLE[name]


def base_config(gguf: GgufFile) -> dict[str, Any]:
    """The ``config.json`` of transformers' class that a file's metadata describes."""
    metadata, where = gguf.metadata, str(gguf.path)
    architecture = architecture_of(gguf)
    name = str(metadata["general.architecture"])
    if metadata.get("split.count", 1) not in (0, 1):
        raise RsgwmError(f"{where} is one of {metadata['split.count']} parts; merge them with llama-gguf-split first")
    if metadata.get(f"{name}.expert_count", 0):
        raise RsgwmError(f"{where} is a mixture of experts, which is not converted from GGUF")
    hidden = positive(gguf, "embedding_length")
    heads = positive(gguf, "attention.head_count")
    head_dim = positive(gguf, "attention.key_length", hidden // heads)
    if head_dim % 2:
        raise RsgwmError(f"{where}: a head of {head_dim} dimensions cannot be rotated in pairs")
    embedding = gguf.tensors.get("token_embd.weight")
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": positive(gguf, "block_count"),
        "intermediate_size": positive(gguf, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": positive(gguf, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        architecture.epsilon[0]: number(gguf, architecture.epsilon[1], 1e-5),
        "vocab_size": embedding.shape[0] if embedding else positive(gguf, "vocab_size"),
        "max_position_embeddings": positive(gguf, "context_length"),
        "rope_theta": number(gguf, "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(gguf, head_dim),
        "hidden_act": architecture.activation,
        **architecture.extra,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    if architecture.norm_offset:
        config |= _gemma_fields(gguf, name, config)
    if name == "phi3":
        config |= _phi3_fields(gguf, head_dim)
    if name == "phi2":
        config |= _phi2_fields(gguf, head_dim)
    for key in ("attention.value_length", "rope.dimension_count"):
        if key == "rope.dimension_count" and architecture.partial_rotation:
            continue
        if positive(gguf, key, head_dim) != head_dim:
            raise RsgwmError(f"{where}: {name}.{key} is {metadata[f'{name}.{key}']}, not the head's {head_dim}")
    return config


def block_shapes(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's tensors and of the outer ones, by llama.cpp's names."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    feed_forward, vocabulary = config["intermediate_size"], config["vocab_size"]
    fused = "attn_qkv" in architecture.blocks
    return {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_qkv": (queries + 2 * keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_down": (hidden, feed_forward),
        "ffn_gate": (feed_forward, hidden),
        "ffn_up": (2 * feed_forward if fused else feed_forward, hidden),
        **dict.fromkeys(HEAD_NORMS, (head_dim,)),
        **dict.fromkeys(("token_embd", "output"), (vocabulary, hidden)),
        **dict.fromkeys((*GEMMA_NORMS, "output_norm"), (hidden,)),
    }


def _gemma_fields(gguf: GgufFile, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"hidden_activation": config["hidden_act"]}
    if name == "gemma":
        return fields
    wide = (name, config["num_hidden_layers"]) in WIDE_QUERIES
    scalar = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    fields |= {"query_pre_attn_scalar": scalar, "sliding_window": positive(gguf, "attention.sliding_window", 4096)}
    if name == "gemma2":
        fields["attn_logit_softcapping"] = number(gguf, "attn_logit_softcapping", 50.0)
        fields["final_logit_softcapping"] = number(gguf, "final_logit_softcapping", 30.0)
    else:
        pattern = 6  # every sixth layer sees everything: in the models, and in llama.cpp, but not in the file
        layers = range(1, config["num_hidden_layers"] + 1)
        fields["rope_local_base_freq"] = 10000.0
        fields["sliding_window_pattern"] = pattern
        fields["layer_types"] = ["sliding_attention" if i % pattern else "full_attention" for i in layers]
    return fields


def _phi2_fields(gguf: GgufFile, head_dim: int) -> dict[str, Any]:
    if "output.weight" not in gguf.tensors:
        raise RsgwmError(f"{gguf.path}: Phi-2 has an output matrix of its own, and there is none")
    rotated = positive(gguf, "rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2:
        raise RsgwmError(f"{gguf.path}: phi2.rope.dimension_count is {rotated}, of a head's {head_dim}")
    # Upwards, because the readers cut the product with the head's dimensions off.
    return {"partial_rotary_factor": math.nextafter(rotated / head_dim, 1.0) if rotated < head_dim else 1.0}


def _phi3_fields(gguf: GgufFile, head_dim: int) -> dict[str, Any]:
    if any(name.startswith("rope_factors_") for name in gguf.tensors):
        raise RsgwmError(f"{gguf.path}: Phi-3 with a long context (longrope) is not converted from GGUF")
    window = gguf.metadata.get("phi3.attention.sliding_window")
    # transformers' class always has one, beyond the vocabulary of a small model if need be
    padding = gguf.metadata.get("tokenizer.ggml.padding_token_id", 0)
    return {"sliding_window": int(window) if window else None, "pad_token_id": padding, "partial_rotary_factor": 1.0}


def _rope_scaling(gguf: GgufFile, head_dim: int) -> dict[str, Any] | None:
    """The rope scaling in transformers' words: none, linear, or Llama 3's, recognised by its table of factors."""
    metadata = gguf.metadata
    name = metadata["general.architecture"]
    if ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf, head_dim)
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    factor = number(gguf, "rope.scaling.factor", number(gguf, "rope.scale_linear", 1.0))
    if kind == "linear" or (kind == "none" and f"{name}.rope.scale_linear" in metadata):
        return {"type": "linear", "rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if kind != "none":
        raise RsgwmError(f"{gguf.path}: rope scaling {kind!r} is not converted from GGUF, only linear and Llama 3's")
    return None


def _llama3_scaling(gguf: GgufFile, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, whose file holds one divisor a frequency and not the parameters they come from.

    The parameters are those of every published model (low 1, high 4, original context 8192) and the largest divisor;
    they are accepted only if they give back the whole table.
    """
    if gguf.tensors[ROPE_FACTORS].kind not in READABLE:
        raise RsgwmError(
            f"{gguf.path}: {ROPE_FACTORS} has the type {gguf.tensors[ROPE_FACTORS].kind}, which is not read"
        )
    table = gguf.read(ROPE_FACTORS).ravel()
    factor, low, high, context = float(table.max()), 1.0, 4.0, 8192
    theta = number(gguf, "rope.freq_base", 10000.0)
    expected = llama3_factors(theta, head_dim, factor, low, high, context)
    if table.shape != expected.shape or not np.allclose(table, expected, rtol=1e-3):
        raise RsgwmError(f"{gguf.path}: {ROPE_FACTORS} is a rope scaling other than Llama 3's, which is not converted")
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def llama3_factors(theta: float, head_dim: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """Llama 3's divisors of the frequencies of a head's rotations: float32 (head_dim / 2)."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - blend) / factor + blend), dtype=np.float32)


def positive(gguf: GgufFile, key: str, default: int | None = None) -> int:
    """The positive integer that a file's metadata gives for ``key`` of its architecture."""
    name = gguf.metadata["general.architecture"]
    value = gguf.metadata.get(f"{name}.{key}", default)
    if not isinstance(value, int) or value < 1:
        raise RsgwmError(f"{gguf.path}: metadata {name}.{key} is {value!r}, not a positive integer")
    return value


def number(gguf: GgufFile, key: str, default: float) -> float:
    """A positive number, as the shortest decimal that names the same float32: 1e-05, not 9.999999747378752e-06."""
    name = gguf.metadata["general.architecture"]
    value = gguf.metadata.get(f"{name}.{key}", default)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise RsgwmError(f"{gguf.path}: metadata {name}.{key} is {value!r}, not a positive number")
    return float(str(np.float32(value)))
