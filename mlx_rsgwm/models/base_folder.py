"""The folder of a base model: config.json, model*.safetensors, a tokenizer; checked, identified and described.

Only headers and samples are read here, so every function answers at once for a model of any size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.safetensors_io import PICKLE_SUFFIXES, read_header
from mlx_rsgwm.models.foreign_quantisation import quantisation_settings, refuse_foreign_quantisation
from mlx_rsgwm.models.tokenizer_hash import chat_template_hash, tokenizer_hash

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
SAMPLE_BYTES = 4096
READ_ELSEWHERE = {".json", ".jinja", ".model", ".txt", ".tiktoken"}  # opened by mlx-lm and transformers
FOREIGN_FIELDS = ("quant_method", "bits", "group_size", "format", "version")  # of AWQ, GPTQ, compressed-tensors, …
# The fields of config.json that change what a model computes. Names, versions, training settings and token ids are
# left out, for tools rewrite them when they save a model again.
ARCHITECTURE_FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "text_config"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "hidden_act"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta", "rope_scaling"),
    *("rope_traditional", "partial_rotary_factor", "sliding_window", "layer_types", "tie_word_embeddings"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "quantization"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"),
)


def check_folder(path: Path) -> Path:
    """``path``, once config, weights and tokenizer are there, the arrays sound and no custom code asked for."""
    config = read_config(path)
    if config.get("model_file") is not None:
        raise RsgwmError(
            f"{path / 'config.json'} asks to run custom code ({config['model_file']}), which is never done"
        )
    if "auto_map" in config and not _known_to_mlx_lm(config["model_type"]):
        raise RsgwmError(f"{path / 'config.json'}: {config['model_type']} needs custom code, which is never run")
    refuse_foreign_quantisation(path, config)
    for file in weight_files(path):
        read_header(file)
    for file in sorted(path.iterdir()):
        if file.suffix in READ_ELSEWHERE:
            files.open_regular(file, files.LARGEST_JSON).close()
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise RsgwmError(f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """The object in ``config.json``.

    Raises:
        RsgwmError: no such file, not a JSON object, no ``model_type``.
    """
    if not files.is_present(path / "config.json") and files.is_present(path / "adapter_config.json"):
        raise RsgwmError(
            f"{path} is an adapter, not a base model; --adapter takes it, --base the model it was made for"
        )
    config = files.read_json_object(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise RsgwmError(f"{path / 'config.json'} has no model_type; it is not a language model's config")
    return config


def rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 saves ``rope_parameters``, which most of mlx-lm's models ignore without a word: the older fields.

    Nested tables (one a layer type) are left to the models that know them.
    """
    table = config.get("rope_parameters")
    if not isinstance(table, dict) or "rope_theta" not in table or "rope_theta" in config:
        return {}
    older = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in table.items() if key not in older}
    fields = {key: table[key] for key in older if key in table}
    return fields if scaling.get("rope_type", "default") == "default" else {**fields, "rope_scaling": scaling}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder that mlx-lm loads, sorted; every shard of an index must be there.

    Raises:
        RsgwmError: there are none (pickle files are named), or shards are missing.
    """
    paths = sorted(path.glob("model*.safetensors"))
    index = path / "model.safetensors.index.json"
    if files.is_present(index):
        shards = files.read_json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise RsgwmError(f"{index} has no weight_map from tensor to file")
        missing = sorted(set(shards.values()) - {file.name for file in paths})
        raise_problems(str(path), [f"{shard} is in the index but not in the folder" for shard in missing])
    if not paths:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise RsgwmError(
                f"{path}: {pickles[0]} is a pickle file, which can run code when loaded; "
                "only .safetensors is read, so convert it where you trust it"
            )
        raise RsgwmError(f"{path} holds no model*.safetensors")
    return paths


def fingerprint_of(path: Path) -> str:
    """What identifies a base model, whatever its folder is called and however it is sharded.

    Three parts with dashes between: :func:`weights_fingerprint`, 64 hex digits, and 16 each of the hashes of tokenizer
    and chat template (none of the last where there is none). Before there were such parts the first stood alone.
    """
    return f"{weights_fingerprint(path)}-{tokenizer_hash(path)[:16]}-{chat_template_hash(path)[:16]}"


def base_difference(recorded: str, present: str, chat: bool = True) -> str:
    """In what two fingerprints differ: weights, tokenizer, or chat template; empty where they are of one base.

    Parts that one of them has not are not compared, and the chat template only where it is used (``chat``).
    """
    names = ("weights", "tokenizer", "chat template") if chat else ("weights", "tokenizer")
    parts = zip(names, recorded.split("-"), present.split("-"), strict=False)
    return next((name for name, value, other in parts if value != other), "")


def weights_fingerprint(path: Path) -> str:
    """Hex SHA-256 of a base model's architecture and weights.

    It covers the config's architecture fields and of every tensor its name, dtype, shape and the first, middle and
    last 4 KiB, so it takes a fraction of a second and a difference elsewhere in a large tensor goes unseen.
    """
    config = {**read_config(path)}
    config.update(rope_fields(config))
    fields = {key: config[key] for key in ARCHITECTURE_FIELDS if config.get(key) not in (None, False)}
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and fields.get("head_dim") == hidden // heads:
        del fields["head_dim"]  # spelled out by some tools, left out by others
    tensors = {}
    for file in weight_files(path):
        with files.open_regular(file) as data:
            for name, entry, start in tensor_entries(file):
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256()
                for offset in _sample_offsets(end - begin):
                    data.seek(start + begin + offset)
                    digest.update(data.read(min(SAMPLE_BYTES, end - begin - offset)))
                tensors[name] = [entry["dtype"], entry["shape"], digest.hexdigest()]
    try:
        return files.sha256_json({"architecture": fields, "tensors": tensors})
    except ValueError as error:
        raise RsgwmError(f"{path / 'config.json'} holds NaN or infinity, which is not JSON") from error


def describe_folder(path: Path) -> dict[str, Any]:
    """Facts about a base model's folder, from its headers alone: nothing is loaded."""
    config = read_config(path)
    quantization = config.get("quantization")
    foreign = quantisation_settings(config)
    entries = {name: entry for file in weight_files(path) for name, entry, _ in tensor_entries(file)}
    return {
        "folder": str(path),
        "fingerprint": fingerprint_of(path),
        "architecture": config["model_type"],
        "parameters": _count_parameters(entries, quantization or {}),
        "dtypes": sorted({entry["dtype"] for entry in entries.values()}),
        "quantization": (
            {key: quantization[key] for key in ("bits", "group_size", "mode") if key in quantization}
            if isinstance(quantization, dict)
            else {key: foreign[key] for key in FOREIGN_FIELDS if key in foreign} or None
        ),
        "chat_template": _has_chat_template(path),
        "bytes_on_disk": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
    }


