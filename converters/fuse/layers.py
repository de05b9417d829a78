"""Adapted layers of mlx-lm as plain ones with the fused weights, in the float type or packing of the target."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_rsgwm.converters.dense_weights import dequantised, usual_dtype, with_dtype
from mlx_rsgwm.converters.fuse.error_feedback import Packed
from mlx_rsgwm.core.dtypes import DTYPES
from mlx_rsgwm.models.hooks import module_at
from mlx_rsgwm.models.quantisation import QuantFormat, require_fit

# What a fused model's weights are: as the base has them, a float type, or quantised.
FORMATS: dict[str, QuantFormat | str | None] = {
    "keep": None,
    **{name: name for name in DTYPES},
    "8bit": QuantFormat(8),
    "4bit": QuantFormat(4),
    "3bit": QuantFormat(3),
}
Target = str | QuantFormat  # a name of FORMATS, or what it may stand for


def kind_of(target: Target) -> QuantFormat | str | None:
    """What a target asks for; None: as the base has it."""
    return FORMATS[target] if isinstance(target, str) else target


@dataclass(frozen=True)
class StoredForm:
    """How one weight is stored: in ``dtype``, or packed with scales of that dtype."""

    dtype: mx.Dtype
    quant: QuantFormat | None = None

    def round_trip(self, weight: mx.array) -> mx.array:
        """The float32 values that a float32 ``weight`` becomes."""
        if self.quant is None:
            return weight.astype(self.dtype).astype(mx.float32)
        return self.quant.round_trip(weight, self.dtype)


def plain_layer(layer: Any) -> Any:
    """The base's layer inside an adapted one."""
    return layer.embedding if hasattr(layer, "embedding") else layer.linear


def fused_weight(layer: Any) -> tuple[mx.array, mx.array]:
    """W and the weight that an adapted layer of mlx-lm computes with, both float32."""
    plain = plain_layer(layer)
    weight = dequantised(plain) if hasattr(plain, "scales") else plain.weight.astype(mx.float32)
    a, b = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    update = b @ a if a.ndim == 3 else a @ b if hasattr(layer, "embedding") else b.T @ a.T
    fused = weight + layer.scale * update
    if "m" in layer:
        norms = mx.sqrt(mx.sum(fused * fused, axis=1, keepdims=True))
        fused = layer.m.astype(mx.float32)[:, None] / norms * fused
    return weight, fused


def dora_gains(layers: Iterable[Any]) -> Iterator[mx.array]:
    """The magnitudes of adapted layers by the norms of the base's rows, (out,) float32 of each; of LoRA none."""
    for layer in layers:
        if "m" in layer:
            weight, _ = fused_weight(layer)
            yield layer.m.astype(mx.float32) / mx.linalg.norm(weight, axis=1)


def stored_as(layer: Any, target: Target) -> StoredForm:
    """How an adapted layer's weight is to be stored."""
    plain, kind = plain_layer(layer), kind_of(target)
    packed = hasattr(plain, "scales")
    # Scales of the newer modes are bytes; such a layer's floats are the model's others, which its bias shows or not.
    dtype = plain.scales.dtype if packed else plain.weight.dtype
    dtype = dtype if dtype in DTYPES.values() else mx.bfloat16
    if isinstance(kind, str):
        return StoredForm(DTYPES[kind])
    if kind is None:
        return StoredForm(dtype, QuantFormat(plain.bits, plain.group_size, plain.mode) if packed else None)
    return StoredForm(dtype, kind if kind.fits(_columns(plain)) else None)


def check_groups(layers: Mapping[str, Any], target: Target) -> None:
    """Raise where adapted layers would stay in floats because the target's groups do not divide their columns."""
    kind = kind_of(target)
    if isinstance(kind, QuantFormat):
        require_fit(kind, {name: _columns(plain_layer(layer)) for name, layer in layers.items()})


def too_narrow(fused: Any, target: Target) -> list[str]:
    """The layers of a ``fused`` model that stay in floats because the target's groups do not divide their columns."""
    kind = kind_of(target)
    if not isinstance(kind, QuantFormat):
        return []
    return [
        name
        for name, layer in fused.named_modules()
        if hasattr(layer, "to_quantized") and not kind.fits(layer.weight.shape[-1])
    ]


def _columns(plain: Any) -> int:
    packed = hasattr(plain, "scales")
    return int(plain.scales.shape[-1] * plain.group_size if packed else plain.weight.shape[-1])


def fuse_layers(
    model: Any, config: dict[str, Any], layers: dict[str, Any], target: Target, rounded: Mapping[str, Packed]
) -> dict[str, Any]:
    """Put plain layers with the fused weights into ``model``, in the target format; returns its config.

    ``rounded``: what some of them are in that format, where they are not simply rounded.
    """
    from mlx_lm.utils import dequantize_model

    kind = kind_of(target)
    replaced = []
    for name, layer in layers.items():
        _, weight = fused_weight(layer)
        stored = stored_as(layer, target)
        replaced.append((name, _layer_like(plain_layer(layer), weight, stored if kind is None else None)))
    model.update_modules(tree_unflatten(replaced))
    if kind is None:
        return config
    dtype = usual_dtype(model)
    model = dequantize_model(model)
    config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if isinstance(kind, str):
        model.set_dtype(DTYPES[kind])
        return with_dtype(config, kind)
    config = quantise(model, config, kind)
    for name, packed in rounded.items():
        layer = module_at(model, name)
        layer.weight, layer.scales, layer.biases = packed.weight(), packed.scales, packed.biases
    model.set_dtype(dtype)
    return config


def quantise(model: Any, config: dict[str, Any], quant: QuantFormat) -> dict[str, Any]:
    """Quantise every layer of ``model`` that can be, as mlx_lm.convert does; returns its config."""
    from mlx_lm.utils import quantize_model

    with redirect_stdout(io.StringIO()):  # it prints a line of its own
        _, quantised = quantize_model(model, config, quant.group_size, quant.bits, quant.mode)
    return dict(quantised)


def _layer_like(plain: Any, weight: mx.array, stored: StoredForm | None) -> Any:
    """A layer of ``plain``'s kind with another weight: stored as said, or float32 and dense for later."""
    from mlx_lm.models.switch_layers import SwitchLinear

    bias = "bias" in plain
    made: Any
    if weight.ndim == 3:
        made = SwitchLinear(1, 1, 1, bias=bias)
    elif isinstance(plain, (nn.Embedding, nn.QuantizedEmbedding)):
        made = nn.Embedding(1, 1)
    else:
        made = nn.Linear(1, 1, bias=bias)
    made.weight = weight
    if bias:
        made.bias = plain.bias
    if stored is None:
        return made
    if stored.quant is None:
        made.weight = weight.astype(stored.dtype)
        return made
    quant = stored.quant
    packed = made.to_quantized(group_size=quant.group_size, bits=quant.bits, mode=quant.mode)
    if packed.biases is not None:
        packed.scales, packed.biases = packed.scales.astype(stored.dtype), packed.biases.astype(stored.dtype)
    return packed
