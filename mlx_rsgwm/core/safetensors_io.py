"""Arrays in safetensors files, the only form that array data is read in: pickles can run code when they are loaded.

A header is checked by the safetensors library (sizes, offsets, dtypes, truncation) before MLX maps the file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import require_space

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
BESIDE_ARRAYS = 2**20  # bytes that headers, configuration and manifest take at most


class Header(NamedTuple):
    """What a file says before its values: per array dtype, shape and ``data_offsets``, which count from ``start``."""

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int


def require_space_for(folder: Path, *groups: Mapping[str, mx.array]) -> None:
    """Refuse to start writing a folder of these arrays where the file system has not that much room."""
    require_space(folder, sum(value.nbytes for group in groups for value in group.values()) + BESIDE_ARRAYS)


def read_safetensors(path: Path, evaluate: bool = True) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a safetensors file into arrays and its metadata; with ``evaluate=False`` an array's values are read when
    they are first used.

    Raises:
        RsgwmError: a pickle, by its name; no regular file; not a sound safetensors file.
    """
    metadata = read_header(path).metadata
    try:
        arrays = mx.load(name_for_mlx(path), format="safetensors")
        if evaluate:
            mx.eval(arrays)
    except (RuntimeError, OSError, ValueError) as error:
        raise _unsound(path, error) from error
    assert isinstance(arrays, dict)
    return arrays, metadata


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file; no value is read."""
    if path.suffix in PICKLE_SUFFIXES:
        raise RsgwmError(f"{path} is a pickle file, which can run code when loaded; only .safetensors is read")
    try:
        with files.open_regular(path) as file, safe_open(str(path), framework="np"):
            (length,) = struct.unpack("<Q", file.read(8))
            entries = files.parse_json(file.read(length).decode("utf-8"))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise _unsound(path, error) from error
    return Header(entries, entries.pop("__metadata__", None) or {}, 8 + length)


def _unsound(path: Path, error: Exception) -> RsgwmError:
    if isinstance(error, OSError):  # it was opened a moment ago: nothing is known of what is in it
        why = error.strerror or "it went away meanwhile, or too many files are open (ulimit -n)"
        return RsgwmError(f"cannot read {path}: {why}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    return RsgwmError(f"{path} is not a sound safetensors file: {reason}")


def write_safetensors(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays atomically as safetensors, with string metadata (``format: mlx`` is always there).

    The same arrays make the same bytes, in whatever order they come: MLX lays them out as a hash table gives them back.
    """
    in_order, text = dict(sorted(arrays.items())), {"format": "mlx", **(metadata or {})}
    with files.new_file(path) as temporary:
        try:
            mx.save_safetensors(name_for_mlx(temporary), in_order, text)
        except RuntimeError as error:
            raise RsgwmError(f"cannot write {path}: {error}") from error
        read_header(temporary)  # which a file that a full disk has cut does not survive


def name_for_mlx(path: Path) -> str:
    """``path`` as MLX takes names.

    Raises:
        RsgwmError: bytes in it are no UTF-8, of which MLX makes an error of its own.
    """
    name = str(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise RsgwmError(f"{name!a}: MLX opens files by names in UTF-8 only; rename what is not") from None
    return name
