"""A model that computes with weights of few bits, in floats: what it will be once it is stored so.

Which layers have such weights is what mlx_lm.convert would quantise: linear ones and embeddings, also of experts, whose
rows can be cut into groups. A layer with an adapter computes with the rounded sum W + ΔW. Gradients pass the rounding
as if it were not there (straight-through: Bengio, Léonard, Courville, 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.base import resolve_base
from mlx_rsgwm.models.base_folder import read_config
from mlx_rsgwm.models.hooks import Call, calls_wrapped, module_at
from mlx_rsgwm.models.quantisation import SYMMETRIC, QuantFormat, require_fit

INNER = ".linear"  # where mlx-lm's LoRA layer holds the base's


def rounded_formats(model: Any, quant: QuantFormat) -> dict[str, QuantFormat]:
    """The layers of a dense model that are stored in few bits, each with its format, by the base's names.

    An architecture may exempt layers or give them a format of their own (``quant_predicate`` of mlx-lm's models).
    """
    predicate = getattr(model, "quant_predicate", None)
    formats = {}
    for path, module in model.named_modules():
        name = path.removesuffix(INNER) if "lora_a" in module_at(model, path.removesuffix(INNER)) else path
        if not hasattr(module, "to_quantized") or not quant.fits(module.weight.shape[-1]):
            continue
        chosen = predicate(name, module) if predicate else True
        if isinstance(chosen, dict):
            formats[name] = QuantFormat(chosen["bits"], chosen["group_size"], chosen.get("mode", "affine"))
        elif chosen:
            formats[name] = quant
    return formats


def check_dense(base: str, quant: QuantFormat | None, progress: Progress = SILENT) -> None:
    """Raise where the base of that name is quantised, before its weights are read: it cannot be rounded to ``quant``.
    With None nothing is to be rounded.

    Raises:
        RsgwmError: it is quantised, or cannot be had.
    """
    if quant is None:
        return
    packed = read_config(resolve_base(base, progress)).get("quantization")
    if isinstance(packed, Mapping):
        raise _quantised_already(packed.get("bits", "few"), quant)


def _quantised_already(bits: Any, quant: QuantFormat) -> RsgwmError:
    return RsgwmError(
        f"the base is quantised already ({bits} bits), and rounding to {quant} starts from a dense one: "
        "take the model that it was made from, or mlx_lm.convert --hf-path BASE --mlx-path DENSE --dequantize"
    )


def check_rounding(model: Any, quant: QuantFormat) -> None:
    """Raise where the weights of ``model``, with its adapted layers in it, cannot be rounded to ``quant``.

    Raises:
        RsgwmError: it is quantised already; rows of an adapted layer cannot be cut into groups; an adapted layer is not
            a linear one of mlx-lm's LoRA.
    """
    packed = [module for _, module in model.named_modules() if hasattr(module, "scales") and hasattr(module, "bits")]
    if packed:
        raise _quantised_already(packed[0].bits, quant)
    layers = {name: layer for name, layer in model.named_modules() if "lora_a" in layer}
    other = [name for name, layer in layers.items() if not isinstance(layer, LoRALinear)]
    if other:
        raise RsgwmError(
            f"rounding to {quant} is for linear layers with LoRA; {other[0]} is a {type(layers[other[0]]).__name__}"
        )
    require_fit(quant, {name: layer.linear.weight.shape[-1] for name, layer in layers.items()})


def rounded_bytes(model: Any, quant: QuantFormat) -> int:
    """Memory that the rounded weights of a dense ``model`` take beside its own, in bytes."""
    layers = (module_at(model, name) for name in rounded_formats(model, quant))
    return sum((layer.linear if "lora_a" in layer else layer).weight.nbytes for layer in layers)


def stored_bytes(model: nn.Module, formats: Mapping[str, QuantFormat]) -> int:
    """What the arrays of a dense ``model`` take once the layers of ``formats`` are stored in them, in bytes.

    An affine group has a scale and an offset in the layer's float type, a symmetric row a scale in it, and a group of
    the other modes a scale of a byte.
    """
    flat: Any = tree_flatten(model.parameters())
    total = sum(value.nbytes for _, value in flat)
    for name, quant in formats.items():
        weight = module_at(model, name).weight
        scale = {"affine": 2 * weight.itemsize, SYMMETRIC: weight.itemsize}.get(quant.mode, 1)
        groups = weight.size // (quant.group_size or weight.shape[-1])
        total += weight.size * quant.bits // 8 + groups * scale - weight.nbytes
    return int(total)


@contextmanager
def weights_replaced(model: Any, weights: Mapping[str, mx.array]) -> Iterator[None]:
    """Layers of the full names in ``weights`` compute with these instead, in their own type, inside."""
    layers = {name: module_at(model, name) for name in weights}
    former = {name: layer.weight for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight = weights[name].astype(former[name].dtype)
        mx.eval([layer.weight for layer in layers.values()])
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = former[name]


@contextmanager
def rounded_weights(model: Any, quant: QuantFormat | None) -> Iterator[None]:
    """Layers compute with rounded weights inside: with the adapter's update where they have one (mlx-lm's LoRA).

    Weights without an update are rounded once and come back at the end; without a format nothing happens.

    Raises:
        RsgwmError: see :func:`check_rounding`.
    """
    if quant is None:
        yield
        return
    check_rounding(model, quant)
    formats = rounded_formats(model, quant)
    adapted = [name for name in formats if "lora_a" in module_at(model, name)]
    plain = {name: module_at(model, name).weight for name in formats if name not in adapted}
    once = {name: formats[name].round_trip(weight, weight.dtype) for name, weight in plain.items()}
    with weights_replaced(model, once), calls_wrapped(model, adapted, lambda name, _: rounded_call(formats[name])):
        yield


def rounded_call(quant: QuantFormat) -> Call:
    """The call of a LoRA layer that computes with its rounded weight; see :func:`rounded_output`."""

    def call(layer: Any, x: mx.array) -> mx.array:
        return rounded_output(layer, x, quant)

    return call


def rounded_output(layer: Any, x: mx.array, quant: QuantFormat) -> mx.array:
    """x Q(W + ΔW)ᵀ of a LoRA layer of mlx-lm, with the gradients that x (W + ΔW)ᵀ has in its factors.

    The rounded weight is a constant to the gradient. The update is added and taken away again, of which only the first
    has gradients: so they cost what LoRA's do, and no (out, in) gradient of the weight is formed. Dropout leaves inputs
    out of the first alone: in training its noise is added to the rounded layer's output.
    """
    linear = layer.linear
    a, b = layer.lora_a, layer.lora_b
    dtype = linear.weight.dtype
    fused = linear.weight.astype(mx.float32) + layer.scale * (b.T @ a.T).astype(mx.float32)
    y = x @ mx.stop_gradient(quant.round_trip(fused, dtype)).astype(dtype).T
    if "bias" in linear:
        y = y + linear.bias
    if not layer.training:
        return y
    update = (layer.dropout(x) @ a) @ b - (x @ mx.stop_gradient(a)) @ mx.stop_gradient(b)
    return y + (layer.scale * update).astype(y.dtype)
