"""A strict reader of the GGUF container: metadata, tensor table, and rows of a tensor as float32.

Every count, length and offset is checked against the file's size before it is used, so that a truncated or malicious
file is one readable error; ``mx.load`` and ``gguf.GGUFReader`` abort or loop on some of them. The layout follows
docs/gguf.md of ggml (versions 2 and 3, little endian). NumPy dequantises (package ``gguf``), so the same file gives
the same bits on every machine.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
# Types whose dequantisation package gguf implements and transformers reads too.
READABLE = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


class MalformedGguf(RsgwmError):
    """The bytes are not a GGUF file of a version this project reads."""


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table: ``shape`` is row-major (rows, columns), ``start`` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Rows of the matrix, leading axes counted together."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header has been checked; ``stamp`` tells whether it is still the same file.

    Its bytes are read and not mapped: a mapped file that somebody cuts ends the process.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    stamp: tuple[int, ...]

    def unreadable(self) -> list[str]:
        """``name (type)`` of every tensor whose type cannot be dequantised here."""
        return [f"{tensor.name} ({tensor.kind})" for tensor in self.tensors.values() if tensor.kind not in READABLE]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start:stop`` of a tensor as float32 (rows, columns); a vector is one row."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        stop = tensor.rows if stop is None else min(stop, tensor.rows)
        packed = self.packed(name, start, stop)
        with np.errstate(all="ignore"):  # the caller looks for values that are not finite
            values = dequantize(packed, GGMLQuantizationType[tensor.kind])
        return np.ascontiguousarray(values, dtype="<f4").reshape(stop - start, tensor.shape[-1])

    def packed(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` as they are stored: bytes (rows, ``row_bytes``).

        Raises:
            RsgwmError: the file changed since it was opened, or cannot be read.
        """
        tensor = self.tensors[name]
        size = (stop - start) * tensor.row_bytes
        try:
            with open_regular(self.path) as file:
                same = _stamp(file) == self.stamp
                file.seek(tensor.start + start * tensor.row_bytes)
                packed_rows = np.fromfile(file, dtype=np.uint8, count=size)
                same = same and _stamp(file) == self.stamp
        except OSError as error:
            raise RsgwmError(f"cannot read {self.path}: {error.strerror or error}") from error
        if not same or packed_rows.size != size:
            raise RsgwmError(f"{self.path} changed while it was read; start again once nothing writes to it")
        return packed_rows.reshape(stop - start, tensor.row_bytes)


def open_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file; no tensor data is touched.

    Raises:
        RsgwmError: the file does not exist, is not GGUF version 2 or 3, is truncated, or contradicts itself.
    """
    try:
        with open_regular(path) as file:
            stamp = _stamp(file)
            metadata, tensors = _parse(_Cursor(file))
    except OSError as error:
        raise RsgwmError(f"cannot read {path}: {error.strerror or error}") from error
    except (MalformedGguf, UnicodeDecodeError) as error:
        reason = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise RsgwmError(f"{path} is not a sound GGUF file: {reason}; fetch it again") from None
    return GgufFile(path, metadata, tensors, stamp)


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    """What changes when somebody replaces the file or writes to it."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if cursor.size < 4 or cursor.take(4) != MAGIC:
        raise MalformedGguf("it does not begin with the bytes GGUF")
    version = cursor.number("<I")
    if version not in VERSIONS:
        swapped = version & 0xFFFF == 0
        raise MalformedGguf("big-endian files are not read" if swapped else f"version {version} is not 2 or 3")
    tensor_count, metadata_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.text()
        if key in metadata:
            raise MalformedGguf(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    entries = [_read_entry(cursor) for _ in range(_bounded(tensor_count, cursor.size))]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise MalformedGguf(f"general.alignment is {alignment!r}, not a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise MalformedGguf(f"tensor {name} appears twice")
        tensors[name] = _place(name, shape, kind, data_start + offset, cursor.size)
    return metadata, tensors


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= 4:
        raise MalformedGguf(f"tensor {name!r} has {dimensions} dimensions")
    # ggml lists the fastest-moving dimension first.
    shape = tuple(reversed([cursor.number("<Q") for _ in range(dimensions)]))
    return name, shape, cursor.number("<I"), cursor.number("<Q")


def _place(name: str, shape: tuple[int, ...], kind: int, start: int, size: int) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind_name = GGMLQuantizationType(kind).name
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return Tensor(name, shape, f"type {kind}", start, 0)
    if min(shape) < 1 or shape[-1] % block:
        raise MalformedGguf(f"tensor {name} of type {kind_name} has shape {shape}")
    tensor = Tensor(name, shape, kind_name, start, shape[-1] // block * block_bytes)
    end = start + tensor.rows * tensor.row_bytes
    if end > size:
        raise MalformedGguf(f"it is truncated: tensor {name} ends at byte {end}, the file at {size}")
    return tensor


def _bounded(count: int, size: int) -> int:
    """A count of things that take at least one byte each cannot exceed the file's size."""
    if count > size:
        raise MalformedGguf(f"it announces {count} entries in {size} bytes")
    return count


class _Cursor:
    """A position in the header that refuses to move past the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0

    def take(self, length: int) -> bytes:
        end = self.position + length
        taken = b"" if end > self.size else self.file.read(length)
        if len(taken) < length:
            raise MalformedGguf("it is truncated inside the header")
        self.position = end
        return taken

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """One metadata value: a number, a string, a list of strings, or an array of numbers."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            element, count = self.number("<I"), self.number("<Q")
            if element == STRING:
                return [self.text() for _ in range(_bounded(count, self.size))]
            return self._numbers(element, count)
        return self._numbers(kind, 1)[0].item()

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            raise MalformedGguf(f"a metadata value has the unknown type {kind}")
        form = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(form.itemsize * count), dtype=form)
