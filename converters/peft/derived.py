"""What PEFT trains beside a parameter of the base and mlx-lm can hold only in it: token rows, biases of lora_B.

The parameter is replaced by what the base computes with them; the arrays themselves are kept for the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx

from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.peft.config import scale_of, token_rows
from mlx_rsgwm.converters.peft.folder import Groups
from mlx_rsgwm.converters.peft.names import LORA_BIAS, SAVED, TOKENS


def derive_parameters(
    groups: Groups, config: Mapping[str, Any], base: BaseLayers | None, beside: dict[str, mx.array], derived: list[str]
) -> list[str]:
    """Put replaced parameters into ``groups.full``: base values with trained token rows, biases plus lora_B's.

    Args:
        groups: its ``tokens`` and ``lora_biases`` are read.
        config: PEFT's.
        base: None where it is not at hand, which is a problem then.
        kept: gets the arrays as PEFT has them, and parameters that were replaced already.
        derived: gets mlx-lm's names of the parameters.

    Returns:
        What is wrong.
    """
    problems = []
    for name, reason, value in _replacements(groups, config, base):
        if reason is not None or value is None:
            problems.append(f"{name.rpartition('.')[0]}: {reason}")
            continue
        assert base is not None
        if name in groups.full:
            beside[f"{name}{SAVED}"] = groups.full[name]
        groups.full[name] = value
        derived.append(base.names.mlx_parameters(name)[0])
    for module, array in groups.tokens.items():
        beside[f"{module}.{TOKENS}{SAVED}"] = array
    for module, array in groups.lora_biases.items():
        beside[f"{module}.{LORA_BIAS}{SAVED}"] = array
    return problems


def _replacements(
    groups: Groups, config: Mapping[str, Any], base: BaseLayers | None
) -> Iterator[tuple[str, str | None, mx.array | None]]:
    """(transformers' parameter, why it cannot be replaced or None, its new value) for each of them."""
    for module, rows in groups.tokens.items():
        name = f"{module}.weight"
        old, reason = _base_value(name, groups, base, "trainable_token_indices: trained token embeddings")
        indices = token_rows(config, module)
        if reason is None and (old is None or rows.ndim != 2 or rows.shape[1] != old.shape[1]):
            reason = f"trained token rows have shape {rows.shape}"
        if reason is None and (len(indices) != rows.shape[0] or not all(0 <= i < old.shape[0] for i in indices)):
            reason = (
                f"trainable_token_indices names {len(indices)} rows of {old.shape[0]}, the file has {rows.shape[0]}"
            )
        if reason is None and (module in groups.embeddings or module in groups.pairs):
            reason = "LoRA and trained token rows on one layer have no counterpart"
        if reason is not None:
            yield name, reason, None
            continue
        value = old.astype(mx.float32) if old.dtype != rows.dtype else mx.array(old)  # what follows writes into it
        value[mx.array(indices)] = rows.astype(value.dtype)
        yield name, None, value
    for module, bias in groups.lora_biases.items():
        name = f"{module}.bias"
        old, reason = _base_value(name, groups, base, "lora_bias: a bias on lora_B")
        if reason is None and old.shape != bias.shape:
            reason = f"the bias on lora_B has shape {bias.shape}, the layer's {old.shape}"
        if reason is None and config.get("use_dora"):
            reason = "a bias on lora_B with DoRA has no counterpart"
        if reason is not None:
            yield name, reason, None
        else:
            yield name, None, old.astype(mx.float32) + scale_of(config, module) * bias.astype(mx.float32)


def _base_value(name: str, groups: Groups, base: BaseLayers | None, what: str) -> tuple[Any, str | None]:
    """The parameter as the adapter or the base has it, or why it cannot be had."""
    if name in groups.full:
        return groups.full[name], None
    if base is None:
        return None, f"{what} can only be converted for a base; give the base model"
    mlx_name = base.names.mlx_parameters(name)[0]
    link = base.names.link(mlx_name)
    if mlx_name not in base.parameters:
        return None, f"{what} has no counterpart, for the base has no {mlx_name} that could hold it"
    if f"{mlx_name.removesuffix('.weight')}.scales" in base.parameters:
        return None, f"{what} has no counterpart in a quantised {mlx_name}"
    if link is not None and not link.plain:
        return None, f"{what} has no counterpart in {mlx_name}, which mlx-lm changes as it loads it"
    return base.read_arrays({mlx_name})[mlx_name], None
