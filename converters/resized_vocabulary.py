"""Adapters whose training resized the vocabulary: embedding and head saved whole, with another number of rows.

PEFT 0.21 saves both when the vocabulary is not the base's. Of a module that ``modules_to_save`` names it then writes
the trained weight twice and the untrained beside it; the copies are kept for the way back. ``rsgwm fuse`` gives the
model layers of the new size, and the tokenizer that the adapter brings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.peft.folder import Groups
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base_folder import TOKENIZER_FILES, first_line
from mlx_rsgwm.models.config import open_model
from mlx_rsgwm.models.token_layers import is_embedding, is_head

SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
TEMPLATE_FILE = "chat_template.jinja"
PADDED_TO = tuple(2**power for power in range(1, 11))  # what pad_to_multiple_of is in practice


def resized_layers(base: BaseLayers, groups: Groups, problems: list[str]) -> tuple[BaseLayers, int]:
    """``base`` with as many rows in embedding and head as the saved ones have, and that number; 0: they are the base's.

    Where LoRA is on a resized layer, its saved base weight is a replaced parameter from here on.
    """
    places = _token_parameters(base)
    places |= {mlx_name: name for mlx_name, name in groups.saved_names(base.names).items() if mlx_name in places}
    saved = {mlx_name: _saved(peft_name, groups) for mlx_name, peft_name in places.items()}
    sizes = {value.shape[0] for mlx_name, value in saved.items() if value is not None and value.ndim}
    olds = {base.layers[mlx_name.rpartition(".")[0]].shape[0] for mlx_name in places}
    if not sizes or len(olds) != 1 or sizes == olds:
        return base, 0
    missing = [peft_name for mlx_name, peft_name in places.items() if saved[mlx_name] is None]
    if len(sizes) > 1 or missing:
        shown = f"without {', '.join(missing)}" if missing else f"to {' and '.join(map(str, sorted(sizes)))} rows"
        problems.append(
            f"the vocabulary was resized ({olds.pop()} rows in the base) and saved {shown}; in PEFT, merge it into the "
            "resized base (merge_and_unload), save that, and use it as a base"
        )
        return base, 0
    (rows,) = sizes
    for mlx_name, peft_name in places.items():
        module = peft_name.rpartition(".")[0]
        if peft_name not in groups.full:
            groups.full[peft_name] = groups.copies[module]
        link = base.names.link(mlx_name)
        if link is not None and (isinstance(link.scale, np.ndarray) or isinstance(link.offset, np.ndarray)):
            problems.append(f"{peft_name}: mlx-lm multiplies its rows one by one, so it cannot have others")
    layers = {name: _with_rows(layer, rows, name, places) for name, layer in base.layers.items()}
    parameters = {
        name: (rows, *shape[1:]) if name in places else shape
        for name, shape in base.parameters.items()
        if not (name.endswith((".scales", ".biases")) and f"{name.rpartition('.')[0]}.weight" in places)
    }
    parameters |= {name: layers[name.rpartition(".")[0]].shape for name in places if name.endswith(".weight")}
    return replace(base, layers=layers, parameters=parameters), rows


def rows_of(manifest: Mapping[str, Any]) -> int:
    """The rows that a converted adapter's vocabulary was resized to; 0: it was not."""
    layout = (manifest.get("source") or {}).get("layout") or {}
    return int(layout.get("rows") or 0)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer that stands in a folder, as ``save_pretrained`` writes it."""
    names = (*TOKENIZER_FILES, *SIDE_FILES, TEMPLATE_FILE)
    return [folder / name for name in names if (folder / name).is_file()]


def make_room(model: Any, config: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Give ``model`` dense layers where ``adapter`` replaces a packed weight, or one of another number of rows.

    Returns:
        ``config`` with the vocabulary's size.
    """
    modules, rows = dict(model.named_modules()), rows_of(adapter.manifest)
    made: list[tuple[str, Any]] = []
    for name, value in adapter.full.items():
        module, _, leaf = name.rpartition(".")
        layer: Any = modules.get(module)
        packed = isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))
        if leaf != "weight" or value.ndim != 2 or not (packed or isinstance(layer, (nn.Linear, nn.Embedding))):
            continue
        resized = value.shape[0] == rows and layer.weight.shape[0] != rows
        if packed or resized:
            made.append((module, _dense(layer, value)))
    if made:
        model.update_modules(tree_unflatten(made))
    return _with_vocabulary(config, rows) if rows else config


