"""A model folder as a GGUF file that llama.cpp runs: the way out for a base with an adapter fused into it.

The reverse of ``gguf``: its architectures, its tensor names, its metadata. What the file cannot say of a model (a rope
scaling, a bias, a window that llama.cpp would not apply) is refused: once written, the file is read back by ``gguf``'s
reader, and the configuration found in it has to be the model's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.dense_weights import dense_parameters, usual_dtype
from mlx_rsgwm.converters.gguf.architectures import (
    ARCHITECTURES,
    MODEL_TYPES,
    ROPE_FACTORS,
    Architecture,
    base_config,
    llama3_factors,
)
from mlx_rsgwm.converters.gguf.file import open_gguf
from mlx_rsgwm.converters.gguf.names import heads_of, permute_rows
from mlx_rsgwm.converters.gguf.read import tensor_plan
from mlx_rsgwm.converters.gguf.vocabulary import vocabulary
from mlx_rsgwm.core import files
from mlx_rsgwm.core.dtypes import CODES
from mlx_rsgwm.core.errors import CheckFailed, RsgwmError, raise_problems
from mlx_rsgwm.core.folders import make_folder, require_space
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.base_folder import read_config
from mlx_rsgwm.models.config import open_model

# dtype: (gguf's tensor type, llama.cpp's file type)
KINDS = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
BLOCK = 32  # values of a row that share a scale in q8_0
# Fields of the model that the file has to say too; those it does not know at all must have these values.
SILENT_FIELDS = {"rope_traditional": False, "partial_rotary_factor": 1.0, "rope_local_base_freq": 10000.0}
# Fields that transformers wants and mlx-lm does not look at, and those that are compared by themselves.
APART = {
    *("architectures", "model_type", "torch_dtype", "max_position_embeddings", "hidden_act", "hidden_activation"),
    *("rope_scaling", "layer_types"),
}


@dataclass(frozen=True)
class _Source:
    """A model: its settings with mlx-lm's defaults filled in, and its arrays, lazy, by transformers' names."""

    path: Path
    name: str
    architecture: Architecture
    settings: dict[str, Any]
    arrays: dict[str, mx.array]
    dtype: str


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model, and not an adapter."""
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def model_to_gguf(folder: Path, out: Path, dtype: str | None = None, progress: Progress = SILENT) -> dict[str, Any]:
    """Write the model in ``folder``, dense or quantised by MLX, to the GGUF file ``out``, one array at a time.

    Args:
        folder: as ``rsgwm fuse`` writes it: config.json, model*.safetensors, a fast tokenizer.
        out: a path that does not exist yet.
        dtype: f32, f16, bf16 or q8_0, of the matrices (norms and biases are f32, as llama.cpp wants them); the model's
            own float type when None.

    Returns:
        JSON: ``out``, ``architecture``, ``tensors``, ``dtype``.

    Raises:
        RsgwmError: an architecture, option or tokenizer without a GGUF form (named, all at once); ``out`` exists or
            cannot be written; values beyond float16.
        CheckFailed: what was read back differs; the file is removed.
    """
    if dtype is not None and dtype not in KINDS:
        raise RsgwmError(f"GGUF models are {', '.join(KINDS)}, found {dtype!r}")
    files.require_absent(out)
    source = _read(folder)
    kind = dtype or source.dtype
    plan = _plan(source)
    words = vocabulary(folder, source.settings["vocab_size"])
    title = _title(source.name, words["tokenizer.ggml.tokens"], out.stem)
    metadata = {**_metadata(source, KINDS[kind][1], title), **words}
    require_space(out, sum(4 * source.arrays[name].size for name in plan) + 2**24)
    make_folder(out.absolute().parent)
    with files.new_file(out, replace=False) as temporary:
        with progress.task(f"writing {out.name}", len(plan)) as advance:
            digests = _write(temporary, source, plan, metadata, kind, advance)
        _check(temporary, out, source, digests)
    return {"out": str(out), "architecture": source.name, "tensors": len(digests), "dtype": kind}


def _read(folder: Path) -> _Source:
    """The model without a value read.

    Raises:
        RsgwmError: no architecture that goes both ways here; mlx-lm cannot load it.
    """
    config = read_config(folder)
    kind = config["model_type"]
    if kind not in MODEL_TYPES:
        raise RsgwmError(f"{folder}: {kind} models are not written as GGUF, only {', '.join(MODEL_TYPES)}")
    name = MODEL_TYPES[kind]
    model, _, _ = open_model(folder)
    inner: Any = getattr(model, "language_model", model)
    config = {**config, **(config.get("text_config") or {})}
    settings = {**config, **{key: value for key, value in vars(inner.args).items() if value is not None}}
    settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    arrays = {key.removeprefix("language_model."): value for key, value in dense_parameters(model).items()}
    settings["tie_word_embeddings"] = "lm_head.weight" not in arrays
    dtype = CODES[usual_dtype(model)].lower()
    return _Source(folder, name, ARCHITECTURES[name], settings, arrays, dtype)


