"""What MLX's packed weights stand for: float32 arrays, and the config of a model that holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_rsgwm.core.dtypes import DTYPES


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
