"""A LoRA adapter in a GGUF file (of ours, or of llama.cpp's convert_lora_to_gguf.py) as an adapter in memory.

The reverse of ``gguf.adapter``: llama.cpp's tensors go back to the base's modules, query and key rows to Hugging Face's
order. llama.cpp multiplies a module's update by alpha / its rank; mlx-lm has one rank and one scale for all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.base_layers import BaseLayers, shared_base_layers
from mlx_rsgwm.converters.gguf.file import GgufFile, open_gguf
from mlx_rsgwm.converters.gguf.names import adapter_architecture, heads_of, tensor_namer
from mlx_rsgwm.converters.gguf.read import unpermute
from mlx_rsgwm.converters.peft.convert import Converted
from mlx_rsgwm.converters.peft.read import keys_of
from mlx_rsgwm.converters.peft.uniform import Update, common_scale, fold_scale, widen_rank
from mlx_rsgwm.core.dtypes import FLOATS
from mlx_rsgwm.core.errors import AdapterError, raise_problems
from mlx_rsgwm.core.folders import new_folder, require_empty
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import base_for
from mlx_rsgwm.models.base_folder import read_config
from mlx_rsgwm.models.token_layers import is_embedding

OWN = {row.code: row.mlx for row in FLOATS.values()}  # a tensor of any other type is read as float32
ALPHA = "adapter.lora.alpha"
HUB_URL = "https://huggingface.co/"
LEAVES = (".lora_a", ".lora_b")


def is_gguf_adapter(path: Path) -> bool:
    """Whether a GGUF file says that it holds an adapter."""
    return open_gguf(path).metadata.get("general.type") == "adapter"


def from_gguf(path: Path, base_name: str | None, progress: Progress = SILENT) -> Adapter:
    """Read the GGUF adapter ``path`` as an :class:`Adapter` for a base, by default the one that it names.

    The base is resolved (fetched if need be) once the file is known to hold an adapter; its weights are not read.

    Raises:
        AdapterError: a model, no LoRA adapter, tensors that the base has not, wrong shapes or values, all at once.
        RsgwmError: a malformed file, no base named, or one that cannot be had.
    """
    gguf = open_gguf(path)
    _require_lora(gguf)
    name, folder = base_for(str(path), base_name, base_named_in(gguf), progress)
    return read_gguf_adapter(gguf, shared_base_layers(name, folder))


def convert_from_gguf(path: Path, base_name: str | None, out: Path, progress: Progress = SILENT) -> Converted:
    """:func:`from_gguf`, written to the new folder ``out`` as mlx-lm loads it. Raises as that; ``out`` is not empty."""
    require_empty(out)
    adapter = from_gguf(path, base_name, progress)
    with new_folder(out) as work:
        adapter.save(work)
    return Converted(out, str(adapter.base_name), adapter.spec, len(adapter.modules()))


def read_gguf_adapter(gguf: GgufFile, base: BaseLayers) -> Adapter:
    """The adapter in an opened file, for ``base``, with every value checked."""
    config = read_config(base.path)
    config = {**config, **(config.get("text_config") or {})}
    architecture, permuted = adapter_architecture(base.model_type)
    stated = gguf.metadata.get("general.architecture")
    if stated != architecture:
        raise AdapterError(f"{gguf.path} is for {stated} models, and {base.name} is a {architecture} model")
    updates: list[Update] = []
    problems: list[str] = []
    for module, name in _modules(gguf, base, int(config["num_hidden_layers"]), problems).items():
        heads = heads_of(module, config) if permuted else None
        a, b = (_array(gguf, f"{name}{leaf}", heads if leaf == ".lora_b" else None) for leaf in LEAVES)
        problem = _misfit(module, a, b, base)
        if problem:
            problems.append(problem)
        else:
            updates.append(_update(gguf, module, name, a, b))
    raise_problems(f"{gguf.path} cannot be read for {base.name}", problems, AdapterError)
    adapter = _assembled(gguf, updates, base)
    raise_problems(str(gguf.path), adapter.problems(), AdapterError)
    return adapter


def base_named_in(gguf: GgufFile) -> str:
    """What the file calls its base: the Hub id of its address, else its name; empty where there is neither."""
    about = {key: gguf.metadata.get(f"general.base_model.0.{key}") for key in ("repo_url", "organization", "name")}
    url, name = about["repo_url"], about["name"]
    if isinstance(url, str) and url.startswith(HUB_URL):
        return url.removeprefix(HUB_URL).strip("/")
    return name if isinstance(name, str) else ""


def _require_lora(gguf: GgufFile) -> None:
    kind = gguf.metadata.get("general.type")
    if kind != "adapter":
        raise AdapterError(f"{gguf.path} is no adapter but a {kind or 'model'}; give it as --base")
    if gguf.metadata.get("adapter.type", "lora") != "lora":
        raise AdapterError(f"{gguf.path} is a {gguf.metadata['adapter.type']} adapter; only lora is read")
    raise_problems(f"{gguf.path} holds tensors of types that are not read", gguf.unreadable(), AdapterError)
    alpha = gguf.metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not np.isfinite(alpha):
        raise AdapterError(f"{gguf.path}: {ALPHA} is {alpha!r}, not a finite number")


def _modules(gguf: GgufFile, base: BaseLayers, depth: int, problems: list[str]) -> dict[str, str]:
    """The base's module of every pair of tensors, and the pair's name without its ending, in the file's order."""
    name_of = tensor_namer(base.model_type, depth)
    known = {f"{name}.weight": module for module in base.layers if (name := name_of(module)) is not None}
    modules = {}
    for tensor in gguf.tensors:
        name = tensor[:-7] if tensor.endswith(LEAVES) else tensor
        if name == tensor or name not in known:
            problems.append(f"the base has no module for {tensor}")
        elif missing := [leaf for leaf in LEAVES if f"{name}{leaf}" not in gguf.tensors]:
            problems.append(f"{name}{missing[0]} is missing")
        else:
            modules[known[name]] = name
    if not gguf.tensors:
        problems.append("it holds no tensors")
    return modules


