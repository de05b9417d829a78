"""Arrays written to safetensors one at a time, so that an adapter of any size needs memory for one of its arrays.

The arrays are lazy: reading, transposing and stacking happen when an array's turn comes, and it is dropped after.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.dtypes import CODES, UNSIGNED
from mlx_rsgwm.core.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.core.folders import new_folder
from mlx_rsgwm.core.safetensors_io import require_space_for
from mlx_rsgwm.models.adapter import WEIGHTS_FILE, Adapter, seal
from mlx_rsgwm.models.finite import EXPONENT_BITS

# Small arrays are evaluated together: one by one, their number would cost more than their bytes.
BATCH_BYTES = 1 << 22


def write_arrays(path: Path, arrays: dict[str, mx.array], metadata: Mapping[str, str]) -> str:
    """Write ``arrays`` to a safetensors file, emptying the mapping on the way; returns the file's SHA-256.

    The file is written under a temporary name and renamed, so nothing is left of a failed one.

    Raises:
        AdapterError: naming the arrays with values that are not finite.
        RsgwmError: the file cannot be written, or an array read.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(arrays, key=lambda name: -arrays[name].itemsize):  # stable: wide ones first stay aligned
        value = arrays[name]
        start, end = end, end + value.nbytes
        header[name] = {"dtype": CODES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    infinite = []
    names = [name for name in header if name != "__metadata__"]
    with files.new_file(path) as temporary, _readable(path):
        with open(temporary, "wb") as file:
            for head in (struct.pack("<Q", len(text)), text):
                digest.update(head)
                file.write(head)
            with ThreadPoolExecutor(1) as reader:  # on another core: hashing takes longer than the rest
                reading: list[Future[list[str]]] = []
                for batch in _batches(arrays, names):
                    data = {name: _bytes(bits) for name, (_, bits) in batch.items()}
                    dtypes = {name: dtype for name, (dtype, _) in batch.items()}
                    reading.append(reader.submit(_hashed, digest, data, dtypes))
                    for part in data.values():
                        file.write(part)
                    if len(reading) > 1:  # two batches in memory, no more
                        infinite += reading.pop(0).result()
                for job in reading:
                    infinite += job.result()
        raise_problems(str(path), [f"{name} has values that are not finite" for name in infinite], AdapterError)
    return digest.hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What MLX raises when lazy arrays cannot be read, as an error about the file ``path`` that is written of them."""
    try:
        yield
    except RuntimeError as error:
        raise RsgwmError(f"cannot write {path}: {error}") from error


def _batches(arrays: dict[str, mx.array], names: list[str]) -> Iterator[dict[str, tuple[mx.Dtype, mx.array]]]:
    """The arrays in the order of ``names``, dtype and bits, evaluated a batch at a time; both are consumed."""
    while names:
        batch: dict[str, tuple[mx.Dtype, mx.array]] = {}
        size = 0
        while names and size < BATCH_BYTES:
            name = names.pop(0)
            value = arrays.pop(name)
            batch[name] = value.dtype, mx.contiguous(value).view(UNSIGNED[value.itemsize])
            size += value.nbytes
        mx.eval([bits for _, bits in batch.values()])
        yield batch


def _hashed(digest: Any, data: Mapping[str, memoryview], dtypes: Mapping[str, mx.Dtype]) -> list[str]:
    """Add the bytes to ``digest``; the names of those with values that are not finite."""
    infinite = []
    for name, part in data.items():
        digest.update(part)
        if not _all_finite(part, dtypes[name]):
            infinite.append(name)
    return infinite


def _all_finite(data: memoryview, dtype: mx.Dtype) -> bool:
    """Whether no value is infinite or not a number."""
    if not data:
        return True
    if dtype not in EXPONENT_BITS:
        return True
    if dtype == mx.float32:
        values = np.frombuffer(data, np.float32)
        with np.errstate(invalid="ignore"):
            return bool(np.isfinite(values.min()) and np.isfinite(values.max()))  # both are NaN if any value is
    # NumPy has no bfloat16 and is slow in float16.
    _, ones = EXPONENT_BITS[dtype]
    return int((np.frombuffer(data, np.uint16) & ones).max()) < ones


def _bytes(bits: mx.array) -> memoryview:
    """The bytes of an evaluated array of integers in row-major order, without a copy where it is laid out so."""
    flat: Any = np.ascontiguousarray(np.array(bits, copy=False))
    return memoryview(flat).cast("B") if flat.size else memoryview(b"")


def save_adapter(adapter: Adapter, out: Path, others: Sequence[Path] = ()) -> None:
    """``Adapter.save`` for an adapter whose weights are lazy, one array in memory at a time; they are consumed.

    ``others``: files that are copied beside them.

    Raises:
        AdapterError: wrong names or shapes, values that are not finite; nothing is left behind then.
        RsgwmError: no room, or ``out`` cannot be written, or is a folder that is not empty.
    """
    raise_problems(adapter.where, adapter.shape_problems(), AdapterError)
    require_space_for(out, *adapter.array_groups())
    with new_folder(out) as work:
        arrays = {**adapter.weights, **adapter.full}
        adapter.weights.clear()
        adapter.full.clear()
        digest = write_arrays(work / WEIGHTS_FILE, arrays, {"format": "mlx"})
        written = adapter.write_beside(work)
        for file in others:
            shutil.copyfile(file, work / file.name)
            written.append(file.name)
        seal(work, adapter.manifest, written, {WEIGHTS_FILE: digest})
