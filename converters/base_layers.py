"""What a base model is made of as mlx-lm builds it: its layers and parameters with their shapes, no value read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_rsgwm import files
from mlx_rsgwm.base import describe_base, fingerprint_of
from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.model_folder import first_line, read_config, rope_fields

Kind = Literal["linear", "embedding", "experts"]


@dataclass(frozen=True)
class Layer:
    """A layer that can be adapted. An embedding maps ``inputs`` token ids to ``outputs`` dimensions."""

    kind: Kind
    inputs: int
    outputs: int
    experts: int = 0


@dataclass(frozen=True)
class BaseLayers:
    """A base without its weights.

    ``layers``: by mlx-lm's full names. ``parameters``: shapes by name. ``tied``: the embedding is the output head too.
    ``description``: what manifests keep of it.
    """

    name: str
    path: Path
    model_type: str
    description: dict[str, Any]
    layers: dict[str, Layer]
    parameters: dict[str, tuple[int, ...]]
    tied: bool


def read_base_layers(name: str, path: Path) -> BaseLayers:
    """The layers of the base in the folder ``path``; its arrays stay on disk.

    Raises:
        RsgwmError: mlx-lm cannot build the model.
    """
    from mlx_lm.utils import load_model

    config = read_config(path)
    try:
        model, _ = load_model(path, lazy=True, model_config=rope_fields(config))
    except Exception as error:  # any mismatch of config and weights may surface anywhere in mlx-lm
        raise RsgwmError(f"{path} cannot be loaded by mlx-lm: {first_line(error)}") from error
    layers = {}
    for module_name, module in model.named_modules():
        layer = _layer(module)
        if layer is not None:
            layers[module_name] = layer
    flat: Any = tree_flatten(model.parameters())
    embedded = any(layer.kind == "embedding" for layer in layers.values())
    return BaseLayers(
        name=name,
        path=path,
        model_type=config["model_type"],
        description=describe_base(name, fingerprint_of(path), files.read_json_object(path / "config.json")),
        layers=layers,
        parameters={parameter: tuple(value.shape) for parameter, value in flat},
        tied=embedded and not any(one.rpartition(".")[2] in ("lm_head", "embed_out", "output") for one in layers),
    )


def _layer(module: nn.Module) -> Layer | None:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
        return Layer("experts", module.input_dims, module.output_dims, module.num_experts)
    if not isinstance(module, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)):
        return None
    rows, columns = module.weight.shape
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        columns = columns * 32 // module.bits
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return Layer("embedding", rows, columns)
    return Layer("linear", columns, rows)
