"""Bases quantised by other tools, in formats that MLX does not read: refused by the name of the tool."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError

# Quantisations of config.json that mlx-lm does not read, by quant_method.
UNREADABLE = {
    "gptq": "GPTQ",  # mlx-lm takes it for AWQ's packing, along the other axis
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
    if config.get("quantization"):
        return
    if method == "fp8" and (settings.get("scale_fmt") == "ue8m0" or _model_mentions(config, "weight_scale_inv")):
        return  # mlx-lm unpacks these
    name = UNREADABLE.get(method) or _unread_variant(method, settings, config)
    if name:
        raise RsgwmError(
            f"{path} is quantised by {name}, which MLX does not read; give the dense model it was made from, "
            "or an MLX quantisation of that (mlx-community has many)"
        )


def _unread_variant(method: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The name of a variant that mlx-lm does not read, of a method of which it reads others; else empty."""
    if method == "awq":
        layout, bits = str(settings.get("version") or "gemm").lower(), settings.get("bits", 4)
        return "" if (layout, bits) == ("gemm", 4) else f"AWQ ({bits} bits, {layout})"
    if method != "compressed-tensors":
        return ""
    layout = str(settings.get("format"))
    if layout == "pack-quantized":  # mlx-lm takes it for 4 bits in groups of 32, whatever is written
        groups = settings.get("config_groups")
        schemes = groups.values() if isinstance(groups, dict) else ()
        weights = [scheme.get("weights") if isinstance(scheme, dict) else None for scheme in schemes]
        usual = all(
            isinstance(scheme, dict)
            and (scheme.get("num_bits"), scheme.get("group_size"), scheme.get("symmetric", True)) == (4, 32, True)
            for scheme in weights
        )
        if usual and _model_mentions(config, "weight_packed"):
            return ""
    elif layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return ""
    return f"compressed-tensors ({layout})"


def quantisation_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``quantization_config`` of a config.json, its language part's included; empty where there is none."""
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    settings = config.get("quantization_config") or nested
    return settings if isinstance(settings, dict) else {}


def _model_mentions(config: Mapping[str, Any], ending: str) -> bool:
    """Whether mlx-lm's model of this type, or of its language part, unpacks arrays of that name when it reads them."""
    from mlx_lm.utils import MODEL_REMAPPING

    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        named = str(part.get("model_type") or "")
        kind = MODEL_REMAPPING.get(named, named)
        spec = find_spec(f"mlx_lm.models.{kind}") if kind.isidentifier() else None
        if spec is not None and spec.origin is not None and ending in files.read_text(Path(spec.origin)):
            return True
    return False
