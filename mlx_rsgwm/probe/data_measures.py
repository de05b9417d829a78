"""Measures of pairs that need data: gradients, cross-gradients, activations on rows that all adapters see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.probe.measures import over_modules
from mlx_rsgwm.probe.passes import SKETCH, Passes, adapted_places, block_states, passes_of

SLOT = "probed"


@dataclass(frozen=True)
class PairData:
    """What every adapter did on data, and the base's states (blocks, rows, dims); gives the measures of any two."""

    about: Mapping[str, Any]
    passes: tuple[Passes, ...]
    base_states: np.ndarray

    def of(self, first: int, second: int) -> dict[str, float]:
        """Every measure of the table that needs data, of two adapters by their positions."""
        a, b = self.passes[first], self.passes[second]
        return {
            **_activations(a.states[-1].mean(axis=0), b.states[-1].mean(axis=0)),
            **_vectors("gradient", _flat(a.on_task), _flat(b.on_task)),
            **_vectors("input_gradient", a.embedding.ravel(), b.embedding.ravel()),
            **_shared_gradients(a, b),
            **_cross_gradients(a, b),
            **_shifts(a.states, b.states, self.base_states),
        }


def measure_on_data(
    base: Base,
    adapters: Sequence[Adapter],
    own_rows: Sequence[Sequence[TokenRow]],
    shared_rows: Sequence[TokenRow],
    sources: Sequence[str],
    progress: Progress = SILENT,
    width: int = SKETCH,
) -> PairData:
    """One pass of every adapter over its own and over the shared rows.

    Args:
        base: the base of all of them.
        adapters: T of them.
        own_rows: T sequences of rows of each one's task.
        shared_rows: see :func:`shared_of`.
        sources: where the rows come from, for the table.
        progress: told of adapters.
        width: of the gradients' sketches (:mod:`~mlx_rsgwm.probe.passes`).

    Raises:
        RsgwmError: a gradient or state that is not finite.
    """
    slots, places = AdapterSlots(base), adapted_places(adapters)
    base_states = block_states(slots, shared_rows)
    passes = []
    with progress.task("measure on data", len(adapters)) as advance:
        for adapter, rows in zip(adapters, own_rows, strict=True):
            slots.load(SLOT, adapter)
            passes.append(passes_of(slots, SLOT, rows, shared_rows, places, width))
            if not all(np.isfinite(each).all() for each in (*passes[-1].on_task.values(), passes[-1].states)):
                raise RsgwmError(f"{adapter.where}: gradients or states on its rows are not finite")
            advance(1, adapter.where)
    tokens = [[row.tokens for row in rows] for rows in (*own_rows, shared_rows)]
    about = {
        "sources": list(sources),
        "own_rows": [len(rows) for rows in own_rows],
        "shared_rows": len(shared_rows),
        "rows_sha256": files.sha256_json(tokens),
        "sketch": width,
    }
    return PairData(about, tuple(passes), base_states)


def shared_of(own_rows: Sequence[Sequence[TokenRow]], count: int) -> list[TokenRow]:
    """``count`` rows that all adapters are to see, as many of each task as there are, in turns, each text once."""
    turns: Iterator[TokenRow] = (
        rows[place] for place in range(max(map(len, own_rows))) for rows in own_rows if place < len(rows)
    )
    return list({row.tokens: row for row in turns}.values())[:count]


def _activations(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    norms = (float(np.linalg.norm(first)), float(np.linalg.norm(second)))
    return {
        **_vectors("activation", first, second),
        "activation_norm_ratio": min(norms) / max(norms) if max(norms) else 1.0,
    }


def _vectors(name: str, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    first, second = first.astype(np.float64), second.astype(np.float64)
    return {
        f"{name}_cosine": _cosine(first, second),
        f"{name}_l2": float(np.linalg.norm(first - second)),
        f"{name}_dot": float(first @ second),
    }


def _flat(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([parts[name].ravel() for name in parts])


def _shared_gradients(a: Passes, b: Passes) -> dict[str, float]:
    names = list(a.shared)
    cosines = np.array([_cosine(a.shared[name], b.shared[name]) for name in names])
    energies = np.array([_square(a.shared[name]) + _square(b.shared[name]) for name in names])
    return dict(over_modules("shared_gradient_cosine", cosines, energies))


def _cross_gradients(a: Passes, b: Passes) -> dict[str, float]:
    """cos(ΔW_a, −g_b) and the other way round: above 0 where a step along one's update lowers the other's loss."""
    common = [name for name in a.update if name in b.update]
    ways = np.array(
        [[-_cosine(x.update[name], y.on_task[name]) for name in common] for x, y in ((a, b), (b, a))],
    )
    energies = np.array([_square(a.update[name]) + _square(b.update[name]) for name in common])
    worst = min(
        -_cosine(_flat({name: x.update[name] for name in common}), _flat({name: y.on_task[name] for name in common}))
        for x, y in ((a, b), (b, a))
    )
    return {**dict(over_modules("cross_gradient", ways.mean(axis=0), energies)), "cross_gradient_worst": worst}


def _shifts(first: np.ndarray, second: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Of states (blocks, rows, dims): how far they moved from the base's, whether the same way, and linear CKA."""
    moved = [(states - base).reshape(len(base), -1).astype(np.float64) for states in (first, second)]
    lengths = [np.linalg.norm(each, axis=1) for each in moved]
    shifts = [float((each / np.linalg.norm(base.reshape(len(base), -1), axis=1)).mean()) for each in lengths]
    cosines = np.array([_cosine(a, b) for a, b in zip(*moved, strict=True)])
    alike = np.array([linear_cka(a, b) for a, b in zip(first, second, strict=True)])
    energies = np.square(lengths[0]) + np.square(lengths[1])
    return {
        "activation_shift": sum(shifts) / 2,
        "activation_shift_gap": abs(log(shifts[0] / shifts[1])) if min(shifts) > 0 else 0.0,
        **dict(over_modules("shift_cosine", cosines, energies)),
        **dict(over_modules("cka", alike, energies)),
    }


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear centred kernel alignment of states (rows, dims) of the same rows: ‖XᵀY‖²/(‖XᵀX‖ ‖YᵀY‖).

    Kornblith and others, arXiv 1905.00414.
    """
    x, y = (each.astype(np.float64) - each.mean(axis=0, dtype=np.float64) for each in (first, second))
    kernels = x @ x.T, y @ y.T  # rows are fewer than dims
    return _cosine(*kernels)


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of two arrays of one shape; 0 where either is zero."""
    x, y = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    norm = np.sqrt(x @ x) * np.sqrt(y @ y)
    return float(x @ y / norm) if norm > 0 else 0.0


def _square(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())
