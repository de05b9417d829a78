"""Formats of few bits, and the values that a weight has once it has gone into one and come back.

``affine``, ``mxfp4``, ``mxfp8`` and ``nvfp4`` are MLX's own, by its own functions: groups of columns of a row share a
scale, and ``affine`` ones an offset. ``symmetric`` is the one scale a row that papers on training through rounding use
(Quantization vectors, arXiv 2604.03420); MLX stores none such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError

SYMMETRIC = "symmetric"
# Modes and their usual groups, which are MLX's; 0: a whole row.
GROUPS = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16, SYMMETRIC: 0}
SYMMETRIC_BITS = range(2, 9)
AFFINE_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix is stored: ``bits`` a value, groups of ``group_size`` columns (0: the mode's usual ones), ``mode``.

    Raises:
        RsgwmError: a mode that is unknown, or bits or groups that the installed MLX has not for it.
    """

    bits: int
    group_size: int = 0
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in GROUPS:
            raise RsgwmError(f"quantisation: mode {self.mode!r} is unknown; there are {', '.join(GROUPS)}")
        if not self.group_size:
            object.__setattr__(self, "group_size", GROUPS[self.mode])
        if self.mode == SYMMETRIC:
            if self.group_size or self.bits not in SYMMETRIC_BITS:
                raise RsgwmError(f"quantisation: {self} is none; symmetric takes 2 to 8 bits and no groups")
            return
        try:
            mx.quantize(mx.zeros((1, 4 * max(self.group_size, 1))), self.group_size, self.bits, mode=self.mode)
        except (ValueError, TypeError) as error:
            said = re.sub(r"^\[quantize\] ", "", str(error).splitlines()[0]).rstrip(".")
            reason = said if isinstance(error, ValueError) else "bits and groups are small whole numbers"
            raise RsgwmError(f"quantisation: MLX has no {self}: {reason}") from None

    def __str__(self) -> str:
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{self.bits} bits{groups}" + ("" if self.mode == "affine" else f" ({self.mode})")

    @classmethod
    def parse(cls, text: str) -> QuantFormat:
        """``BITS[,group,mode]``, the last two in either order: ``4``, ``3,32``, ``3,symmetric``, ``4,32,mxfp4``.

        Raises RsgwmError where it is none.
        """
        first, *rest = [part.strip() for part in text.split(",")]
        numbers = [part for part in rest if re.fullmatch(r"[0-9]{1,6}", part)]
        modes = [part for part in rest if part not in numbers]
        if not re.fullmatch(r"[0-9]{1,6}", first) or len(numbers) > 1 or len(modes) > 1 or "" in modes:
            raise RsgwmError(f"{text[:40]!r} is not BITS[,group,mode], such as 4 or 3,32 or 3,symmetric")
        return cls(int(first), int(numbers[0]) if numbers else 0, modes[0] if modes else "affine")

    def fits(self, columns: int) -> bool:
        """Whether rows of ``columns`` values can be cut into groups."""
        return not self.group_size or columns % self.group_size == 0

    def round_trip(self, weight: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The float32 values that ``weight`` (…, out, in) becomes, its scales being kept in ``dtype``.

        Of a float32 weight and scales these are the bits of ``mx.dequantize(*mx.quantize(weight))``.
        """
        if self.mode == SYMMETRIC:
            return self._symmetric(weight.astype(mx.float32), dtype)
        packed, scales, *rest = mx.quantize(weight, self.group_size, self.bits, mode=self.mode)
        biases = None
        if rest:  # scales of the other modes are bytes
            scales, biases = (part.astype(dtype).astype(mx.float32) for part in (scales, rest[0]))
        dense: mx.array = mx.dequantize(
            packed, scales, biases, group_size=self.group_size, bits=self.bits, mode=self.mode, dtype=mx.float32
        )
        return dense

    def _symmetric(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """scale = max |row| / (2^(b−1) − 1); values rounded to its multiples −2^(b−1) … 2^(b−1) − 1."""
        top = 2 ** (self.bits - 1) - 1
        scale = (mx.abs(weight).max(axis=-1, keepdims=True) / top).astype(dtype).astype(mx.float32)
        steps = mx.clip(mx.round(weight / mx.where(scale == 0, 1.0, scale)), -top - 1, top)
        return steps * scale


def require_fit(quant: QuantFormat, widths: Mapping[str, int]) -> None:
    """Raise where rows of the layers of ``widths`` (columns by name) cannot be cut into the format's groups.

    Raises:
        RsgwmError: naming a layer, and the groups that would fit all of them.
    """
    uneven = {name: columns for name, columns in widths.items() if not quant.fits(columns)}
    if not uneven:
        return
    name, columns = next(iter(uneven.items()))
    more = f", and of {len(uneven) - 1} more layers" if len(uneven) > 1 else ""
    sizes = {f"{quant.bits},{size}": size for size in AFFINE_GROUPS} | {"4,mxfp4": 32, "4,nvfp4": 16}
    fitting = [text for text, size in sizes.items() if not any(width % size for width in widths.values())]
    remedy = f"take {' or '.join(fitting)}" if fitting else "none of MLX's does"
    raise RsgwmError(f"{quant}: the group does not divide the {columns} columns of {name}{more}; {remedy}")
