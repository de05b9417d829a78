"""A run that begins with the weights of an adapter (mlx-lm's ``resume_adapter_file``): weights, not the optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.data.row_hashes import RowRecord, record_of
from mlx_rsgwm.models.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, LoraSpec
from mlx_rsgwm.models.fit_check import untied_hint
from mlx_rsgwm.training.layers import trainable


@dataclass(frozen=True)
class WarmStart:
    """Arrays by name, with the file that they come from, its hash, and the scale that its adapter applies them with.

    ``record``: the rows that they were trained on.
    """

    path: Path
    hash: str
    arrays: dict[str, mx.array] = field(repr=False)
    scale: float | None = None
    record: RowRecord = field(default=RowRecord(), repr=False)

    @classmethod
    def load(cls, path: Path) -> WarmStart:
        """Read an adapter folder or a ``.safetensors`` file of mlx-lm's names.

        Raises:
            RsgwmError: no such file, another format, values that are not finite.
        """
        file = path / WEIGHTS_FILE if path.is_dir() else path
        if not file.is_file():
            raise RsgwmError(f"the weights to start from, {file}, do not exist")
        if file.suffix != ".safetensors":
            raise RsgwmError(f"the weights to start from, {file}, are no .safetensors file")
        arrays, _ = read_safetensors(file)
        wrong = [name for name, value in arrays.items() if not mx.isfinite(value).all().item()]
        raise_problems(str(file), [f"{name} has values that are not finite" for name in wrong])
        beside = file.with_name(CONFIG_FILE)
        config = files.read_json_object(beside) if files.is_present(beside) else None
        scale = None if config is None else LoraSpec.from_config(config, str(beside)).scale
        manifest = file.with_name(MANIFEST_FILE)
        described = files.read_json_object(manifest) if files.is_present(manifest) else {}
        record = record_of(described, f"{path.name}, the weights started from,")
        return cls(file, files.sha256_file(file), arrays, scale, record)

    def describe(self) -> dict[str, Any]:
        """For manifests and checkpoints."""
        return {"file": self.path.name, "hash": self.hash}

    def put_into(self, model: Any, scale: float) -> list[str]:
        """Set the trainable layers of ``model``, which apply ``scale``; returns what should be told.

        Raises:
            RsgwmError: arrays that no trained layer takes, of another shape, or weights made for another scale.
        """
        places = trainable(model)
        problems = []
        present = dict(model.named_modules())
        for name, value in self.arrays.items():
            module = name.rpartition(".")[0]
            if name not in places:
                hint = "" if module in present else untied_hint(module)
                problems.append(f"{name} belongs to no layer that this run trains{hint}")
            elif value.shape != places[name].shape:
                problems.append(f"{name} has the shape {value.shape}, the layer {places[name].shape}")
        if self.scale is not None and abs(self.scale - scale) > 1e-6 * abs(scale):
            problems.append(f"they were trained with scale {self.scale:g}, and this run has {scale:g} (alpha / rank)")
        raise_problems(f"the weights to start from, {self.path}, do not fit", problems)
        cast = {name: value.astype(places[name].dtype) for name, value in self.arrays.items()}
        model.update(tree_unflatten(list(cast.items())))
        mx.eval(model.trainable_parameters())
        fresh = sorted({name.rpartition(".")[0] for name in places} - {name.rpartition(".")[0] for name in cast})
        notes = [f"starting from the weights of {self.path}"]
        return notes + ([f"{len(fresh)} layers are not in it and start anew: {', '.join(fresh[:4])}"] if fresh else [])
