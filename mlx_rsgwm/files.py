"""Reading and writing files safely: atomic renames, checked safetensors, hashes, room on disk.

Every file this project writes goes through here, so that a crash leaves either the old file or the new one and
never half of one. Only safetensors is read as array data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_rsgwm.errors import RsgwmError

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def replace_file(path: Path, temporary: Path) -> None:
    """Flush ``temporary`` to disk, then rename it to ``path`` in one step."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def temporary_for(path: Path) -> Path:
    """Name of the temporary file beside ``path``: the same folder, so that the rename stays on one file system.

    The suffix is kept, since ``mx.save_safetensors`` appends its own to names without it.
    """
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    temporary = temporary_for(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        replace_file(path, temporary)
    except OSError as error:
        raise RsgwmError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sorted by insertion, two-space indent, NaN refused (it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a :class:`RsgwmError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RsgwmError(f"{path} does not exist") from None
    except OSError as error:
        raise RsgwmError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RsgwmError(f"{path} is not valid JSON: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level must be an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RsgwmError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_safetensors(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays atomically as safetensors, with string metadata (``format: mlx`` is always there)."""
    temporary = temporary_for(path)
    try:
        mx.save_safetensors(str(temporary), dict(arrays), {"format": "mlx", **(metadata or {})})
        replace_file(path, temporary)
    except (OSError, RuntimeError) as error:
        raise RsgwmError(f"cannot write {path}: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_safetensors(path: Path, evaluate: bool = True) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a safetensors file into arrays and its metadata; with ``evaluate=False`` an array's values are read when
    they are first used.

    The header is validated by the safetensors library first (sizes, offsets, dtypes, truncation), so that MLX only
    ever maps a sound file. Pickle-based formats are refused by name.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise RsgwmError(f"{path} is a pickle file, which can run code when loaded; only .safetensors is read")
    if not path.is_file():
        raise RsgwmError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = dict(file.metadata() or {})
        arrays = mx.load(str(path), format="safetensors")
        if evaluate:
            mx.eval(arrays)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RsgwmError(f"{path} is not a sound safetensors file: {reason}") from error
    assert isinstance(arrays, dict)
    return arrays, metadata


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start writing ``needed`` bytes below ``folder`` when the file system has not that much room."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RsgwmError(
            f"not enough disk space for {folder}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            "free some space or choose another folder"
        )


def make_folder(path: Path) -> Path:
    """Create ``path`` with its parents; a file in the way or a read-only place is a clear error."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RsgwmError(f"cannot create folder {path}: {error.strerror or error}") from error
    return path
