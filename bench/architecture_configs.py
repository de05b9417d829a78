"""Tiny configurations of the architectures that mlx-lm and transformers share: what each needs beyond common sizes."""

from __future__ import annotations

from typing import Any

from mlx_rsgwm.bench.architecture_sizes import SIZES
from mlx_rsgwm.bench.dense_configs import DENSE
from mlx_rsgwm.bench.mixture_configs import MIXTURES

# model type: ``config`` beyond SIZES; ``json``: fields of config.json as published models have them; ``model``: the
# class, where not AutoModelForCausalLM's; ``text``: the fields are those of text_config; ``exclude``, ``to exclude``:
# modules left out; ``strip``: a prefix that published checkpoints leave out
ARCHITECTURES: dict[str, dict[str, Any]] = dict(sorted({**DENSE, **MIXTURES}.items()))


def make_config(name: str) -> tuple[Any, str | None]:
    """transformers' configuration of the architecture, and its class where AutoModelForCausalLM's is not meant."""
    from transformers import AutoConfig

    entry = ARCHITECTURES[name]
    fields = {**SIZES, **entry["config"]}
    if entry.get("text"):
        return AutoConfig.for_model(name, text_config=fields, **entry.get("more", {})), entry["model"]
    return AutoConfig.for_model(name, **fields), None
