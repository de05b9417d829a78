"""A GGUF file turned into a Hugging Face folder, which mlx-lm, transformers and PEFT read.

Tensors become float32 under Hugging Face's names, or stay quantised where MLX computes with their types. They are
dequantised and written a slice at a time, so a model of any size needs memory for one slice only (for the query and key
projections, one tensor).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_rsgwm.converters.gguf.architectures import (
    ROPE_FACTORS,
    Architecture,
    architecture_of,
    base_config,
    block_shapes,
)
from mlx_rsgwm.converters.gguf.file import READABLE, GgufFile, open_gguf
from mlx_rsgwm.converters.gguf.packed import BITS, GROUP, packed_bits, read_packed
from mlx_rsgwm.converters.gguf.tokenizer import end_ids, save_tokenizer
from mlx_rsgwm.core import files
from mlx_rsgwm.core.dtypes import BY_CODE
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.folders import new_folder, require_space
from mlx_rsgwm.core.progress import SILENT, Progress

# Raised whenever a conversion would come out different, so that cached ones are made anew.
CONVERSION_VERSION = 2
SLICE_BYTES = 1 << 24


class Entry(NamedTuple):
    """An array to write: of which GGUF tensor, as its ``values`` or one part of its packed form, dtype and shape."""

    source: str
    part: str
    dtype: str
    shape: tuple[int, ...]


def convert_gguf(source: Path, out: Path, progress: Progress = SILENT, quantised: bool = False) -> Path:
    """Convert a ``.gguf`` file of one of ``gguf_architectures`` into the new Hugging Face folder ``out``.

    The folder holds config.json, model.safetensors (float32, query and key rows in Hugging Face's order) and the
    tokenizer. It is written under a temporary name and renamed when whole. If another process finishes the same
    folder first, its result is kept.

    With ``quantised`` matrices in Q4_0, Q4_1 and Q8_0 keep their bits, as MLX's affine quantisation, and only mlx-lm
    reads the folder; tensors of other types are float32 there too.

    Raises:
        RsgwmError: a malformed file; another architecture, tensor types, tensors, rope scaling or a tokenizer that
            is not read (named, all at once); ``quantised`` and no such matrix; ``out`` in the way; not enough room.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RsgwmError(f"{out} exists already; choose another folder or remove it")
    gguf = open_gguf(source)
    config = base_config(gguf)
    plan = tensor_plan(gguf, config)
    if quantised:
        config = {**config, "quantization": _quantisation(gguf, plan)}
    entries = _entries(gguf, plan, quantised)
    require_space(out, sum(_nbytes(entry) for entry in entries.values()) + (1 << 25))
    with _new_or_as_good(out) as work:
        save_tokenizer(gguf.metadata, work, str(source), config["vocab_size"])
        files.write_json(work / "config.json", config)
        ends = end_ids(gguf.metadata)
        if ends != [config["eos_token_id"]] and ends:
            files.write_json(work / "generation_config.json", {"eos_token_id": ends})
        _write_weights(work / "model.safetensors", gguf, config, entries, progress)
    return out


def tensor_plan(gguf: GgufFile, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """``{Hugging Face name: (GGUF name, shape)}`` in the order of writing, once every tensor is known to fit.

    Raises:
        RsgwmError: naming every tensor of a type that is not read, or every one missing, unknown or misshapen.
    """
    unreadable = gguf.unreadable()
    if unreadable:
        known = ", ".join(READABLE)
        raise_problems(f"{gguf.path} holds tensors of types that are not read (only {known})", unreadable)
    architecture = architecture_of(gguf)
    shapes = block_shapes(architecture, config)
    wanted = {}
    for gguf_name, mlx_name in architecture.outer.items():
        wanted[f"{mlx_name}.weight"] = (f"{gguf_name}.weight", shapes[gguf_name])
        if gguf_name in architecture.biases:
            wanted[f"{mlx_name}.bias"] = (f"{gguf_name}.bias", shapes[gguf_name][:1])
    if config["tie_word_embeddings"]:
        del wanted["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        for gguf_name, mlx_name in architecture.blocks.items():
            wanted[f"model.layers.{layer}.{mlx_name}.weight"] = (f"blk.{layer}.{gguf_name}.weight", shapes[gguf_name])
            if gguf_name in architecture.biases:
                wanted[f"model.layers.{layer}.{mlx_name}.bias"] = (
                    f"blk.{layer}.{gguf_name}.bias",
                    shapes[gguf_name][:1],
                )
    problems = []
    for name, shape in wanted.values():
        tensor = gguf.tensors.get(name)
        if tensor is None:
            problems.append(f"tensor {name} is missing")
        elif tensor.shape != shape:
            problems.append(f"tensor {name} has shape {tensor.shape}, not {shape}")
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


def _entries(gguf: GgufFile, plan: Mapping[str, tuple[str, tuple[int, ...]]], quantised: bool) -> dict[str, Entry]:
    """Every array of the safetensors file by name, in the order of writing."""
    entries: dict[str, Entry] = {}
    for name, (source, shape) in plan.items():
        bits = packed_bits(gguf, source) if quantised else None
        if bits is None:
            entries[name] = Entry(source, "values", "F32", shape)
            continue
        rows, columns = shape
        entries[name] = Entry(source, "weight", "U32", (rows, columns * bits // 32))
        for part in ("scales", "biases"):
            entries[f"{name.removesuffix('.weight')}.{part}"] = Entry(source, part, "F16", (rows, columns // GROUP))
    return entries


def _quantisation(gguf: GgufFile, plan: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """mlx-lm's ``quantization``: the commonest number of bits, and by name the modules that have another."""
    bits = {
        name.removesuffix(".weight"): width
        for name, (source, _) in plan.items()
        if (width := packed_bits(gguf, source)) is not None
    }
    if not bits:
        raise RsgwmError(f"{gguf.path} holds no matrix in {', '.join(BITS)}, which MLX computes with as they are")
    usual = Counter(bits.values()).most_common(1)[0][0]
    others = {name: {"group_size": GROUP, "bits": width} for name, width in bits.items() if width != usual}
    return {"group_size": GROUP, "bits": usual, **others}


def _nbytes(entry: Entry) -> int:
    return BY_CODE[entry.dtype].size * math.prod(entry.shape)


def _write_weights(
    path: Path, gguf: GgufFile, config: Mapping[str, Any], entries: Mapping[str, Entry], progress: Progress
) -> None:
    """Stream the tensors into a safetensors file; its header is known before any value is."""
    architecture = architecture_of(gguf)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    order = sorted(entries, key=lambda name: -BY_CODE[entries[name].dtype].size)  # stable: wide ones first stay aligned
    for name in order:
        start, end = end, end + _nbytes(entries[name])
        header[name] = {"dtype": entries[name].dtype, "shape": list(entries[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, progress.task(f"converting {gguf.path.name}", len(order)) as advance:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            heads = _heads_to_unpermute(name, config)
            for values in _parts(gguf, entries[name], heads is not None, _offset(name, architecture)):
                file.write((values if heads is None else unpermute(values, heads)).tobytes())
            advance(1, name)
        file.flush()
        os.fsync(file.fileno())


def _offset(name: str, architecture: Architecture) -> float:
    """What llama.cpp added to a tensor's values."""
    return architecture.norm_offset if name.endswith("norm.weight") else 0.0


def _heads_to_unpermute(name: str, config: Mapping[str, Any]) -> int | None:
    if config["model_type"] != "llama":
        return None
    for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if name.rpartition(".")[0].endswith(f"self_attn.{projection}"):
            return config[heads]
    return None


def _parts(gguf: GgufFile, entry: Entry, undivided: bool, offset: float) -> Iterator[np.ndarray]:
    """An entry's rows, a slice at a time or all at once."""
    tensor = gguf.tensors[entry.source]
    step = tensor.rows if undivided else max(1, SLICE_BYTES // (4 * tensor.shape[-1]))
    for start in range(0, tensor.rows, step):
        if entry.part != "values":
            yield read_packed(gguf, entry.source, start, start + step)[entry.part]
            continue
        values = gguf.read(entry.source, start, start + step)
        if not np.isfinite(values).all():
            raise RsgwmError(f"{gguf.path}: tensor {entry.source} has values that are not finite; the file is damaged")
        yield values - np.float32(offset) if offset else values


@contextmanager
def _new_or_as_good(out: Path) -> Iterator[Path]:
    """``new_folder``; where another process was faster, its folder, which is as whole as ours, stays."""
    try:
        with new_folder(out) as work:
            yield work
    except RsgwmError:
        if not (out / "config.json").is_file():
            raise
