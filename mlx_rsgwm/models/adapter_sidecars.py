"""What is put beside the weights of an adapter that is saved already: importance and directions, with their manifest.

Several commands may do so at once; what one put there stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.core.folders import exclusive
from mlx_rsgwm.core.safetensors_io import require_space_for, write_safetensors
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.models.adapter import BESIDE_FILES, MANIFEST_FILE, WEIGHTS_FILE, Adapter, read_manifest, seal


def put_beside(
    adapter: Adapter,
    name: str,
    arrays: Mapping[str, mx.array],
    metadata: Mapping[str, str],
    base: Mapping[str, Any],
    entries: Mapping[str, Any],
) -> Path:
    """Write a file of arrays, ``name``, into the folder of a saved adapter, then the manifest with ``entries``.

    Weights and config are not touched. An adapter without a manifest gets one of kind ``imported`` with the description
    of its ``base``. Killed in between, the folder is what it was, at worst without the file's former version.
    """
    folder = adapter.own_folder
    if folder is None:
        raise AdapterError(
            f"{adapter.where} is not a folder that {name} could stand in; convert it first "
            "(rsgwm convert, rsgwm hub pull)"
        )
    require_space_for(folder, arrays)
    with exclusive(folder):
        before = _manifest_by_now(adapter, folder)
        digests = _digests_of_others(folder, before, name)
        if name in (before.get("files") or {}):
            files.write_json(folder / MANIFEST_FILE, {**before, "files": digests})
        write_safetensors(folder / name, dict(arrays), dict(metadata))
        described = {"kind": "imported", "base": base, "versions": versions(), **before, **entries}
        adapter.manifest = seal(folder, described, [name], digests)
    return folder


def _manifest_by_now(adapter: Adapter, folder: Path) -> dict[str, Any]:
    """The manifest in a folder that is locked now: another command may have put a file there since it was loaded."""
    if not files.is_present(path := folder / MANIFEST_FILE):
        return adapter.manifest
    manifest = read_manifest(path)
    loaded, now = ((each.get("files") or {}).get(WEIGHTS_FILE) for each in (adapter.manifest, manifest))
    if loaded not in (None, now):
        raise AdapterError(
            f"{folder} was written anew meanwhile; what was collected is of its former weights: run again"
        )
    return manifest


def _digests_of_others(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, str]:
    """SHA-256 of every file beside ``name``, recorded or taken now."""
    there = [other for other in (WEIGHTS_FILE, *BESIDE_FILES) if other != name and (folder / other).is_file()]
    recorded = {other: digest for other, digest in (manifest.get("files") or {}).items() if other != name}
    return recorded or {other: files.sha256_file(folder / other) for other in there}
