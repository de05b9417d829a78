"""What a base model is made of as mlx-lm builds it: its layers and parameters with their shapes, no value read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_rsgwm.converters.module_names import (
    HEADS,
    NEEDS_BASE,
    PREFIXES,
    Names,
    checkpoint_shapes,
    transformers_parameter,
)
from mlx_rsgwm.converters.weight_map import WeightMap
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.safetensors_io import read_header
from mlx_rsgwm.models.base import describe_base, fingerprint_of, local_base, resolve_base
from mlx_rsgwm.models.base_folder import first_line, read_config, weight_files
from mlx_rsgwm.models.config import config_for_mlx_lm, model_classes, open_model
from mlx_rsgwm.models.token_layers import is_head

Kind = Literal["linear", "embedding", "experts"]


@dataclass(frozen=True)
class BaseLayer:
    """A layer that can be adapted. An embedding maps ``inputs`` token ids to ``outputs`` dimensions."""

    kind: Kind
    inputs: int
    outputs: int
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its dense weight."""
        if self.kind == "embedding":
            return self.inputs, self.outputs
        rows = self.outputs, self.inputs
        return (self.experts, *rows) if self.kind == "experts" else rows


@dataclass(frozen=True)
class BaseLayers:
    """A base without its weights.

    ``layers``: by mlx-lm's full names. ``parameters``: shapes by name. ``tied``: the embedding is the output head too.
    ``description``: what manifests keep of it. ``weights``: how its parameters come from its checkpoint, where that
    is known; ``bare``: whether the checkpoint leaves the prefix of the model below the head out.
    """

    name: str
    path: Path
    model_type: str
    description: dict[str, Any]
    layers: dict[str, BaseLayer]
    parameters: dict[str, tuple[int, ...]]
    tied: bool
    weights: WeightMap | None = None
    bare: bool = False

    @cached_property
    def names(self) -> Names:
        """How transformers' and mlx-lm's names of this base go over into each other."""
        return Names(self.model_type, self.weights, self.bare)

    def read_arrays(self, names: set[str]) -> dict[str, mx.array]:
        """Those parameters that the base has under these names, lazy."""
        if not names & self.parameters.keys():
            return {}
        flat: Any = tree_flatten(open_model(self.path)[0].parameters())
        return {name: value for name, value in flat if name in names}


def local_base_layers(name: str) -> BaseLayers | None:
    """:func:`read_base_layers` of a base that is on this machine as a folder or in the Hub's cache; else None."""
    path = local_base(name)
    if path is None:
        return None
    try:
        return read_base_layers(name, resolve_base(str(path)))
    except RsgwmError:
        return None  # not whole, or of a kind that mlx-lm has not: no help here


def shared_base_layers(name: str, path: Path) -> BaseLayers:
    """:func:`read_base_layers`, once for adapters of one base that are read one after another."""
    return _layers_while(name, path, tuple((file, file.stat().st_mtime_ns) for file in weight_files(path)))


@lru_cache(maxsize=1)
def _layers_while(name: str, path: Path, stamps: tuple[tuple[Path, int], ...]) -> BaseLayers:
    """The layers while the base's files are those of ``stamps``."""
    return read_base_layers(name, path)


def read_base_layers(name: str, path: Path) -> BaseLayers:
    """The layers of the base in the folder ``path``; its arrays stay on disk.

    Raises:
        RsgwmError: mlx-lm cannot build the model.
    """
    config = read_config(path)
    model, _, _ = open_model(path)
    layers = {}
    for module_name, module in model.named_modules():
        layer = _layer(module)
        if layer is not None:
            layers[module_name] = layer
    flat: Any = tree_flatten(model.parameters())
    parameters = {parameter: tuple(value.shape) for parameter, value in flat}
    weights, bare = _weight_map(path, config, parameters, layers)
    embedded = any(layer.kind == "embedding" for layer in layers.values())
    return BaseLayers(
        name=name,
        path=path,
        model_type=config["model_type"],
        description=describe_base(name, fingerprint_of(path), files.read_json_object(path / "config.json")),
        layers=layers,
        parameters=parameters,
        tied=embedded and not any(map(is_head, layers)),
        weights=weights,
        bare=bare,
    )


def _weight_map(
    path: Path, config: Mapping[str, Any], parameters: Mapping[str, tuple[int, ...]], layers: Mapping[str, BaseLayer]
) -> tuple[WeightMap | None, bool]:
    """How mlx-lm's parameters come from the checkpoint, and whether that leaves the model's prefix out.

    A base that mlx-lm has saved went through ``sanitize`` before: then of the checkpoint that it must have come from;
    None where that is not known and names follow the rules.

    Raises:
        RsgwmError: ``sanitize`` cannot be followed, and no rule stands in for it.
    """
    shapes, saved_by_mlx = _shapes_of(path), saved_by_mlx_lm(path)
    model_type = str(config["model_type"])
    if saved_by_mlx:
        dense = {name: shape for name, shape in parameters.items() if not name.endswith((".scales", ".biases"))}
        dense |= {f"{name}.weight": layer.shape for name, layer in layers.items() if f"{name}.weight" in dense}
        shapes = checkpoint_shapes(dense, model_type)
    try:
        settings = {**config, **config_for_mlx_lm(config)}
        model_class, arguments = model_classes(settings)

        def sanitize(arrays: dict[str, Any]) -> dict[str, Any]:
            model = model_class(arguments.from_dict(settings))  # a fresh one: some drop a tied head of their own here
            return dict(model.sanitize(arrays)) if hasattr(model, "sanitize") else arrays

        weights = WeightMap(sanitize, shapes)
        known = not saved_by_mlx or set(dense) <= set(weights.names())
    except Exception as error:  # markers are not what sanitize was written for: anything may happen in it
        if not saved_by_mlx:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise RsgwmError(f"{path}: what mlx-lm does to its arrays cannot be followed ({reason})") from error
        known = False
    if not known and model_type in NEEDS_BASE:
        raise RsgwmError(f"{path} was saved by mlx-lm, which changes {model_type}'s arrays; give the original model")
    if not known:
        return None, False
    prefix = PREFIXES.get(model_type, "model") + "."
    named = [transformers_parameter(name, model_type) for name in shapes if not name.startswith(HEADS)]
    return weights, (not saved_by_mlx or model_type == "gpt2") and not any(
        name.startswith((prefix, "language_model.")) for name in named
    )


def _shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a base's arrays from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        shapes |= {name: tuple(entry["shape"]) for name, entry in read_header(file).entries.items()}
    return shapes


def saved_by_mlx_lm(path: Path) -> bool:
    """Whether mlx-lm wrote a base's arrays, so that they went through ``sanitize`` before."""
    for file in weight_files(path):
        header = read_header(file)
        if header.metadata.get("format") == "mlx" or any(name.endswith(".scales") for name in header.entries):
            return True
    return False


def _layer(module: nn.Module) -> BaseLayer | None:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
        return BaseLayer("experts", module.input_dims, module.output_dims, module.num_experts)
    if not isinstance(module, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)):
        return None
    rows, columns = module.weight.shape
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        columns = columns * 32 // module.bits
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return BaseLayer("embedding", rows, columns)
    return BaseLayer("linear", columns, rows)
