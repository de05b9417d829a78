"""What training left beside the weights, compared: importance, and the mean gradient of a snapshot.

Both are of the factors, entry by entry; so they are compared between adapters that started from one lora_a.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.safetensors_io import read_safetensors
from mlx_rsgwm.merging.pool import PoolAdapter
from mlx_rsgwm.training.snapshots import GRADIENT_FILE


def _importance(source: PoolAdapter) -> dict[str, mx.array]:
    return source.importance("all") if "all" in source.signals else {}


def _gradient(source: PoolAdapter) -> dict[str, mx.array]:
    path = source.folder / GRADIENT_FILE if source.folder else None
    return read_safetensors(path, evaluate=False)[0] if path is not None and path.is_file() else {}


# F is the square of importance, so √(F_a F_b) is the product: both are cosines of what is read.
READERS: Mapping[str, Callable[[PoolAdapter], dict[str, mx.array]]] = {
    "fisher_overlap": _importance,
    "training_gradient_cosine": _gradient,
}


def signal_measures(sources: Sequence[PoolAdapter]) -> dict[tuple[int, int], dict[str, float]]:
    """By the positions of two adapters, the first lower, the measures of those signals that both have of every module
    they share.

    Read module by module: no more of it is in memory than one module of all ``sources``.
    """
    measured: dict[tuple[int, int], dict[str, float]] = {}
    for name, read in READERS.items():
        arrays = [read(source) for source in sources]
        present = [position for position, held in enumerate(arrays) if held]
        for (a, b), cosine in _cosines([sources[p] for p in present], [arrays[p] for p in present]).items():
            measured.setdefault((present[a], present[b]), {})[name] = cosine
    return measured


def _cosines(sources: Sequence[PoolAdapter], arrays: Sequence[dict[str, mx.array]]) -> dict[tuple[int, int], float]:
    count = len(sources)
    if count < 2:
        return {}
    dots, squares = np.zeros((count, count)), np.zeros((count, count))
    # What cannot be compared entry by entry; the diagonal is never asked for.
    fits = np.array([[a is b or a.shares_initial(b) for b in sources] for a in sources], dtype=bool)
    for module in dict.fromkeys(name for source in sources for name in source.shapes):
        values = [_flat(held, module) for held in arrays]
        for i in range(count):
            for j in range(i + 1, count):
                first, second = values[i], values[j]
                if not fits[i, j] or module not in sources[i].shapes or module not in sources[j].shapes:
                    continue
                if first is None or second is None or first.shape != second.shape:
                    fits[i, j] = False
                    continue
                dots[i, j] += first @ second
                squares[i, j] += first @ first
                squares[j, i] += second @ second
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return {
        (i, j): float(dots[i, j] / np.sqrt(squares[i, j] * squares[j, i]))
        for i, j in pairs
        if fits[i, j] and squares[i, j] > 0 and squares[j, i] > 0
    }


def _flat(arrays: dict[str, mx.array], module: str) -> np.ndarray | None:
    parts = [arrays.pop(f"{module}.{leaf}", None) for leaf in ("lora_a", "lora_b")]
    if any(part is None for part in parts):
        return None
    return np.concatenate([np.array(part.astype(mx.float32), np.float64).ravel() for part in parts if part is not None])
