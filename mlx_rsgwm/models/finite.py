"""Which arrays hold a value that is not finite: by the bits, a few arrays at a time, whatever their float type; and
which magnitudes of DoRA are all zero, which would switch their layers off."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

# Arrays whose values are checked in one evaluation.
CHECKED_TOGETHER = 16
# The exponent of what is not finite: all ones, in an unsigned integer of the type's width.
EXPONENT_BITS = {
    mx.float32: (mx.uint32, 0x7F800000),
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
}


def not_finite(arrays: dict[str, mx.array], drop: bool = False) -> list[str]:
    """Names of the arrays with a value that is not finite.

    With ``drop`` an array leaves the mapping once it is checked, so that lazy ones need the memory of a few of them.
    """
    broken: list[str] = []
    everything = list(arrays)
    for start in range(0, len(everything), CHECKED_TOGETHER):
        names = everything[start : start + CHECKED_TOGETHER]
        bad: Any = mx.stack([_has_infinite(arrays[name]) for name in names]).tolist()
        broken += [name for name, flag in zip(names, bad, strict=True) if flag]
        for name in names if drop else ():
            del arrays[name]
    return broken


def all_zero_magnitudes(weights: dict[str, mx.array]) -> list[str]:
    """What is wrong with DoRA's magnitudes: the norm of no layer's weight is zero throughout."""
    magnitudes = {name: value for name, value in weights.items() if name.endswith(".m")}
    return [
        f"{name} is zero throughout, which would switch the layer off"
        for name, value in magnitudes.items()
        if not mx.any(value != 0).item()
    ]


def _has_infinite(array: mx.array) -> mx.array:
    """Whether any value is infinite or not a number, a bool scalar; by the bits, for isfinite is slow on the CPU."""
    if array.dtype not in EXPONENT_BITS or not array.size:
        return mx.logical_not(mx.isfinite(array).all())
    kind, ones = EXPONENT_BITS[array.dtype]
    exponents = mx.array(ones, dtype=kind)
    return (array.view(kind) & exponents).max() == exponents
