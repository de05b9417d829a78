"""A quantised base as the dense model it computes like, for frameworks that cannot read MLX's packed weights."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.module_names import KEEPS_BLOCK_SPARSE, MIXTRAL, SWITCH, Names
from mlx_rsgwm.converters.stream import write_arrays
from mlx_rsgwm.converters.weight_map import describe_link
from mlx_rsgwm.core import files
from mlx_rsgwm.core.dtypes import DTYPES
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.models.base_folder import read_config
from mlx_rsgwm.models.config import open_model

SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


def dense_base(path: Path, out: Path) -> Path:
    """``path`` itself where it is dense; else the new folder ``out`` with float32 weights under transformers' names.

    The values are those that MLX's packed weights stand for, one layer in memory at a time.

    Raises:
        RsgwmError: mlx-lm cannot load the base, or ``out`` cannot be written.
    """
    config = read_config(path)
    if not config.get("quantization") and not config.get("quantization_config"):
        return path
    model, _, _ = open_model(path)
    known = read_base_layers(str(path), path).names
    arrays = {
        name: value.astype(mx.float32)
        for parameter, changed in dense_parameters(model).items()
        for name, value in _transformers_arrays(parameter, changed, config["model_type"], known).items()
    }
    make_folder(out)
    for pattern in SIDE_FILES:
        for file in path.glob(pattern):
            if file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copyfile(file, out / file.name)
    write_arrays(out / "model.safetensors", arrays, {"format": "pt"})
    dense = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    files.write_json(out / "config.json", with_dtype(dense, "float32"))
    return out


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``config`` with ``dtype`` wherever transformers looks for it: by its old name, its new one, in nested parts."""
    changed = {
        name: {**part, **{key: dtype for key in ("dtype", "torch_dtype") if key in part}}
        if name.endswith("_config") and isinstance(part, Mapping)
        else part
        for name, part in config.items()
    }
    return {**changed, "torch_dtype": dtype, "dtype": dtype}


def dense_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Every parameter by mlx-lm's name, packed ones as the float32 values they stand for; lazy."""
    flat: Any = tree_flatten(model.parameters())
    parameters = dict(flat)
    for name, module in model.named_modules():
        if hasattr(module, "scales") and hasattr(module, "bits"):
            parameters[f"{name}.weight"] = dequantised(module)
            for leaf in ("scales", "biases"):
                parameters.pop(f"{name}.{leaf}", None)
    return parameters


def usual_dtype(model: nn.Module) -> mx.Dtype:
    """The float type that most of a model's arrays have; of packed weights their scales count."""
    flat: Any = tree_flatten(model.parameters())
    counts = Counter(value.dtype for _, value in flat if value.dtype in DTYPES.values())
    return counts.most_common(1)[0][0]


def dequantised(layer: Any) -> mx.array:
    """The float32 weight that a quantised layer of mlx-lm stands for."""
    biases = layer.biases.astype(mx.float32) if getattr(layer, "biases", None) is not None else None
    scales = layer.scales.astype(mx.float32) if biases is not None else layer.scales
    dense: mx.array = mx.dequantize(
        layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    )
    return dense.astype(mx.float32)


def _transformers_arrays(name: str, value: mx.array, model_type: str, known: Names) -> dict[str, mx.array]:
    """An array under transformers' name, as it was before mlx-lm's ``sanitize``; stacked experts one by one."""
    module, _, leaf = name.rpartition(".")
    names, link = Names(model_type), known.link(name)
    if not (match := SWITCH.fullmatch(module)):
        if link is not None and link.axes is None:
            raise RsgwmError(f"{describe_link(name, link)}, which is not undone; give the dense base")
        return {names.transformers_parameter(name): value if link is None else link.undo(value.astype(mx.float32))}
    if link is not None and link.scaled:
        value = value / mx.array(link.scale).reshape(*np.shape(link.scale), *[1] * (value.ndim - np.ndim(link.scale)))
    block, projection = names.experts_block(module.rpartition(".")[0]), match["projection"]
    if model_type in KEEPS_BLOCK_SPARSE:
        projection = next(old for old, merged_name in MIXTRAL.items() if merged_name == projection)
    return {f"{block}.experts.{expert}.{projection}.{leaf}": value[expert] for expert in range(value.shape[0])}
