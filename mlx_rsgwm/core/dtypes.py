"""The one table of array types: as users, MLX, NumPy and torch name them, and as safetensors and GGUF do.

Three floating types are trained, merged, converted and compared; whole numbers are only stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Dtype:
    """A type of MLX arrays.

    ``code`` is safetensors' and GGUF's name; ``bits`` the NumPy type that a file's bytes are viewed as, an integer's
    for bfloat16, which NumPy lacks.
    """

    name: str
    mlx: mx.Dtype
    code: str
    bits: str

    @property
    def size(self) -> int:
        """Bytes of a value."""
        return int(self.mlx.size)

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next greater number of a floating type."""
        return float(mx.finfo(self.mlx).eps)


TABLE = (
    Dtype("float32", mx.float32, "F32", "<f4"),
    Dtype("float16", mx.float16, "F16", "<f2"),
    Dtype("bfloat16", mx.bfloat16, "BF16", "<u2"),
    Dtype("int64", mx.int64, "I64", "<i8"),
    Dtype("int32", mx.int32, "I32", "<i4"),
    Dtype("int16", mx.int16, "I16", "<i2"),
    Dtype("int8", mx.int8, "I8", "|i1"),
    Dtype("uint64", mx.uint64, "U64", "<u8"),
    Dtype("uint32", mx.uint32, "U32", "<u4"),
    Dtype("uint16", mx.uint16, "U16", "<u2"),
    Dtype("uint8", mx.uint8, "U8", "|u1"),
)
BY_CODE = {row.code: row for row in TABLE}
CODES = {row.mlx: row.code for row in TABLE}
FLOATS = {row.name: row for row in TABLE if mx.issubdtype(row.mlx, mx.floating)}
# What a user may ask for by name, and the reverse.
DTYPES = {name: row.mlx for name, row in FLOATS.items()}
NAMES = {row.mlx: name for name, row in FLOATS.items()}
UNSIGNED = {row.size: row.mlx for row in TABLE if row.name.startswith("uint")}  # to compare and write bits, by width


def name_of(dtype: mx.Dtype) -> str:
    """The name of any type of MLX: ``float32``, ``bool_``."""
    return str(dtype).rpartition(".")[2]
