"""Snapshots of a young run: the adapter as it is after 1, 2 and 5 % of the steps, and where the gradient points.

Predicting how well adapters merge needs both long before a run is over. Each is an adapter folder itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.safetensors_io import write_safetensors
from mlx_rsgwm.models.adapter import MANIFEST_FILE, WEIGHTS_FILE, Adapter, seal

FOLDER = "snapshots"
GRADIENT_FILE = "gradient.safetensors"
KIND = "snapshot"


def snapshot_steps(shares: Sequence[float], total: int) -> dict[int, list[float]]:
    """Step (1-based) → the shares of a run of ``total`` steps that end with it; at least one step each."""
    steps: dict[int, list[float]] = {}
    for share in sorted(shares):
        # Rounded before the ceiling: 0.05 · 20 must be 1 whatever its last bit.
        steps.setdefault(max(1, math.ceil(round(share * total, 9))), []).append(share)
    return steps


def write_snapshot(
    folder: Path, adapter: Adapter, gradient_sum: Mapping[str, mx.array], record: Mapping[str, Any]
) -> Path:
    """Write ``snapshots/step-NNNNNN/`` below the adapter folder, manifest last.

    ``adapter`` is what a finished run would give now. ``gradient.safetensors`` is the mean, float32, over the run's
    steps so far of the gradient before clipping and weight decay. ``record``: the ``step``, the ``shares`` of the run
    that end with it, and the loss; it is in the manifest.
    """
    step = int(record["step"])
    target = make_folder(folder / FOLDER / f"step-{step:06d}")
    (target / MANIFEST_FILE).unlink(missing_ok=True)
    gradient = {name: (gradient_sum[name] / step).astype(mx.float32) for name in adapter.weights}
    write_safetensors(target / WEIGHTS_FILE, adapter.weights)
    write_safetensors(target / GRADIENT_FILE, gradient)
    written = [WEIGHTS_FILE, GRADIENT_FILE, *adapter.write_beside(target)]
    seal(target, {**adapter.manifest, "kind": KIND, **record}, written)
    return target


def snapshot_folders(folder: Path) -> dict[float, Path]:
    """Share of the run → the snapshot of it below an adapter folder, whole ones alone."""
    folders: dict[float, Path] = {}
    for path in sorted((folder / FOLDER).glob("step-*")):
        if (path / MANIFEST_FILE).is_file():
            folders |= dict.fromkeys(snapshot_shares(files.read_json_object(path / MANIFEST_FILE)), path)
    return folders


def snapshot_shares(manifest: Mapping[str, Any]) -> list[float]:
    """The shares of the run that a snapshot's manifest says it stands for; none of what is no snapshot."""
    shares = manifest.get("shares") if manifest.get("kind") == KIND else None
    return [float(share) for share in shares if isinstance(share, (int, float))] if isinstance(shares, list) else []