def tokenizer_of(adapter: Adapter, base: Path) -> list[Path]:
    """The files of the tokenizer that goes with a resized vocabulary; none where the base's own does.

    Raises:
        AdapterError: the adapter brings no tokenizer that has the added tokens, or one with ids beyond the rows.
    """
    rows = rows_of(adapter.manifest)
    if not rows:
        return []
    adapter_folder = adapter.files_in
    old_rows = _rows_in(base)
    brought = adapter_folder is not None and (adapter_folder / "tokenizer.json").is_file()
    what = f"{adapter.where} has a vocabulary of {rows} rows, the base {old_rows}"
    again = "put the one it was trained with into the PEFT folder (tokenizer.save_pretrained) and convert it again"
    if rows > old_rows and not brought:
        raise AdapterError(f"{what}, and it brings no tokenizer.json with the added tokens; {again}")
    folder = adapter_folder if adapter_folder is not None and brought else base
    count = count_ids(folder)
    if count > rows:
        raise AdapterError(f"{what}, and the tokenizer in {folder} has {count} tokens; {again}")
    padded = any(-(-old_rows // multiple) * multiple == rows for multiple in PADDED_TO)
    if rows > old_rows and count <= old_rows and not padded:
        raise AdapterError(f"{what}, and its tokenizer has {count} tokens, so none of the added ones; {again}")
    return tokenizer_files(folder) if brought else []


def _rows_in(base: Path) -> int:
    from mlx_rsgwm.models.tokenizer import embedding_rows  # imports mlx-lm, which takes seconds

    rows = embedding_rows(open_model(base)[0])
    assert rows is not None
    return rows


def _token_parameters(base: BaseLayers) -> dict[str, str]:
    """The parameters with a row a token: mlx-lm's names, and transformers'."""
    depth = min((name.count(".") for name in base.layers if is_embedding(name)), default=0)
    modules = [name for name in base.layers if is_head(name) or (is_embedding(name) and name.count(".") == depth)]
    mlx_names = [
        f"{name}.{leaf}" for name in modules for leaf in ("weight", "bias") if f"{name}.{leaf}" in base.parameters
    ]
    return {name: base.names.transformers_parameter(name) for name in mlx_names}


def _saved(parameter: str, groups: Groups) -> mx.array | None:
    """A parameter as PEFT's file has it, be it below LoRA."""
    module, _, leaf = parameter.rpartition(".")
    return groups.full.get(parameter, groups.copies.get(module) if leaf == "weight" else None)


def _with_rows(layer: Any, rows: int, name: str, places: Mapping[str, str]) -> Any:
    if f"{name}.weight" not in places:
        return layer
    return replace(layer, inputs=rows) if layer.kind == "embedding" else replace(layer, outputs=rows)


def _dense(layer: Any, value: mx.array) -> Any:
    """A dense layer of ``layer``'s kind and bias with the shape of ``value``, in the layer's own float type."""
    embedding = isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding))
    dtype = layer.scales.dtype if hasattr(layer, "scales") else layer.weight.dtype
    bias = "bias" in layer
    made: Any = nn.Embedding(1, 1) if embedding else nn.Linear(1, 1, bias=bias)
    made.weight = mx.zeros(value.shape, dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16)
    if bias:
        made.bias = layer.bias if layer.bias.shape[0] == value.shape[0] else mx.zeros(value.shape[:1], layer.bias.dtype)
    return made


def _with_vocabulary(config: dict[str, Any], rows: int) -> dict[str, Any]:
    text = config.get("text_config")
    inner = {"text_config": {**text, "vocab_size": rows}} if isinstance(text, dict) else {}
    # Of a wrapped model some classes of mlx-lm read the outer one, with a default of their own.
    return {**config, **inner, "vocab_size": rows}


def end_of(folder: Path) -> int | None:
    """The id of the token that ends a text by a folder's tokenizer_config.json; None where it names none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    token: Any = files.read_json_object(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return _vocabulary_of(folder).get(text) if isinstance(text, str) else None


def count_ids(folder: Path) -> int:
    """The highest token id of a folder's tokenizer.json, and of the tokens added beside it, plus one."""
    ids = set(_vocabulary_of(folder).values())
    if (folder / "tokenizer_config.json").is_file():
        added = files.read_json_object(folder / "tokenizer_config.json").get("added_tokens_decoder")
        ids |= {int(token) for token in added if str(token).isdigit()} if isinstance(added, dict) else set()
    return max(ids, default=-1) + 1


def _vocabulary_of(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return {}
    try:
        return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())
    except Exception as error:  # the library raises bare Exception
        raise RsgwmError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
