"""Bases quantised by other tools, in formats that MLX does not read: refused by the name of the tool."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_rsgwm.errors import RsgwmError

# Quantisations of config.json that mlx-lm does not read, by quant_method.
UNREADABLE = {
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM's FP8",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "torchao": "torchao",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "quark": "Quark",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "fouroversix": "Four Over Six",
}


def refuse_foreign_quantisation(path: Path, config: Mapping[str, Any]) -> None:
    """Name a quantisation that MLX does not read, and say what to give instead.

    Raises:
        RsgwmError: ``config``, the config.json of the folder ``path``, names one.
    """
    settings = quantisation_settings(config)
    method = str(settings.get("quant_method") or "").lower()
    if not method and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if config.get("quantization") or method not in UNREADABLE:
        return
    if method == "fp8" and (settings.get("scale_fmt") == "ue8m0" or _dequantises(config)):
        return  # mlx-lm unpacks these
    raise RsgwmError(
        f"{path} is quantised by {UNREADABLE[method]}, which MLX does not read; give the dense model it was made from, "
        "or an MLX quantisation of that (mlx-community has many)"
    )


def quantisation_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``quantization_config`` of a config.json, its language part's included; empty where there is none."""
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    settings = config.get("quantization_config") or nested
    return settings if isinstance(settings, dict) else {}


def _dequantises(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm's model of this type turns FP8 weights into dense ones when it reads them."""
    from mlx_lm.utils import MODEL_REMAPPING

    kind = MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    spec = find_spec(f"mlx_lm.models.{kind}") if kind.isidentifier() else None
    return spec is not None and spec.origin is not None and "weight_scale_inv" in Path(spec.origin).read_text()