def _known_to_mlx_lm(model_type: str) -> bool:
    from importlib.util import find_spec

    from mlx_lm.utils import MODEL_REMAPPING

    known = MODEL_REMAPPING.get(model_type, model_type)
    return known.isidentifier() and find_spec(f"mlx_lm.models.{known}") is not None


def tensor_entries(file: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """``(name, header entry, start of the data section)`` of every tensor of a safetensors file."""
    header = read_header(file)
    for name, entry in header.entries.items():
        yield name, entry, header.start


def _sample_offsets(size: int) -> list[int]:
    """Where the first, middle and last sample of ``size`` bytes begin."""
    last = max(0, size - SAMPLE_BYTES)
    return sorted({0, last // 2, last})


def _count_parameters(entries: Mapping[str, Mapping[str, Any]], quantization: Mapping[str, Any]) -> int:
    """Parameters of the model that was quantised, if it was: scales and biases of a packed weight do not count."""
    total = 0
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        packed = f"{module}.scales" in entries
        if packed and leaf in ("scales", "biases"):
            continue
        count = math.prod(entry["shape"])
        if packed and leaf == "weight":
            override = quantization.get(module)
            bits = (override if isinstance(override, dict) else quantization).get("bits", 4)
            count = count * 32 // bits
        total += count
    return total


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    settings = path / "tokenizer_config.json"
    return settings.is_file() and bool(files.read_json_object(settings).get("chat_template"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; the error's type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
