"""A fused model as the checkpoint that its base is: under the same names, in the same form.

mlx-lm's own ``save_model`` writes what ``sanitize`` made of a checkpoint. Of GPT-2, Falcon-H1, Qwen3-Next and every
mixture of experts transformers does not load that, or loads another model without a word. So arrays that were not
changed are the base's own, also those that mlx-lm has no use for (a tower for images, rows for later tokens), and
changed ones take the way of ``sanitize`` back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.base_layers import BaseLayers, saved_by_mlx_lm
from mlx_rsgwm.converters.dense_weights import dense_parameters
from mlx_rsgwm.converters.module_names import SWITCH
from mlx_rsgwm.converters.stream import write_arrays
from mlx_rsgwm.converters.weight_map import Link, SourceRows, describe_link
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base_folder import weight_files
from mlx_rsgwm.models.stored_head import HEAD


def checkpoint_arrays(
    base: BaseLayers, model: Any, changed: Mapping[str, mx.array], adapter: Adapter, dtype: mx.Dtype | None
) -> dict[str, mx.array]:
    """Arrays of the checkpoint ``base`` with what a fused model changes of it, lazy.

    Args:
        base: dense.
        model: the fused model, which says everything of a base that mlx-lm saved itself.
        changed: the new values of its parameters, in float32 or as they came.
        adapter: what was fused; of parameters that it replaces it may have kept the checkpoint's form.
        dtype: of all floats, or None for what each has in the base.

    Raises:
        RsgwmError: a changed parameter cannot be taken back to the checkpoint, and why.
    """
    if saved_by_mlx_lm(base.path):
        if base.weights is None:
            raise RsgwmError(
                f"mlx-lm saved the base, and the checkpoint that its {base.model_type} came from is unknown"
            )
        return _cast(arrays_of_model(base, model, rescaled=False), dtype)
    arrays: dict[str, mx.array] = {}
    for file in weight_files(base.path):
        arrays |= read_safetensors(file, evaluate=False)[0]
    kinds = {name: value.dtype for name, value in arrays.items()}
    for name, value in changed.items():
        link = base.names.link(name)
        if link is None:
            raise RsgwmError(describe_link(name, link))
        if link.axes is None:
            put_parts(arrays, link, value)
        elif f"{name}.original" in adapter.kept and value is adapter.full.get(name):
            arrays[link.source] = adapter.kept[f"{name}.original"]
        else:
            arrays[link.source] = link.undo(value.astype(mx.float32))
    if base.tied:  # a copy of the embedding as it was would be taken for a head apart from it
        arrays = {name: value for name, value in arrays.items() if not HEAD.fullmatch(name)}
    return _cast(arrays, dtype or kinds)


def _cast(arrays: dict[str, mx.array], dtype: mx.Dtype | Mapping[str, mx.Dtype] | None) -> dict[str, mx.array]:
    """Floats as ``dtype``, one or one a name; None: as they are."""
    kinds = dtype if isinstance(dtype, Mapping) else dict.fromkeys(arrays, dtype)
    return {
        name: value
        if (kind := kinds[name]) is None or not mx.issubdtype(value.dtype, mx.floating)
        else value.astype(kind)
        for name, value in arrays.items()
    }


def arrays_of_model(base: BaseLayers, model: Any, rescaled: bool = True) -> dict[str, mx.array]:
    """All parameters under the names of the checkpoint that a base of mlx-lm's own making must have come from.

    Packed ones as the float32 values they stand for; lazy. Where that checkpoint is not known, names follow the rules.

    Args:
        base: what ``model``, an mlx-lm model, was opened from.
        rescaled: divide and subtract back what ``sanitize`` multiplied and added. A narrow type cannot hold that
            exactly, so who keeps the model's types has it refused.

    Raises:
        RsgwmError: a parameter cannot be taken back to the checkpoint, and why.
    """
    arrays: dict[str, mx.array] = {}
    for name, value in dense_parameters(model).items():
        link = base.names.link(name)
        if base.weights is None and not SWITCH.fullmatch(name.rpartition(".")[0]):
            arrays[base.names.transformers_parameter(name)] = value
        elif link is None:
            raise RsgwmError(describe_link(name, link))
        elif not rescaled and (link.scaled or link.shifted):
            raise RsgwmError(f"mlx-lm saved the base with {name} multiplied or shifted")
        elif link.axes is not None:
            arrays[link.source] = link.undo(value)
        else:
            arrays |= _parts_of(name, link, value)
    return arrays


def _parts_of(name: str, link: Link, value: mx.array) -> dict[str, mx.array]:
    """The whole arrays that mlx-lm stacked into ``value``, by their names."""
    if link.scaled:
        value = value / mx.array(link.scale)[..., None]
    arrays = {}
    for parts, matrix in _matrices(link, value):
        if len(parts) > 1 or parts[0].expert is not None or not parts[0].is_all(matrix.shape[0]):
            raise RsgwmError(describe_link(name, link))
        arrays[parts[0].source] = matrix.T if parts[0].transposed else matrix
    return arrays


def put_parts(arrays: dict[str, mx.array], link: Link, value: mx.array) -> None:
    """Put a parameter that mlx-lm split or stacked back into the ``arrays`` that its rows come from, as float32.

    ``value``: (rows, columns), or (experts, rows, columns); ``link``: where it comes from, by ``parts``.
    """
    value = value.astype(mx.float32)
    if link.scaled:
        value = value / mx.array(link.scale)[..., None]
    if _is_slice_of_all(link, arrays):
        rows = link.parts[0][0].rows
        source = mx.array(arrays[link.source].astype(mx.float32))
        source[:, int(rows[0]) : int(rows[-1]) + 1] = value
        arrays[link.source] = source
        return
    for parts, matrix in _matrices(link, value):
        start = 0
        for part in parts:
            block = matrix[start : start + len(part.rows)]
            start += len(part.rows)
            source = mx.array(arrays[part.source].astype(mx.float32))
            places = mx.array(part.rows)
            if part.expert is None and part.transposed:
                source[:, places] = block.T
            elif part.expert is None:
                source[places] = block
            elif part.transposed:
                source[part.expert, :, places] = block
            else:
                source[part.expert, places] = block
            arrays[part.source] = source


def _matrices(link: Link, value: mx.array) -> Iterator[tuple[Sequence[SourceRows], mx.array]]:
    """The parts that each expert's matrix is made of, and the matrix; without experts there is one."""
    matrices = [value] if value.ndim == 2 else [value[index] for index in range(value.shape[0])]
    return zip(link.parts, matrices, strict=True)


def _is_slice_of_all(link: Link, arrays: Mapping[str, mx.array]) -> bool:
    """Whether every expert's rows are the same run of rows of that expert in one stacked array."""
    first = link.parts[0][0]
    rows = np.arange(first.rows[0], first.rows[0] + len(first.rows))
    return len(link.parts) == len(arrays[link.source]) and all(
        len(parts) == 1
        and parts[0].source == link.source
        and parts[0].expert == index
        and not parts[0].transposed
        and np.array_equal(parts[0].rows, rows)
        for index, parts in enumerate(link.parts)
    )


def save_checkpoint(arrays: dict[str, mx.array], out: Path) -> None:
    """Write ``arrays``, which are consumed, as transformers saves a model: a large one in shards."""
    from mlx_lm.utils import make_shards

    size = sum(value.nbytes for value in arrays.values())
    shards = make_shards(arrays)
    arrays.clear()
    places: dict[str, str] = {}
    for number in range(len(shards)):
        shard, shards[number] = shards[number], {}
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        places |= dict.fromkeys(shard, name)
        write_arrays(out / name, shard, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        files.write_text(out / "model.safetensors.index.json", json.dumps(index, indent=2))
