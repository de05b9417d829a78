"""A GGUF file of the Llama architecture turned into a Hugging Face folder, which mlx-lm, transformers and PEFT read.

Tensors become float32 under Hugging Face's names. They are dequantised and written a slice at a time, so a model of
any size needs memory for one slice only (for the query and key projections, one tensor).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_rsgwm import files
from mlx_rsgwm.converters.gguf_file import READABLE, GgufFile, open_gguf
from mlx_rsgwm.converters.gguf_tokenizer import save_tokenizer
from mlx_rsgwm.errors import RsgwmError, raise_problems
from mlx_rsgwm.progress import SILENT, Progress

# Raised whenever a conversion would come out different, so that cached ones are made anew.
CONVERSION_VERSION = 1
SLICE_BYTES = 1 << 24
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(source: Path, out: Path, progress: Progress = SILENT) -> Path:
    """Convert a ``.gguf`` file of the Llama architecture into the new Hugging Face folder ``out``.

    The folder holds config.json, model.safetensors (float32, query and key rows in Hugging Face's order) and the
    tokenizer. It is written under a temporary name and renamed when whole. If another process finishes the same
    folder first, its result is kept.

    Raises:
        RsgwmError: a malformed file; another architecture, tensor types, tensors, rope scaling or a tokenizer that
            is not read (named, all at once); ``out`` in the way; not enough room.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RsgwmError(f"{out} exists already; choose another folder or remove it")
    gguf = open_gguf(source)
    config = llama_config(gguf)
    plan = tensor_plan(gguf, config)
    files.require_space(out, 4 * sum(math.prod(shape) for _, shape in plan.values()) + (1 << 25))
    files.make_folder(out.absolute().parent)
    work = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        save_tokenizer(gguf.metadata, work, str(source), config["vocab_size"])
        files.write_json(work / "config.json", config)
        _write_weights(work / "model.safetensors", gguf, config, plan, progress)
        work.chmod(0o755)  # mkdtemp makes it private
        _rename_folder(work, out)
    except OSError as error:
        raise RsgwmError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def llama_config(gguf: GgufFile) -> dict[str, Any]:
    """The ``config.json`` of transformers' LlamaForCausalLM that a file's metadata describes."""
    metadata, where = gguf.metadata, str(gguf.path)
    architecture = str(metadata.get("general.architecture"))
    if architecture != "llama":
        raise RsgwmError(f"{where} has the architecture {architecture}; only llama is converted from GGUF")
    if metadata.get("split.count", 1) not in (0, 1):
        raise RsgwmError(f"{where} is one of {metadata['split.count']} parts; merge them with llama-gguf-split first")
    if metadata.get("llama.expert_count", 0):
        raise RsgwmError(f"{where} is a mixture of experts, which is not converted from GGUF")
    hidden = _positive(gguf, "embedding_length")
    heads = _positive(gguf, "attention.head_count")
    head_dim = _positive(gguf, "attention.key_length", hidden // heads)
    if head_dim % 2:
        raise RsgwmError(f"{where}: a head of {head_dim} dimensions cannot be rotated in pairs")
    embedding = gguf.tensors.get("token_embd.weight")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": _positive(gguf, "block_count"),
        "intermediate_size": _positive(gguf, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _positive(gguf, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _number(gguf, "attention.layer_norm_rms_epsilon", 1e-5),
        "vocab_size": embedding.shape[0] if embedding else _positive(gguf, "vocab_size"),
        "max_position_embeddings": _positive(gguf, "context_length"),
        "rope_theta": _number(gguf, "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(gguf, head_dim),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if _positive(gguf, key, head_dim) != head_dim:
            raise RsgwmError(f"{where}: llama.{key} is {metadata['llama.' + key]}, not the head's {head_dim}")
    return config


def tensor_plan(gguf: GgufFile, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """``{Hugging Face name: (GGUF name, shape)}`` in the order of writing, once every tensor is known to fit.

    Raises:
        RsgwmError: naming every tensor of a type that is not read, or every one missing, unknown or misshapen.
    """
    unreadable = gguf.unreadable()
    if unreadable:
        known = ", ".join(READABLE)
        raise_problems(f"{gguf.path} holds tensors of types that are not read (only {known})", unreadable)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    feed_forward, vocabulary = config["intermediate_size"], config["vocab_size"]
    shapes = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_down": (hidden, feed_forward),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (feed_forward, hidden)),
        **dict.fromkeys(("token_embd", "output"), (vocabulary, hidden)),
        **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), (hidden,)),
    }
    wanted = {f"{ours}.weight": (f"{theirs}.weight", shapes[theirs]) for theirs, ours in OUTER_NAMES.items()}
    if config["tie_word_embeddings"]:
        del wanted["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in BLOCK_NAMES.items():
            wanted[f"model.layers.{layer}.{ours}.weight"] = (f"blk.{layer}.{theirs}.weight", shapes[theirs])
    problems = []
    for name, shape in wanted.values():
        found = gguf.tensors.get(name)
        if found is None:
            problems.append(f"tensor {name} is missing")
        elif found.shape != shape:
            problems.append(f"tensor {name} has shape {found.shape}, not {shape}")
    known_names = {name for name, _ in wanted.values()} | {ROPE_FACTORS}
    problems += [f"tensor {name} is unknown" for name in gguf.tensors if name not in known_names]
    raise_problems(str(gguf.path), problems)
    return wanted


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows: (heads, half, 2, columns) back to (heads, 2, half, columns).

    llama.cpp rotates neighbouring rows, Hugging Face the two halves of a head (``permute`` in llama.cpp's
    convert_hf_to_gguf.py).
    """
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _write_weights(
    path: Path,
    gguf: GgufFile,
    config: Mapping[str, Any],
    plan: Mapping[str, tuple[str, tuple[int, ...]]],
    progress: Progress,
) -> None:
    """Stream the tensors into a safetensors file; its header is known before any value is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (_, shape) in plan.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, progress.task(f"converting {gguf.path.name}", len(plan)) as advance:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (source, _) in plan.items():
            _write_tensor(file, gguf, source, _heads_to_unpermute(name, config))
            advance(1, name)
        file.flush()
        os.fsync(file.fileno())


def _heads_to_unpermute(name: str, config: Mapping[str, Any]) -> int | None:
    for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if name.endswith(f"self_attn.{projection}.weight"):
            return config[heads]
    return None


def _write_tensor(file: BinaryIO, gguf: GgufFile, name: str, heads: int | None) -> None:
    for values in _slices(gguf, name, whole=heads is not None):
        if not np.isfinite(values).all():
            raise RsgwmError(f"{gguf.path}: tensor {name} has values that are not finite; the file is damaged")
        file.write((values if heads is None else unpermute(values, heads)).tobytes())


def _slices(gguf: GgufFile, name: str, whole: bool) -> Iterator[np.ndarray]:
    tensor = gguf.tensors[name]
    step = tensor.rows if whole else max(1, SLICE_BYTES // (4 * tensor.shape[-1]))
    for start in range(0, tensor.rows, step):
        yield gguf.read(name, start, start + step)


def _rename_folder(work: Path, out: Path) -> None:
    try:
        os.rename(work, out)
    except OSError:
        # Another process was faster: its folder, renamed whole like ours, is as good.
        if not (out / "config.json").is_file():
            raise


def _rope_scaling(gguf: GgufFile, head_dim: int) -> dict[str, Any] | None:
    """The rope scaling in transformers' words: none, linear, or Llama 3's, recognised by its table of factors."""
    metadata = gguf.metadata
    if ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf, head_dim)
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = _number(gguf, "rope.scaling.factor", _number(gguf, "rope.scale_linear", 1.0))
    if kind == "linear" or (kind == "none" and "llama.rope.scale_linear" in metadata):
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
    theta = _number(gguf, "rope.freq_base", 10000.0)
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((context / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if table.shape != expected.shape or not np.allclose(table, expected, rtol=1e-3):
        raise RsgwmError(f"{gguf.path}: {ROPE_FACTORS} is a rope scaling other than Llama 3's, which is not converted")
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _positive(gguf: GgufFile, key: str, default: int | None = None) -> int:
    value = gguf.metadata.get(f"llama.{key}", default)
    if not isinstance(value, int) or value < 1:
        raise RsgwmError(f"{gguf.path}: metadata llama.{key} is {value!r}, not a positive integer")
    return value


def _number(gguf: GgufFile, key: str, default: float) -> float:
    """A positive number, as the shortest decimal that names the same float32: 1e-05, not 9.999999747378752e-06."""
    value = gguf.metadata.get(f"llama.{key}", default)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise RsgwmError(f"{gguf.path}: metadata llama.{key} is {value!r}, not a positive number")
    return float(str(np.float32(value)))
