"""What an adapter loses in PEFT's format, kept in the folder ``mlx_rsgwm/`` inside the PEFT folder.

Importance, directions, prompt states, initialisation, manifest, and the exact spec (a scale may have no alpha that
divides back to it). PEFT never looks there. The sidecar counts only while PEFT's files are the ones it was written
with, so an adapter that was trained further in torch does not come back with stale importance or directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError, raise_problems
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.models.adapter import (
    BESIDE_FILES,
    CONFIG_FILE,
    DIRECTIONS_FILE,
    IMPORTANCE_FILE,
    INIT_FILE,
    KEPT_FILE,
    MANIFEST_FILE,
    PROMPT_STATES_FILE,
    Adapter,
    LoraSpec,
)

PEFT_CONFIG_FILE = "adapter_config.json"
CERTIFICATE_FILE = "parity.json"
SIDECAR_FOLDER = "mlx_rsgwm"
SIDECAR_FORMAT = "mlx-rsgwm/peft-sidecar"
ROW_HASHES = "row_hashes"  # data.row_hashes.KEY


@dataclass(frozen=True)
class Sidecar:
    """``joined``: blocks whose gate and up became one PEFT pair, with the projections it holds."""

    path: Path
    manifest: dict[str, Any]
    joined: dict[str, tuple[str, ...]]


def write_sidecar(
    adapter: Adapter,
    config: Mapping[str, Any],
    out: Path,
    weights_sha256: str,
    joined: Mapping[str, Sequence[str]],
) -> None:
    """Write what PEFT has no place for beside ``adapter_model.safetensors`` in ``out``, which must be there already."""
    folder = make_folder(out / SIDECAR_FOLDER)
    written = replace(adapter, kept={}).write_beside(folder)
    files.write_json(
        folder / MANIFEST_FILE,
        {
            "format": SIDECAR_FORMAT,
            "format_version": 1,
            "peft": {"config_sha256": files.sha256_json(config), "weights_sha256": weights_sha256},
            "files": {name: files.sha256_file(folder / name) for name in written},
            "joined": {block: list(names) for block, names in joined.items()},
            "adapter": adapter.manifest,
        },
    )


def read_sidecar(folder: Path, config: Mapping[str, Any], weights_sha256: Callable[[], str]) -> Sidecar | None:
    """The sidecar of a PEFT folder, or None when there is none or PEFT's files are no longer the ones it describes."""
    path = folder / SIDECAR_FOLDER
    if not (path / MANIFEST_FILE).is_file():
        return None
    manifest = files.read_json_object(path / MANIFEST_FILE)
    if manifest.get("format") != SIDECAR_FORMAT:
        raise AdapterError(f"{path / MANIFEST_FILE}: format is {manifest.get('format')!r}, not {SIDECAR_FORMAT!r}")
    if manifest.get("peft") != {"config_sha256": files.sha256_json(config), "weights_sha256": weights_sha256()}:
        return None
    listed = manifest.get("files")
    if not isinstance(listed, dict) or CONFIG_FILE not in listed:
        raise AdapterError(f"{path / MANIFEST_FILE} does not list {CONFIG_FILE}; remove {path} to convert without it")
    problems = []
    for name, expected in listed.items():
        if name not in BESIDE_FILES or name == KEPT_FILE:
            problems.append(f"unknown file {name!r} in its manifest")
        elif not (path / name).is_file():
            problems.append(f"{name} is missing")
        elif files.sha256_file(path / name) != expected:
            problems.append(f"{name} was changed or damaged after it was written (its SHA-256 differs)")
    raise_problems(str(path), problems, AdapterError)
    joined = manifest.get("joined") or {}
    return Sidecar(path, manifest, {block: tuple(names) for block, names in joined.items()})


def rows_of_changed(folder: Path, name: str) -> dict[str, Any] | None:
    """Hashes of the training rows that a sidecar which no longer counts records; None where it records none.

    Trained further in torch, an adapter has still seen these; ``name`` is said to have seen unknown ones besides.
    """
    path = folder / SIDECAR_FOLDER / MANIFEST_FILE
    manifest = files.read_json_object(path).get("adapter") if files.is_present(path) else None
    if not isinstance(manifest, Mapping):
        return None
    data = manifest.get("data")
    rows = manifest.get(ROW_HASHES) or (data.get(ROW_HASHES) if isinstance(data, Mapping) else None)
    if not isinstance(rows, Mapping):
        return None
    unknown = rows.get("unknown")
    return {**rows, "unknown": [*(unknown if isinstance(unknown, list) else []), name]}


def restore(adapter: Adapter, sidecar: Sidecar) -> Adapter:
    """``adapter`` with what the sidecar kept: exact spec, arrays beside the weights, and manifest."""
    path, listed = sidecar.path, sidecar.manifest["files"]
    importance, metadata = read_safetensors(path / IMPORTANCE_FILE) if IMPORTANCE_FILE in listed else ({}, {})
    directions, of_directions = read_safetensors(path / DIRECTIONS_FILE) if DIRECTIONS_FILE in listed else ({}, {})
    states, of_states = read_safetensors(path / PROMPT_STATES_FILE) if PROMPT_STATES_FILE in listed else ({}, {})
    init = read_safetensors(path / INIT_FILE)[0] if INIT_FILE in listed else {}
    spec = LoraSpec.from_config(files.read_json_object(path / CONFIG_FILE), str(path / CONFIG_FILE))
    return replace(
        adapter,
        spec=spec,
        importance=importance,
        importance_metadata=metadata,
        directions=directions,
        directions_metadata=of_directions,
        prompt_states=states,
        prompt_states_metadata=of_states,
        init=init,
        manifest=dict(sidecar.manifest.get("adapter") or {}),
    )
