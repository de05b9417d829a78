"""A quantised base as the dense model it computes like, for frameworks that cannot read MLX's packed weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.checkpoint_form import arrays_of_model
from mlx_rsgwm.converters.dense_weights import with_dtype
from mlx_rsgwm.converters.stream import write_arrays
from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.models.base_folder import read_config
from mlx_rsgwm.models.config import open_model

SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


def dense_base(path: Path, out: Path) -> Path:
    """``path`` itself where it is dense; else the new folder ``out`` with float32 weights in the checkpoint's form.

    The values are those that MLX's packed weights stand for, one layer in memory at a time.

    Raises:
        RsgwmError: mlx-lm cannot load the base, the way back to its checkpoint is not known, or ``out`` cannot be
            written.
    """
    config = read_config(path)
    if not config.get("quantization") and not config.get("quantization_config"):
        return path
    arrays = arrays_of_model(read_base_layers(str(path), path), open_model(path)[0])
    make_folder(out)
    for pattern in SIDE_FILES:
        for file in path.glob(pattern):
            if file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copyfile(file, out / file.name)
    floats = {name: value.astype(mx.float32) for name, value in arrays.items()}
    write_arrays(out / "model.safetensors", floats, {"format": "pt"})
    dense = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    files.write_json(out / "config.json", with_dtype(dense, "float32"))
    return out