def _plan(source: _Source) -> dict[str, str]:
    """``{transformers' name: GGUF's}`` of every tensor, in the model's order.

    Raises:
        RsgwmError: naming every array without a place in the file, and every one missing.
    """
    names = {}
    for gguf_name, mlx_name in source.architecture.outer.items():
        names[f"{mlx_name}.weight"] = f"{gguf_name}.weight"
        if gguf_name in source.architecture.biases:
            names[f"{mlx_name}.bias"] = f"{gguf_name}.bias"
    if source.settings["tie_word_embeddings"]:
        del names["lm_head.weight"]
    for layer in range(source.settings["num_hidden_layers"]):
        for gguf_name, mlx_name in source.architecture.blocks.items():
            names[f"model.layers.{layer}.{mlx_name}.weight"] = f"blk.{layer}.{gguf_name}.weight"
            if gguf_name in source.architecture.biases:
                names[f"model.layers.{layer}.{mlx_name}.bias"] = f"blk.{layer}.{gguf_name}.bias"
    problems = [f"{name} has no tensor in llama.cpp's {source.name}" for name in source.arrays.keys() - names.keys()]
    problems += [f"{name} is missing" for name in names.keys() - source.arrays.keys()]
    raise_problems(f"{source.path} has no GGUF form", sorted(problems))
    return names


def _title(architecture: str, tokens: list[str], name: str) -> str:
    """The model's name. llama.cpp takes Phi-3's rule for spaces after special tokens from it, and then needs these."""
    if architecture == "phi3" and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= set(tokens):
        return f"phi-3 {name}"
    return "model" if "phi-3" in name.lower() or "phi3" in name.lower() else name


def _metadata(source: _Source, file_type: int, title: str) -> dict[str, Any]:
    """Everything but the tokenizer; numbers as Python's int (uint32 in the file) and float (float32)."""
    name, settings = source.name, source.settings
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": title,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        f"{name}.block_count": settings["num_hidden_layers"],
        f"{name}.context_length": settings.get("max_position_embeddings") or 8192,
        f"{name}.embedding_length": settings["hidden_size"],
        f"{name}.feed_forward_length": settings["intermediate_size"],
        f"{name}.attention.head_count": settings["num_attention_heads"],
        f"{name}.attention.head_count_kv": settings["num_key_value_heads"],
        f"{name}.attention.key_length": settings["head_dim"],
        f"{name}.attention.value_length": settings["head_dim"],
        f"{name}.{source.architecture.epsilon[1]}": float(settings[source.architecture.epsilon[0]]),
        f"{name}.rope.freq_base": float(settings["rope_theta"]),
        f"{name}.rope.dimension_count": _rotated(source),
        f"{name}.vocab_size": settings["vocab_size"],
    }
    if name == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            metadata[f"{name}.{key}"] = float(settings[key])
    window = settings.get("sliding_window")
    if name == "phi3" or (window and name in ("gemma2", "gemma3")):
        metadata[f"{name}.attention.sliding_window"] = window or 0  # without one llama.cpp has its own idea of Phi-3's
    scaling = settings.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        metadata[f"{name}.rope.scaling.type"] = "linear"
        metadata[f"{name}.rope.scaling.factor"] = float(scaling["factor"])
    return metadata


def _rotated(source: _Source) -> int:
    """How many dimensions of a head are rotated."""
    factor = source.settings.get("partial_rotary_factor", 1.0) if source.architecture.partial_rotation else 1.0
    return int(factor * source.settings["head_dim"])


