"""llama.cpp's names for the modules of mlx-lm's models, and the row order it wants of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_rsgwm.converters.gguf.architectures import ADAPTER_TYPES, ARCHITECTURES
from mlx_rsgwm.converters.module_names import SWITCH
from mlx_rsgwm.core.errors import RsgwmError


def adapter_architecture(model_type: str) -> tuple[str, bool]:
    """llama.cpp's architecture for a model type, and whether its query and key rows are permuted.

    Raises:
        RsgwmError: no such architecture is known here.
    """
    if model_type not in ADAPTER_TYPES:
        raise RsgwmError(f"{model_type} models have no GGUF form here, only {', '.join(ADAPTER_TYPES)}")
    name = ADAPTER_TYPES[model_type]
    return name, ARCHITECTURES[name].interleaved


def tensor_namer(model_type: str, layers: int) -> Any:
    """A function from a module of mlx-lm to llama.cpp's tensor name without ``.weight``, or None where it has none."""
    import gguf

    architecture, _ = adapter_architecture(model_type)
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)

    def name_of(module: str) -> str | None:
        target = module.removeprefix("language_model.")
        if match := SWITCH.fullmatch(target):
            target = f"{match['block']}.experts.{match['projection']}"
            spare = f"{match['block'].replace('block_sparse_moe', 'mlp')}.experts.{match['projection']}"
            return table.get_name(target) or table.get_name(spare)
        return table.get_name(target)

    return name_of


def permute_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order, (out, …): the two halves of a head interleaved.

    The reverse of ``gguf.unpermute``; ``permute`` in llama.cpp's convert_hf_to_gguf.py.
    """
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def heads_of(module: str, config: dict[str, Any]) -> int | None:
    """The number of heads whose rows a module's outputs are, for query and key projections; else None."""
    leaf = module.rpartition(".")[2]
    if leaf == "q_proj":
        return int(config["num_attention_heads"])
    if leaf == "k_proj":
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None
