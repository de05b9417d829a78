"""A LoRA adapter as a GGUF file that llama.cpp loads beside a base model (``--lora``).

The layout is that of llama.cpp's convert_lora_to_gguf.py: for every base tensor ``X.weight`` the arrays
``X.weight.lora_a`` (rank, in) and ``X.weight.lora_b`` (out, rank), ``adapter.lora.alpha``, and rows of query and key
projections in the order of that architecture. llama.cpp computes alpha / rank, so alpha is scale · rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.gguf.names import adapter_architecture, heads_of, permute_rows, tensor_namer
from mlx_rsgwm.converters.peft.names import model_order
from mlx_rsgwm.core import files
from mlx_rsgwm.core.dtypes import BY_CODE
from mlx_rsgwm.core.errors import AdapterError, CheckFailed, RsgwmError, raise_problems
from mlx_rsgwm.core.folders import make_folder, require_space
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base_folder import read_config
from mlx_rsgwm.models.fit_check import untied_hint
from mlx_rsgwm.models.token_layers import is_embedding

KINDS = {"f32": BY_CODE["F32"], "f16": BY_CODE["F16"]}  # which llama.cpp reads in an adapter


def to_gguf(adapter: Adapter, base: BaseLayers, out: Path, dtype: str = "f32") -> Path:
    """Write ``adapter`` to the GGUF file ``out`` and read it back; arrays are written one at a time.

    Args:
        adapter: LoRA on linear layers, experts, and an embedding that is not the head too.
        base: the base it is for.
        out: a path that does not exist yet.
        dtype: f32 or f16; f32 holds every adapter's values exactly.

    Raises:
        AdapterError: naming every part that llama.cpp cannot apply.
        CheckFailed: what was read back differs; the file is removed.
        RsgwmError: a model type without a GGUF form, ``out`` exists or cannot be written.
    """
    import gguf

    if dtype not in KINDS:
        raise RsgwmError(f"GGUF adapters are f32 or f16, found {dtype!r}")
    files.require_absent(out)
    config = read_config(base.path)
    config = {**config, **(config.get("text_config") or {})}
    architecture, _ = adapter_architecture(base.model_type)
    names = _tensor_names(adapter, base, config)
    require_space(out, sum(value.nbytes for value in adapter.weights.values()) * 2 + 2**20)
    make_folder(out.absolute().parent)
    with files.new_file(out, replace=False) as temporary:
        writer = gguf.GGUFWriter(str(temporary), architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.spec.scale * adapter.spec.rank)
        writer.add_string(gguf.Keys.General.NAME, out.stem)
        writer.add_string("general.base_model.0.name", base.name)
        writer.add_uint32("general.base_model.count", 1)
        kind = np.dtype(KINDS[dtype].bits)
        for name, shape in _shapes(adapter, names):
            writer.add_tensor_info(name, shape, kind, int(np.prod(shape)) * kind.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, value in _arrays(adapter, names, config, base.model_type):
            writer.write_tensor_data(np.ascontiguousarray(value.astype(kind)))
        writer.close()
        # Before it gets its name: a full disk may have cut it, with no error by whoever wrote it.
        _check(temporary, out, adapter, names, config, base.model_type, kind)
    return out


def _tensor_names(adapter: Adapter, base: BaseLayers, config: dict[str, Any]) -> dict[str, str]:
    """llama.cpp's tensor for every adapted module, in the model's order.

    Raises:
        AdapterError: everything that has none, or that llama.cpp would not apply as mlx-lm does.
    """
    raise_problems(adapter.where, adapter.problems(), AdapterError)
    name_of = tensor_namer(base.model_type, int(config["num_hidden_layers"]))
    problems = []
    if adapter.spec.fine_tune_type != "lora":
        problems.append(f"llama.cpp has no {adapter.spec.fine_tune_type} adapters; make a model of it (rsgwm fuse)")
    problems += [f"llama.cpp adapters cannot replace {name}; make a model of it (rsgwm fuse)" for name in adapter.full]
    names = {}
    for module in sorted(adapter.modules(), key=model_order):
        layer = base.layers.get(module)
        name = name_of(module)
        if layer is None:
            problems.append(f"the base has no {module}{untied_hint(module)}")
        elif name is None:
            problems.append(f"{module} has no tensor in llama.cpp")
        elif is_embedding(module) and base.tied:
            problems.append(
                f"{module} is the head too in this base, which llama.cpp adapts apart; make a model of it (rsgwm fuse)"
            )
        else:
            names[module] = f"{name}.weight"
    raise_problems(f"{adapter.where} has no GGUF form", problems, AdapterError)
    return names


def _shapes(adapter: Adapter, names: dict[str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for module, name in names.items():
        a, b = adapter.weights[f"{module}.lora_a"], adapter.weights[f"{module}.lora_b"]
        if a.ndim == 3:
            yield f"{name}.lora_a", tuple(a.shape)
            yield f"{name}.lora_b", tuple(b.shape)
        else:
            yield f"{name}.lora_a", tuple(a.shape if is_embedding(module) else a.shape[::-1])
            yield f"{name}.lora_b", tuple(b.shape[::-1])


def _arrays(
    adapter: Adapter, names: dict[str, str], config: dict[str, Any], model_type: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors in the order of :func:`_shapes`, float32."""
    _, permuted = adapter_architecture(model_type)
    for module, name in names.items():
        a = np.array(adapter.weights[f"{module}.lora_a"].astype(mx.float32))
        b = np.array(adapter.weights[f"{module}.lora_b"].astype(mx.float32))
        if a.ndim == 2:
            # An embedding's lora_a has a row a token, which is how llama.cpp looks tokens up.
            a, b = (a if is_embedding(module) else a.T), b.T
            heads = heads_of(module, config) if permuted else None
            if heads is not None:
                b = permute_rows(b, heads)
        yield f"{name}.lora_a", a
        yield f"{name}.lora_b", b


def _check(
    path: Path, out: Path, adapter: Adapter, names: dict[str, str], config: dict[str, Any], model_type: str, kind: Any
) -> None:
    """Read the file, which is at ``path`` before it is ``out``, with the gguf package; compare every tensor and alpha.

    Raises:
        CheckFailed: naming the first tensor that differs.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, IndexError, KeyError) as error:  # numpy's, of a file that ends too early
        raise CheckFailed(f"{out} was cut off while it was written; free some space on the disk") from error
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    if alpha != float(np.float32(adapter.spec.scale * adapter.spec.rank)):
        raise CheckFailed(f"{out}: alpha reads {alpha}, not {adapter.spec.scale * adapter.spec.rank}")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, value in _arrays(adapter, names, config, model_type):
        if name not in tensors or not np.array_equal(tensors.pop(name), value.astype(kind)):
            raise CheckFailed(f"{out}: {name} does not read as it was written")
    if tensors:
        raise CheckFailed(f"{out}: there is {next(iter(tensors))} too")
