"""Quantised GGUF tensors in MLX's own form, value for value.

Q4_0, Q4_1 and Q8_0 are a scale, or a scale and a minimum, for every 32 neighbours of a row: MLX's affine quantisation
of group size 32, w = scale · q + bias with q ≥ 0. The integers are packed in another order, and what is signed in GGUF
moves into the bias: −8 d for Q4_0, −128 d for Q8_0, both exact in float16. (``mx.load`` reads such files too, but not
the query and key rows of Llama, and it crashes on damaged ones.)
"""

from __future__ import annotations

import numpy as np

from mlx_rsgwm.converters.gguf.file import GgufFile
from mlx_rsgwm.core.errors import RsgwmError

GROUP = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


def packed_bits(gguf: GgufFile, name: str) -> int | None:
    """Bits of an integer of a matrix that MLX can compute with as it is; None for every other tensor."""
    tensor = gguf.tensors[name]
    return BITS.get(tensor.kind) if len(tensor.shape) == 2 else None


def read_packed(gguf: GgufFile, name: str, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows ``start:stop`` of such a matrix (rows, columns) as MLX holds them.

    ``weight`` uint32 (rows, columns · bits / 32), ``scales`` and ``biases`` float16 (rows, columns / 32).

    Raises:
        RsgwmError: scales that are not finite, or whose bias float16 cannot hold: the file is damaged.
    """
    tensor = gguf.tensors[name]
    rows = min(stop, tensor.rows) - start
    groups = tensor.shape[-1] // GROUP
    blocks = gguf.packed(name, start, start + rows).reshape(rows, groups, -1)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    with np.errstate(over="ignore", invalid="ignore"):
        if tensor.kind == "Q8_0":
            codes = blocks[..., 2:] ^ 0x80  # two's complement plus 128
            biases = scales * np.float16(-128)
        else:
            head = 2 if tensor.kind == "Q4_0" else 4
            pairs = blocks[..., head:]
            values = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
            codes = values[..., 0::2] | values[..., 1::2] << 4
            biases = (
                scales * np.float16(-8) if head == 2 else np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0]
            )
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise RsgwmError(f"{gguf.path}: tensor {name} has values that are not finite; the file is damaged")
    words = np.ascontiguousarray(codes.reshape(rows, -1)).view("<u4")
    return {"weight": words, "scales": scales.astype("<f2"), "biases": biases.astype("<f2")}
