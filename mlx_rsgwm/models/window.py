"""Sliding windows that mlx-lm's model of a base passes over: up to that length it computes the same as transformers."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import mlx.nn as nn


def modules_of(model: nn.Module) -> list[ModuleType]:
    """The modules of mlx-lm that a model's layers are written in, the outermost first."""
    names = dict.fromkeys(type(part).__module__ for part in (model, *(module for _, module in model.named_modules())))
    model_names = [
        name for name in names if name.startswith("mlx_lm.models.") and not name.endswith((".base", ".rope_utils"))
    ]
    return [sys.modules[name] for name in model_names]


def source_of(modules: Sequence[ModuleType]) -> str:
    """The Python text of modules, to see which settings they mention."""
    return "\n".join(inspect.getsource(module) for module in modules)


def unapplied_window(meant: Any, model: nn.Module, source: str) -> int | None:
    """The window of transformers' text configuration ``meant`` that ``model``, of that ``source``, does not apply.

    None where there is none, it is longer than any text, or mlx-lm applies it.
    """
    window = getattr(meant, "sliding_window", None)
    longest = getattr(meant, "max_position_embeddings", None) or 0
    kinds = getattr(meant, "layer_types", None)
    if not window or window >= longest or (kinds and "sliding_attention" not in kinds):
        return None
    if getattr(meant, "use_sliding_window", True) is False:
        return None
    applied = re.search(r"\bsliding_window\b", re.sub(r"^    sliding_window.*$", "", source, flags=re.MULTILINE))
    layer_types = getattr(getattr(model, "args", None), "layer_types", None)
    return None if applied and not (layer_types and "sliding_attention" not in layer_types) else int(window)
