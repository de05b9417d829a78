"""A base with tied embeddings as one whose output head is a matrix of its own, which starts as the embedding's copy.

PEFT trains a head apart from the embedding it shares in the base: afterwards there are two matrices, and the model is
no longer a tied one. The untied base is a folder of links to the base's files, with another config.json and one more
file of weights, so that mlx-lm loads it as it loads any other, ``sanitize`` and quantisation included.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.converters.base_layers import BaseLayers, read_base_layers
from mlx_rsgwm.converters.dense_weights import dequantised
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import require_space
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base_folder import weight_files
from mlx_rsgwm.models.config import config_for_mlx_lm, model_classes, open_model
from mlx_rsgwm.models.token_layers import has_head, is_embedding, is_head

HEAD_FILE = "model-untied-head.safetensors"


def adapts_head(adapter: Adapter) -> bool:
    """Whether an adapter updates or replaces an output head; a full fine-tune is a model of its own."""
    touched = [*adapter.modules(), *(name.rpartition(".")[0] for name in adapter.full)]
    return not adapter.spec.is_full and has_head(touched)


@contextmanager
def untied_base(path: Path) -> Iterator[Path]:
    """A temporary folder with the tied base in ``path`` as an untied one; its arrays stay readable once loaded.

    Raises:
        RsgwmError: mlx-lm's model has no head of its own, or the embedding cannot be told.
    """
    config = untied_config(files.read_json_object(path / "config.json"))
    name, value = _embedding(path)
    head = _head_beside(name, path, config)
    with tempfile.TemporaryDirectory(prefix="rsgwm-untied-") as temporary:
        folder = Path(temporary)
        for file in path.iterdir():
            if file.name not in ("config.json", "model.safetensors.index.json"):
                (folder / file.name).symlink_to(os.path.abspath(file))
        files.write_json(folder / "config.json", config)
        by_mlx = all(_metadata(file).get("format") == "mlx" for file in weight_files(path))
        require_space(folder, value.nbytes)
        mx.save_safetensors(str(folder / HEAD_FILE), {head: value}, {"format": "mlx" if by_mlx else "pt"})
        _require_head(path, folder)
        yield folder


@contextmanager
def untied_layers(base: BaseLayers) -> Iterator[BaseLayers]:
    """The layers of a tied base with a head of its own among them; the description stays the base's."""
    with untied_base(base.path) as folder:
        yield replace(read_base_layers(base.name, folder), description=base.description)


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` of a model whose head is not its embedding; that of a language part in it, too."""
    text = config.get("text_config")
    inner = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **inner, "tie_word_embeddings": False}


def _metadata(file: Path) -> dict[str, str]:
    return dict(read_safetensors(file, evaluate=False)[1] or {})


def _embedding(path: Path) -> tuple[str, mx.array]:
    """The checkpoint's name of the embedding and its values; of a quantised one those that it stands for."""
    arrays: dict[str, mx.array] = {}
    for file in weight_files(path):
        arrays |= read_safetensors(file, evaluate=False)[0]
    names = [name for name in arrays if name.endswith(".weight") and is_embedding(name.removesuffix(".weight"))]
    if len(names) != 1:
        listed = ", ".join(names[:3]) or "none"
        raise RsgwmError(f"{path}: which array is the embedding that its head shares is not known (found: {listed})")
    module = names[0].removesuffix(".weight")
    scales = arrays.get(f"{module}.scales")
    if scales is None:
        return names[0], arrays[names[0]]
    layer = dict(open_model(path)[0].named_modules())[module]
    dtype = scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16
    return names[0], dequantised(layer).astype(dtype)


def _head_beside(embedding: str, path: Path, config: dict[str, Any]) -> str:
    """What a checkpoint that calls its embedding ``embedding`` calls the head of the model that ``config`` makes."""
    settings = config_for_mlx_lm(config)
    model_class, arguments = model_classes(settings)
    model = model_class(arguments.from_dict(settings))
    heads = [name for name, _ in model.named_modules() if is_head(name)]
    if len(heads) != 1:
        kind = config["model_type"]
        raise RsgwmError(f"{path}: mlx-lm's {kind} has no head apart from its embedding, so it cannot be untied")
    head = heads[0] if embedding.startswith("language_model.") else heads[0].removeprefix("language_model.")
    return f"{head}.weight"


def _require_head(path: Path, folder: Path) -> None:
    config = files.read_json_object(path / "config.json")
    try:
        open_model(folder)
    except RsgwmError as error:
        reason = str(error).removeprefix(f"{folder} ")
        raise RsgwmError(
            f"{path}: mlx-lm's {config['model_type']} cannot have a head apart from its embedding: {reason}"
        ) from error
