"""Rotary embeddings as a base's configuration means them, beside those that mlx-lm made of it.

mlx-lm's models read what their authors met: some rotate whole heads where the configuration says half, some know no
scaling, some look for theta in one place. All of that shows in one thing, the frequencies of the layers' rotations, so
these are compared with transformers' formulas (modeling_rope_utils.py) and replaced where they differ.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

NAMES = ("rope", "rotary_emb")
TOLERANCE = 1e-3  # relative; frequencies in float32 differ by 1e-6, those of another theta or factor by far more


@dataclass(frozen=True)
class Rotation:
    """What a rotary embedding does: angles a position, float64 (dims / 2), and a factor on the rotated values.

    ``long`` and ``long_from``: the angles of texts longer than so many tokens, where these have others (longrope).
    """

    angles: np.ndarray
    factor: float = 1.0
    long: np.ndarray | None = None
    long_from: int = 0

    def same(self, other: Rotation) -> bool:
        """Whether both turn by the same angles, within ``TOLERANCE``."""
        if self.angles.shape != other.angles.shape or (self.long is None) != (other.long is None):
            return False
        return np.allclose(self.angles, other.angles, rtol=TOLERANCE, atol=1e-12) and math.isclose(
            self.factor, other.factor, rel_tol=TOLERANCE
        )


class ConfiguredRoPE(nn.Module):
    """mlx-lm's rotary embeddings with the frequencies of a :class:`Rotation`."""

    def __init__(self, rotation: Rotation, traditional: bool) -> None:
        super().__init__()
        self.dims = 2 * len(rotation.angles)
        self.traditional = traditional
        self.factor = rotation.factor
        self.long_from = rotation.long_from
        # an underscore keeps arrays out of a module's parameters
        self._freqs = _periods(rotation.angles)
        self._long = None if rotation.long is None else _periods(rotation.long)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate ``x``, (batch, heads, length, head size), whose first position is ``offset``."""
        if self.factor != 1.0:
            x = x.at[..., : self.dims].multiply(self.factor)
        freqs = self._freqs
        if self._long is not None:
            length = mx.max(mx.array(offset)) + x.shape[-2]
            freqs = mx.where(length > self.long_from, self._long, freqs)
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=freqs
        )


def _periods(angles: np.ndarray) -> mx.array:
    with np.errstate(divide="ignore"):
        return mx.array((1 / angles).astype(np.float32))  # infinite where nothing turns


def correct_rotations(model: Any, config: Any) -> tuple[list[str], list[str]]:
    """Give every layer of ``model`` the rotation that transformers' text ``config`` means.

    Returns:
        what was replaced, and what differs but is of a kind that is not replaced; texts for people, without repeats.
    """
    replaced, wrong = [], []
    for index, layer in enumerate(getattr(model, "layers", None) or ()):
        for attention, name, rope in _ropes(layer):
            actual, expected = rotation_of(rope), _expected(config, index, attention)
            if actual is None or expected is None or actual.same(expected):
                continue
            told = _difference(actual, expected)
            if _replaceable(rope, attention):
                setattr(attention, name, ConfiguredRoPE(expected, bool(getattr(rope, "traditional", False))))
                replaced.append(told)
            else:
                wrong.append(told)
    return list(dict.fromkeys(replaced)), list(dict.fromkeys(wrong))


def _ropes(layer: Any) -> Iterator[tuple[Any, str, Any]]:
    if not isinstance(layer, nn.Module):
        return
    for _, module in layer.named_modules():
        for name in NAMES:
            rope = module.get(name) if isinstance(module, dict) else None
            if isinstance(rope, nn.Module):
                yield module, name, rope


def _replaceable(rope: Any, attention: Any) -> bool:
    """Whether it is known which values of a head the embedding turns together, so that another can take its place."""
    if type(rope).__name__ == "SuScaledRoPE":  # always turns the two halves, whatever the model does elsewhere
        return "traditional=True" not in inspect.getsource(sys.modules[type(attention).__module__])
    return type(rope).__module__ in ("mlx_lm.models.rope_utils", "mlx.nn.layers.positional_encoding")


def rotation_of(rope: Any) -> Rotation | None:
    """What one of MLX's or mlx-lm's rotary embeddings does; None of a kind unknown."""
    kind = type(rope).__name__
    if kind == "RoPE":
        angles = float(rope.base) ** (-np.arange(0, rope.dims, 2) / rope.dims) * rope.scale
        return Rotation(angles)
    if kind == "DynamicNTKScalingRoPE":  # up to the model's length it turns as without a scaling
        return Rotation(float(rope.base) ** (-np.arange(0, rope.dims, 2) / rope.dims))
    freqs = getattr(rope, "_freqs", None)
    if freqs is None:
        return None
    angles = 1 / np.array(freqs.astype(mx.float32), dtype=np.float64)
    return Rotation(angles, float(getattr(rope, "mscale", getattr(rope, "_scale", 1.0)) or 1.0))


def _expected(config: Any, index: int, attention: Any) -> Rotation | None:
    table = getattr(config, "rope_parameters", None)
    if not isinstance(table, dict):
        return None
    if "rope_type" not in table and "rope_theta" not in table:
        kinds = getattr(config, "layer_types", None) or ()
        table = table.get(kinds[index]) if index < len(kinds) else None
        if not isinstance(table, dict):
            return None
    size = getattr(attention, "qk_rope_head_dim", None) or getattr(config, "qk_rope_head_dim", None)
    size = size or getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    size = size or config.hidden_size // config.num_attention_heads
    return rotation_meant(table, int(size), int(getattr(config, "max_position_embeddings", None) or 0))


def rotation_meant(table: Mapping[str, Any], size: int, longest: int) -> Rotation | None:
    """The rotation of heads of ``size`` that a table of ``rope_parameters`` means; None of a type unknown here.

    ``longest`` is the model's ``max_position_embeddings``.
    """
    kind = table.get("rope_type", table.get("type", "default"))
    theta, partial = table.get("rope_theta"), table.get("partial_rotary_factor") or 1.0
    if kind not in KINDS or theta is None:
        return None
    dims = size if kind == "proportional" else int(size * partial)
    plain = float(theta) ** (-np.arange(0, dims, 2) / dims)
    return KINDS[kind](plain, {**table, "theta": float(theta), "dims": dims, "longest": longest})


def _plain(angles: np.ndarray, table: Mapping[str, Any]) -> Rotation:
    return Rotation(angles)


def _linear(angles: np.ndarray, table: Mapping[str, Any]) -> Rotation:
    return Rotation(angles / table["factor"])


def _proportional(angles: np.ndarray, table: Mapping[str, Any]) -> Rotation:
    turning = int((table.get("partial_rotary_factor") or 1.0) * table["dims"] // 2)
    return Rotation(np.where(np.arange(len(angles)) < turning, angles, 0.0) / table.get("factor", 1.0))


def _llama3(angles: np.ndarray, table: Mapping[str, Any]) -> Rotation:
    factor, low, high = table["factor"], table["low_freq_factor"], table["high_freq_factor"]
    turns = table["original_max_position_embeddings"] * angles / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return Rotation((1 - blend) * angles / factor + blend * angles)


def _yarn(angles: np.ndarray, table: Mapping[str, Any]) -> Rotation:
    """YaRN (arXiv 2309.00071), as transformers' ``_compute_yarn_parameters``."""
    original = table.get("original_max_position_embeddings") or table["longest"]
    factor = table.get("factor") or table["longest"] / original
    dims, theta = table["dims"], table["theta"]

    def place(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(table.get("beta_fast") or 32), place(table.get("beta_slow") or 1)
    if table.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    attention_factor = table.get("attention_factor")
    if attention_factor is None:
        up, down = table.get("mscale"), table.get("mscale_all_dim")
        attention_factor = _mscale(factor, up) / _mscale(factor, down) if up and down else _mscale(factor, 1.0)
    return Rotation(angles / factor * ramp + angles * (1 - ramp), float(attention_factor))


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(angles: np.ndarray, table: Mapping[str, Any]) -> Rotation:
    original = table["original_max_position_embeddings"]
    factor = table.get("factor") or table["longest"] / original
    attention_factor = table.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (np.asarray(table[key], dtype=np.float64) for key in ("short_factor", "long_factor"))
    return Rotation(angles / short, float(attention_factor), angles / long, int(original))


KINDS = {
    "default": _plain,
    "mrope": _plain,  # the three sections turn alike in a text
    "dynamic": _plain,
    "linear": _linear,
    "proportional": _proportional,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _difference(actual: Rotation, expected: Rotation) -> str:
    if len(actual.angles) != len(expected.angles):
        return f"{2 * len(actual.angles)} dimensions of a head rotated, not {2 * len(expected.angles)}"
    if expected.long is not None:
        return "longrope's factors for long texts used for short ones too"
    return "other rotary frequencies"
