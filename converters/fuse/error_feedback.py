"""Rounding by error feedback (GPTQ): each column takes up what the columns before it lost, weighed by the inputs.

Frantar, Ashkboos, Hoefler, Alistarh, 2022 (arXiv 2210.17323): with H the second moment of a layer's inputs, rounding
aims at a small tr((W − Ŵ) H (W − Ŵ)ᵀ) instead of a small W − Ŵ. Formats are MLX's affine ones: a group's scale and
offset are those of its values when its turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.gram import float64
from mlx_rsgwm.models.quantisation import QuantFormat

DAMPING = 0.01  # of the mean of H's diagonal, added to it


@dataclass(frozen=True)
class Packed:
    """A weight (out, in) in an affine format: ``codes`` (out, in) uint8, ``scales`` and ``biases`` (out, groups)."""

    codes: np.ndarray
    scales: mx.array
    biases: mx.array
    quant: QuantFormat

    def weight(self) -> mx.array:
        """The codes as MLX packs them: (out, in · bits / 32) uint32, the first value in the lowest bits."""
        bits = np.unpackbits(self.codes[..., None], axis=-1, bitorder="little")[..., : self.quant.bits]
        packed = np.packbits(bits.reshape(len(self.codes), -1), axis=-1, bitorder="little")
        return mx.array(packed.view("<u4"))

    def dense(self) -> mx.array:
        """The float32 values that are stored."""
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.weight(), scales, biases, self.quant.group_size, self.quant.bits)


def round_by_feedback(weight: mx.array, gram: np.ndarray, quant: QuantFormat, dtype: mx.Dtype = mx.float32) -> Packed:
    """``weight`` (out, in) float32 in the format ``quant``, its scales in ``dtype``.

    ``gram``: H, the second moment of the inputs (in, in), float64.

    Raises:
        RsgwmError: the format is not affine, its groups do not divide the columns, or H is of other inputs.
    """
    if quant.mode != "affine" or not quant.fits(weight.shape[1]):
        raise RsgwmError(f"error feedback takes an affine format whose groups divide the columns, found {quant}")
    if gram.shape != (weight.shape[1],) * 2:
        raise RsgwmError(
            f"directions of {len(gram)} inputs are none of a weight with {weight.shape[1]}; collect them anew"
        )
    left = float64(weight.astype(mx.float32)).copy()
    upper = _upper_inverse(gram)
    codes = np.zeros(left.shape, np.uint8)
    scales, biases = [], []
    for start in range(0, left.shape[1], quant.group_size):
        group = slice(start, start + quant.group_size)
        _, scale, bias = mx.quantize(mx.array(left[:, group].astype(np.float32)), quant.group_size, quant.bits)
        scales.append(scale.astype(dtype))
        biases.append(bias.astype(dtype))
        steps, offset = (float64(part[-1].astype(mx.float32))[:, 0] for part in (scales, biases))
        errors = np.zeros((len(left), quant.group_size))
        for place, column in enumerate(range(group.start, group.stop)):
            values = left[:, column]
            code = np.clip(np.rint((values - offset) / np.where(steps == 0, 1.0, steps)), 0, 2**quant.bits - 1)
            codes[:, column] = code
            errors[:, place] = (values - (code * steps + offset)) / upper[column, column]
            left[:, column + 1 : group.stop] -= np.outer(errors[:, place], upper[column, column + 1 : group.stop])
        left[:, group.stop :] -= errors @ upper[group, group.stop :]
    return Packed(codes, mx.concatenate(scales, axis=1), mx.concatenate(biases, axis=1), quant)


def _upper_inverse(gram: np.ndarray) -> np.ndarray:
    """U, upper triangular, with UᵀU = (H + damping)⁻¹; inputs that are never met count as if they were rare."""
    damped = gram + np.eye(len(gram)) * max(DAMPING * float(np.diagonal(gram).mean()), 1e-30)
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T)
