"""Snapshots of a young run: how far the parameters went and where the gradient points after 1, 2 and 5 % of it.

Predicting how well adapters merge needs both long before a run is over. Each is sized like one adapter.
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

FOLDER = "snapshots"
UPDATE_FILE = "update.safetensors"
GRADIENT_FILE = "gradient.safetensors"


def snapshot_steps(shares: Sequence[float], total: int) -> dict[int, list[float]]:
    """Step (1-based) → the shares of a run of ``total`` steps that end with it; at least one step each."""
    steps: dict[int, list[float]] = {}
    for share in sorted(shares):
        # Rounded before the ceiling: 0.05 · 20 must be 1 whatever its last bit.
        steps.setdefault(max(1, math.ceil(round(share * total, 9))), []).append(share)
    return steps


def write_snapshot(
    folder: Path,
    step: int,
    weights: Mapping[str, mx.array],
    start: Mapping[str, mx.array],
    gradient_sum: Mapping[str, mx.array],
    record: Mapping[str, Any],
) -> Path:
    """Write ``snapshots/step-NNNNNN/`` below the adapter folder, manifest last.

    ``update.safetensors`` is ``weights`` minus ``start`` (what is missing there started at zero),
    ``gradient.safetensors`` the mean over the run's steps so far of the gradient before clipping and weight decay.
    Both float32.
    """
    target = make_folder(folder / FOLDER / f"step-{step:06d}")
    update = {name: value - start[name] if name in start else value for name, value in weights.items()}
    gradient = {name: gradient_sum[name] / step for name in weights}
    for name, arrays in ((UPDATE_FILE, update), (GRADIENT_FILE, gradient)):
        write_safetensors(target / name, {key: value.astype(mx.float32) for key, value in arrays.items()})
    hashes = {name: files.sha256_file(target / name) for name in (UPDATE_FILE, GRADIENT_FILE)}
    files.write_json(target / "manifest.json", {"step": step, **record, "files": hashes})
    return target
