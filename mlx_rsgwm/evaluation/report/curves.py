"""Training curves of one or several adapters, drawn from their manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.tables import shortened
from mlx_rsgwm.evaluation.report.figures import COLORS, legend_below, picture_format, write_figure
from mlx_rsgwm.models.adapter import MANIFEST_FILE


def read_history(folder: Path) -> dict[str, Any]:
    """Steps and losses of one trained adapter.

    Returns:
        ``name``, ``train`` {role: (steps, losses)} in nats per trained token, ``held_out`` (steps, losses) on the
        way, and ``before``, ``after`` {role: loss} on held-out rows; empty where nothing was held out.

    Raises:
        RsgwmError: no manifest, or one without a loss history (a merged or converted adapter).
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise RsgwmError(f"{folder} holds no {MANIFEST_FILE}; give a finished adapter folder")
    manifest = files.read_json_object(folder / MANIFEST_FILE)
    history = manifest.get("history")
    if not history:
        kind = manifest.get("kind", "unknown")
        raise RsgwmError(f"{folder} has no loss history (its kind is {kind}); give an adapter that was trained here")
    train: dict[str, tuple[list[int], list[float]]] = {}
    for step, role, loss, _ in history:
        steps, losses = train.setdefault(role, ([], []))
        steps.append(step)
        losses.append(loss)
    validation = manifest.get("validation") or []
    held_out = manifest.get("held_out_loss") or {}
    return {
        "name": folder.name,
        "train": train,
        "held_out": ([row[0] for row in validation], [row[1] for row in validation]),
        "before": held_out.get("before") or {},
        "after": held_out.get("after") or {},
    }


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over the last ``window`` values at every point (fewer at the start): (n,) float64."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=np.float64), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def plot_curves(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Draw train loss by role (faint per step, bold over a window) and held-out loss over steps; PNG or SVG.

    Returns what was drawn, as :func:`read_history` gives it.
    """
    picture_format(out)
    histories = [read_history(Path(folder)) for folder in folders]
    make_folder(out.absolute().parent)
    write_figure(out, partial(_draw, histories=histories), (9, 4.5 + 0.1 * len(histories)))
    return histories


def _draw(figure: Any, histories: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots()
    for number, history in enumerate(histories):
        name = shortened(history["name"], 40)
        for shade, (role, (steps, losses)) in enumerate(history["train"].items()):
            color = COLORS[(2 * number + shade) % len(COLORS)]
            axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
            window = max(1, len(losses) // 15)
            label = f"{name}, {role}, mean of {window} steps"
            axes.plot(steps, smoothed(losses, window), color=color, label=label)
        steps, losses = history["held_out"]
        if steps:
            axes.plot(steps, losses, "o-", color="black", markersize=3, label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss, nats per trained token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
