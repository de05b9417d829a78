"""A model in memory as a folder that mlx-lm and transformers load, with its base's tokenizer or one of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_rsgwm.converters.checkpoint_form import save_checkpoint
from mlx_rsgwm.converters.resized_vocabulary import end_of, tokenizer_files
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base_folder import TOKENIZER_FILES

GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"


def write_model(model: Any, config: dict[str, Any], source: Path, tokenizer: list[Path], out: Path) -> None:
    """Write ``model`` into the folder ``out``, with the other files that its base in the folder ``source`` has.

    ``model``: mlx-lm's, or a table of the arrays of a checkpoint as transformers saves it, which is consumed.
    ``tokenizer``: the files of a tokenizer of its own; none where it is the base's.
    """
    from mlx_lm.utils import save_config, save_model

    as_stored = not isinstance(model, nn.Module)  # which is a dictionary, too
    if as_stored:
        save_checkpoint(model, out)
    else:
        try:
            save_model(out, model)
        except RuntimeError as error:
            raise RsgwmError(f"cannot write {out}: {error}") from error
    for file in tokenizer:
        shutil.copyfile(file, out / file.name)
    left_out = {"config.json", INDEX_FILE, *(file.name for file in tokenizer_files(source) if tokenizer)}
    for pattern in ("*.json", "*.jinja", *TOKENIZER_FILES, "*.txt"):
        for file in source.glob(pattern):
            if not (out / file.name).exists() and file.name not in left_out:
                shutil.copyfile(file, out / file.name)
    if tokenizer and (end := end_of(out)) is not None:
        config = _ending_with(config, end)
        if (out / GENERATION_FILE).is_file():  # mlx-lm and transformers take its ids before config.json's
            files.write_json(out / GENERATION_FILE, _ending_with(files.read_json_object(out / GENERATION_FILE), end))
    # mlx-lm keeps no tower for images; a checkpoint has it still.
    save_config(config, out / "config.json", keep_vision_config=as_stored)


def _ending_with(config: dict[str, Any], end: int) -> dict[str, Any]:
    """``config`` with the token id ``end`` among those that end a text, where it names any."""
    ends = config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return config if end in listed or not listed else {**config, "eos_token_id": [*listed, end]}
