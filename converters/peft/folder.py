"""A PEFT folder opened: its files found and checked, its arrays named and grouped, no value read yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.converters.module_names import Names
from mlx_rsgwm.converters.peft.config import rank_of, saves_whole
from mlx_rsgwm.converters.peft.names import PREFIX, explain_name, parse_name
from mlx_rsgwm.converters.peft.sidecar import PEFT_CONFIG_FILE
from mlx_rsgwm.converters.peft.uniform import same_bits
from mlx_rsgwm.core import files
from mlx_rsgwm.core.dtypes import NAMES, name_of
from mlx_rsgwm.core.errors import AdapterError, raise_problems
from mlx_rsgwm.core.safetensors_io import PICKLE_SUFFIXES, read_safetensors
from mlx_rsgwm.models.adapter import WEIGHTS_FILE
from mlx_rsgwm.models.file_readers import PEFT_WEIGHTS_FILE
from mlx_rsgwm.models.token_layers import is_embedding, is_head

INDEX_FILE = f"{PEFT_WEIGHTS_FILE}.index.json"
CONFIG_BYTES = 1 << 24
PAIR = ("lora_A.weight", "lora_B.weight")
EMBEDDING_PAIR = ("lora_embedding_A", "lora_embedding_B")
SAVED_AGAIN, UNTRAINED = ".modules_to_save.weight", ".original_module.weight"


@dataclass(frozen=True)
class PeftFolder:
    """``config``: its adapter_config.json. ``weights``: its safetensors files, one or several shards."""

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]

    @property
    def base_name(self) -> str:
        """What its configuration calls its base; empty where it does not."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    def arrays(self) -> tuple[dict[str, mx.array], dict[str, str]]:
        """A fresh mapping of lazy arrays, and the files' metadata."""
        arrays: dict[str, mx.array] = {}
        metadata: dict[str, str] = {}
        for file in self.weights:
            held, extra = read_safetensors(file, evaluate=False)
            twice = sorted(held.keys() & arrays.keys())
            raise_problems(str(self.path), [f"{name} is in two shards" for name in twice], AdapterError)
            arrays.update(held)
            metadata.update(extra)
        return arrays, metadata

    def sha256(self) -> str:
        """Identifies the weights' bytes: the file's own SHA-256, or one over the shards'."""
        digests = [files.sha256_unchanged(file) for file in self.weights]
        return digests[0] if len(digests) == 1 else files.sha256_json(digests)


@dataclass
class Groups:
    """Arrays by module, as transformers calls it, and what they are.

    ``tokens``: trained rows of embeddings. ``lora_biases``: biases that lora_B has.
    ``pairs``: a and b of linear layers and of stacked experts, 2-D as PEFT has them. ``embeddings``: the same for
    embeddings. ``magnitudes``: DoRA's. ``full``: trained parameters of the base by full name. ``copies``: unchanged
    weights of the base, which PEFT saves with an adapted embedding or head. ``beside``: what PEFT writes besides a
    saved module's weight when the vocabulary was resized, by name: the same again, and the untrained.
    """

    pairs: dict[str, dict[str, mx.array]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, mx.array]] = field(default_factory=dict)
    magnitudes: dict[str, mx.array] = field(default_factory=dict)
    full: dict[str, mx.array] = field(default_factory=dict)
    copies: dict[str, mx.array] = field(default_factory=dict)
    tokens: dict[str, mx.array] = field(default_factory=dict)
    lora_biases: dict[str, mx.array] = field(default_factory=dict)
    beside: dict[str, mx.array] = field(default_factory=dict)

    def saved_names(self, names: Names) -> dict[str, str]:
        """What the file calls saved parameters, weights below LoRA among them, by mlx-lm's names.

        Several classes of transformers may load one model, each with names of its own.
        """
        saved = (*(f"{module}.weight" for module in self.copies), *self.full)
        return {names.mlx_parameters(name)[0]: name for name in saved}


def open_peft(folder: Path) -> PeftFolder:
    """Find a PEFT folder's files, shards included.

    Raises:
        AdapterError: it is not a PEFT adapter, incomplete, or its weights are pickled; says which.
    """
    if not folder.is_dir():
        raise AdapterError(f"PEFT folder {folder} does not exist")
    names = {file.name for file in folder.iterdir()}
    if PEFT_WEIGHTS_FILE not in names and INDEX_FILE not in names:
        pickles = sorted(name for name in names if Path(name).suffix in PICKLE_SUFFIXES)
        if pickles:
            raise AdapterError(
                f"{folder}: {pickles[0]} is a pickle file, which can run code when loaded; "
                f"only {PEFT_WEIGHTS_FILE} is read"
            )
        if WEIGHTS_FILE in names:
            raise AdapterError(f"{folder} is an mlx-lm adapter already; rsgwm convert to-peft goes the other way")
        raise AdapterError(f"{folder} holds no {PEFT_WEIGHTS_FILE}; it is not a PEFT adapter folder")
    if PEFT_CONFIG_FILE not in names:
        raise AdapterError(f"{folder} holds no {PEFT_CONFIG_FILE}; it is not a whole PEFT adapter folder")
    config = files.read_json_object(folder / PEFT_CONFIG_FILE, CONFIG_BYTES)
    weights = (folder / PEFT_WEIGHTS_FILE,) if PEFT_WEIGHTS_FILE in names else _shards(folder)
    return PeftFolder(folder, config, weights)