def _tensors(source: _Source, plan: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under GGUF's name, float32, as llama.cpp wants its rows and norms; arrays are consumed."""
    offset = np.float32(source.architecture.norm_offset)
    for name, gguf_name in plan.items():
        value = np.array(source.arrays.pop(name).astype(mx.float32))
        module, _, leaf = name.rpartition(".")
        heads = heads_of(module, source.settings) if source.architecture.interleaved else None
        if heads is not None and leaf == "weight":
            value = permute_rows(value, heads)
        if module.endswith("norm") and offset:
            value = value + offset
        yield gguf_name, value
        mx.clear_cache()


def _write(
    path: Path, source: _Source, plan: Mapping[str, str], metadata: Mapping[str, Any], kind: str, advance: Any
) -> dict[str, tuple[str, str]]:
    """Write the file; returns every tensor's type and the SHA-256 of its bytes."""
    import gguf

    factors = _rope_factors(source)
    kinds = {gguf_name: _kind_of(source.arrays[name].shape, kind) for name, gguf_name in plan.items()}
    writer = gguf.GGUFWriter(str(path), source.name)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        shapes = {gguf_name: tuple(source.arrays[name].shape) for name, gguf_name in plan.items()}
        if factors is not None:
            kinds, shapes = {ROPE_FACTORS: "F32", **kinds}, {ROPE_FACTORS: factors.shape, **shapes}
        for name, shape in shapes.items():
            _add_info(writer, name, shape, gguf.GGMLQuantizationType[kinds[name]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digests = {}
        for name, value in _with_factors(factors, _tensors(source, plan)):
            packed = _packed(name, value, kinds[name])
            digests[name] = (kinds[name], hashlib.sha256(packed.data).hexdigest())
            writer.write_tensor_data(packed)
            advance(1, name)
    finally:
        writer.close()
    return digests


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)


def _add_info(writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    import gguf

    if kind.name in ("F32", "F16"):
        stored = np.dtype(np.float32 if kind.name == "F32" else np.float16)
        writer.add_tensor_info(name, shape, stored, int(np.prod(shape)) * stored.itemsize)
    else:
        packed = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=kind)


def _kind_of(shape: tuple[int, ...], kind: str) -> str:
    """Vectors stay float32; rows that q8_0's blocks do not divide become float16, as in llama.cpp."""
    if len(shape) == 1:
        return "F32"
    return "F16" if kind == "q8_0" and shape[-1] % BLOCK else KINDS[kind][0]


def _packed(name: str, value: np.ndarray, kind: str) -> np.ndarray:
    import gguf

    if not np.isfinite(value).all():
        raise RsgwmError(f"{name} has values that are not finite")
    with np.errstate(over="ignore"):
        packed = gguf.quants.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(packed).all():
        raise RsgwmError(f"{name} has values beyond float16; choose bf16 or f32")
    return np.ascontiguousarray(packed)


def _with_factors(
    factors: np.ndarray | None, tensors: Iterator[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    if factors is not None:
        yield ROPE_FACTORS, factors
    yield from tensors


def _rope_factors(source: _Source) -> np.ndarray | None:
    """Llama 3's divisors of every rotation's frequency, float32; None for another scaling."""
    scaling = source.settings.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    return llama3_factors(
        float(source.settings["rope_theta"]),
        source.settings["head_dim"],
        float(scaling["factor"]),
        float(scaling.get("low_freq_factor", 1.0)),
        float(scaling.get("high_freq_factor", 4.0)),
        int(scaling.get("original_max_position_embeddings", 8192)),
    )


# --- reading back -----------------------------------------------------------------------------------------------


def _check(path: Path, out: Path, source: _Source, digests: Mapping[str, tuple[str, str]]) -> None:
    """Read the file, which is at ``path`` before it is ``out``, as ``convert_gguf`` does.

    Raises:
        RsgwmError: naming the settings that it does not carry.
        CheckFailed: naming the first tensor whose bytes differ.
    """
    written = open_gguf(path)
    try:
        config = base_config(written)
        tensor_plan(written, config)
    except RsgwmError as error:
        raise RsgwmError(f"{source.path} has no GGUF form: {str(error).replace(str(path), out.name)}") from None
    raise_problems(f"{source.path} has no GGUF form", _setting_problems(source, config))
    for name, (kind, digest) in digests.items():
        tensor = written.tensors[name]
        data = written.packed(name, 0, tensor.rows)
        if tensor.kind != kind or hashlib.sha256(data.data).hexdigest() != digest:
            raise CheckFailed(f"{out}: {name} does not read as it was written")


def _setting_problems(source: _Source, config: Mapping[str, Any]) -> list[str]:
    """Settings of the model that say something else in the file, or that llama.cpp does not know."""
    settings = source.settings
    settled = {**SILENT_FIELDS, **config}
    keys = [key for key in settled if key in settings]
    problems = [
        f"{key} is {settings[key]!r}, llama.cpp would take {settled[key]!r}"
        for key in keys
        if key not in APART and not key.endswith("token_id") and not _equal(settings[key], settled[key])
    ]
    if not _same_scaling(settings.get("rope_scaling"), settled["rope_scaling"]):
        problems.append(
            f"rope_scaling is {settings['rope_scaling']!r}, llama.cpp would take {settled['rope_scaling']!r}"
        )
    kinds, depth = settings.get("layer_types"), settings["num_hidden_layers"]
    expected = settled.get("layer_types") or ["full_attention"] * depth
    if source.name == "gemma2":
        expected = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(depth)]
    if kinds and source.name != "phi3" and list(kinds) != expected:
        problems.append("layer_types put windows on other layers than llama.cpp does")
    return problems


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, (int, float)) and isinstance(other, (int, float)):
        return bool(np.float32(value) == np.float32(other))
    return bool(value == other)


def _same_scaling(setting: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two rope scalings are of one kind and have the same numbers."""

    def plain(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
        if not scaling or scaling.get("rope_type", scaling.get("type")) == "default":
            return {}
        rest = {key: value for key, value in scaling.items() if key not in ("rope_type", "type", "rope_theta")}
        return {"kind": scaling.get("rope_type", scaling.get("type")), **rest}

    first, second = plain(setting), plain(other)
    return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