def _array(gguf: GgufFile, name: str, heads: int | None) -> mx.array:
    """A tensor's values, in its own float type; query and key rows in Hugging Face's order."""
    tensor = gguf.tensors[name]
    values = gguf.read(name).reshape(tensor.shape)
    if heads is not None and values.ndim == 2 and values.shape[0] % (2 * heads) == 0:
        values = unpermute(values, heads)
    return mx.array(values).astype(OWN.get(tensor.kind, mx.float32))


def _misfit(module: str, a: mx.array, b: mx.array, base: BaseLayers) -> str:
    """Why llama.cpp's pair is none for the base's layer; empty where it is one."""
    layer = base.layers[module]
    if is_embedding(module) and base.tied:
        return f"{module} is the head too in this base, which llama.cpp adapts apart"
    if a.ndim != b.ndim or a.ndim != (3 if layer.experts else 2):
        return f"{module}: lora_a {a.shape} and lora_b {b.shape} are no pair"
    shapes = f"{module}: lora_a {a.shape} and lora_b {b.shape}"
    if is_embedding(module):
        expected: Any = ((layer.inputs, b.shape[-1]), (layer.outputs, a.shape[-1]))
    elif layer.experts:
        expected = ((layer.experts, b.shape[-1], layer.inputs), (layer.experts, layer.outputs, a.shape[-2]))
    else:
        expected = ((b.shape[-1], layer.inputs), (layer.outputs, a.shape[0]))
    if (tuple(a.shape), tuple(b.shape)) != expected:
        return f"{shapes} do not fit the model's {layer.inputs}→{layer.outputs}"
    return ""


def _update(gguf: GgufFile, module: str, name: str, a: mx.array, b: mx.array) -> Update:
    """A pair in mlx-lm's layout; an embedding's lora_a has a row a token in both."""
    rank = int(b.shape[-1])
    alpha = float(gguf.metadata.get(ALPHA, 0.0))
    if a.ndim == 2:
        a, b = (a if is_embedding(module) else a.T), b.T
    return Update(module, name, a, b, None, rank, alpha / rank if alpha else 1.0)  # llama.cpp's build_lora_mm


def _assembled(gguf: GgufFile, updates: list[Update], base: BaseLayers) -> Adapter:
    rank, scale = max(update.rank for update in updates), common_scale(update.scale for update in updates)
    weights = {}
    for update in updates:
        b = update.b if update.scale == scale else fold_scale(update.b, update.scale / scale, "float32")
        a, b = widen_rank(update.a, b, rank)
        weights[f"{update.module}.lora_a"], weights[f"{update.module}.lora_b"] = mx.contiguous(a), mx.contiguous(b)
    keys, num_layers = keys_of([update.module for update in updates], base.description.get("num_layers"))
    texts = {key: value for key, value in gguf.metadata.items() if isinstance(value, (str, int, float))}
    manifest = {
        "kind": "converted",
        "base": dict(base.description),
        "source": {"format": "gguf", "metadata": texts, "modules": len(updates)},
        "versions": versions(),
    }
    spec = LoraSpec(rank, scale, 0.0, keys, num_layers)
    named = base_named_in(gguf)
    return Adapter(spec, weights, manifest=manifest, origin=gguf.path, named_base=named, base_assumed=True)