def _shards(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX_FILE
    table = files.read_json_object(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise AdapterError(f"{index} has no weight_map from array to file")
    shards = sorted(set(table.values()))
    outside = [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]
    raise_problems(
        str(index), [f"{shard!r} is not a safetensors file of this folder" for shard in outside], AdapterError
    )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    raise_problems(str(folder), [f"{shard} is in the index but not in the folder" for shard in missing], AdapterError)
    return tuple(folder / shard for shard in shards)


def _saved_otherwise(name: str, config: Mapping[str, Any]) -> str:
    """What is wrong with a parameter of a saved module that is neither a weight nor a bias; empty for other arrays."""
    saved = next((module for module in config.get("modules_to_save") or () if f".{module}." in name), None)
    if saved is None or not name.startswith(PREFIX) or ".lora_" in name:
        return ""
    leaf = name.rpartition(".")[2]
    return f"{name}: {leaf} of the saved module {saved} (modules_to_save): only weights and biases are converted"


def group_arrays(arrays: Mapping[str, mx.array], config: Mapping[str, Any], sound: bool) -> tuple[Groups, list[str]]:
    """Sort arrays by what they are, and say what is wrong with them; ``sound``: the configuration's numbers hold."""
    groups = Groups()
    problems = []
    for name, value in arrays.items():
        if weight := _written_beside(name, arrays):
            if name.endswith(SAVED_AGAIN) and not same_bits(value, arrays[weight]):
                problems.append(f"{name} is not {weight}, which it repeats in PEFT's files")
            groups.beside[name.removeprefix(PREFIX)] = value
            continue
        parsed = parse_name(name)
        if parsed is None:
            problems.append(_saved_otherwise(name, config) or f"unknown array {name}{explain_name(name)}")
            continue
        module, leaf = parsed
        if value.dtype not in NAMES:
            kind = name_of(value.dtype)
            problems.append(f"{name} is {kind}; {', '.join(NAMES.values())} are converted")
        elif leaf in ("a", "b"):
            groups.pairs.setdefault(module, {})[leaf] = value
        elif leaf.startswith("embedding_"):
            groups.embeddings.setdefault(module, {})[leaf[-1]] = value
        elif leaf == "magnitude":
            groups.magnitudes[module] = value
        elif leaf == "tokens" and config.get("trainable_token_indices"):
            groups.tokens[module] = value
        elif leaf == "lora_bias" and config.get("lora_bias"):
            groups.lora_biases[module] = value
        elif leaf == "base_weight" and _is_outer(module):
            groups.copies[module] = value
        elif leaf in ("bias", "base_bias") and (
            config.get("bias", "none") != "none"
            or saves_whole(config, module)
            or (leaf == "base_bias" and _is_outer(module))  # saved with the weight; PEFT loads it, whatever it holds
        ):
            groups.full[f"{module}.bias"] = value
        elif leaf == "weight" and (saves_whole(config, module) or _is_outer(module)):
            groups.full[f"{module}.weight"] = value
        else:
            problems.append(f"unknown array {name}{explain_name(name)}")
    for table, names in ((groups.pairs, PAIR), (groups.embeddings, EMBEDDING_PAIR)):
        for module, pair in list(table.items()):
            missing = [f"{module} has no {name}" for name, leaf in zip(names, "ab", strict=True) if leaf not in pair]
            wrong = missing or _shape_problems(module, pair, config if sound else None)
            problems += wrong
            if wrong:
                del table[module]
    problems += [
        f"{module} has a lora_magnitude_vector of shape {value.shape}, not one number an output"
        for module, value in groups.magnitudes.items()
        if value.ndim != 1
    ]
    return groups, problems


def _written_beside(name: str, arrays: Mapping[str, mx.array]) -> str | None:
    """The weight that the array ``name`` repeats, or had before training; None for arrays of other kinds."""
    ending = next((suffix for suffix in (SAVED_AGAIN, UNTRAINED) if name.endswith(suffix)), None)
    weight = f"{name.removesuffix(ending)}.weight" if ending else ""
    return weight if weight in arrays and name.startswith(PREFIX) else None


def _is_outer(module: str) -> bool:
    """An embedding or head, whose base weights PEFT saves of its own accord."""
    return is_embedding(module) or is_head(module)


def _shape_problems(module: str, pair: Mapping[str, mx.array], config: Mapping[str, Any] | None) -> list[str]:
    a, b = pair["a"], pair["b"]
    if module.endswith((".experts", ".experts.base_layer")):
        sound = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
        return [] if sound else [f"{module} has lora_A {a.shape} and lora_B {b.shape}, which do not fit together"]
    problems = []
    rank = None if config is None else rank_of(config, module)
    for leaf, value, axis in (("lora_A", a, 0), ("lora_B", b, 1)):
        if value.ndim != 2 or 0 in value.shape or (rank is not None and value.shape[axis] != rank):
            problems.append(f"{module}.{leaf} has shape {value.shape}, which does not have rank {rank}")
    return problems


def is_of_wrapped_model(arrays: Iterable[str]) -> bool:
    """Whether a PEFT file's arrays belong to a model of text and images, not to its language model alone."""
    return any(".language_model." in name for name in arrays)
