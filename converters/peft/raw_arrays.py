"""A second reader of safetensors, which shares no code with the one it checks: bytes of a mapped file, in NumPy."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_rsgwm.core.dtypes import FLOATS
from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.core.files import open_regular

FORMS = {row.code: row.bits for row in FLOATS.values()}


@dataclass(frozen=True)
class RawArray:
    """An array as it is stored: ``bits`` has its shape, as integers of its width where NumPy lacks the type."""

    dtype: str
    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.bits.shape)

    def values(self) -> np.ndarray:
        """The values in float64, exactly, of the same shape."""
        if self.dtype == "BF16":
            return (self.bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self.bits.astype(np.float64)

    def same_bits(self, other: RawArray) -> bool:
        """Whether dtype, shape and bytes are the same."""
        if self.dtype != other.dtype or self.shape != other.shape:
            return False
        width = np.uint32 if self.dtype == "F32" else np.uint16
        return np.array_equal(np.ascontiguousarray(self.bits).view(width), np.ascontiguousarray(other.bits).view(width))

    def take(self, bits: np.ndarray) -> RawArray:
        """Part of this array's ``bits``, or a view of them."""
        return RawArray(self.dtype, bits)


def read_raw(path: Path) -> dict[str, RawArray]:
    """Every array of a safetensors file by name, mapped and not read.

    Raises:
        AdapterError: the file is damaged, or holds a type other than float32, float16 and bfloat16.
    """
    try:
        # The library checks header, offsets and length.
        with open_regular(path) as file, safe_open(str(path), framework="np"):
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a sound safetensors file: {str(error).splitlines()[0]}") from error
    data = np.memmap(path, dtype=np.uint8, mode="r")
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in FORMS:
            raise AdapterError(f"{path}: {name} is {entry['dtype']}; only float32, float16 and bfloat16 are compared")
        start, end = entry["data_offsets"]
        values = data[8 + length + start : 8 + length + end].view(FORMS[entry["dtype"]])
        arrays[name] = RawArray(entry["dtype"], values.reshape(entry["shape"]))
    return arrays
