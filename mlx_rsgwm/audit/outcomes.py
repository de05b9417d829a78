"""What a merge did to its sources: how much of each is in it, and whether one drowns the others.

For every source c_t, the mean over modules of the cosine between its update and the merged one; Q_min is the least of
them and D = |c_a − c_b| / (|c_a| + |c_b|), of several the largest of any two ("From Diagnosis to Guarded Repair",
Study 16). The saved merge is cut to a rank, which is part of what a lopsided merge suffers; so the sum before the cut
stands beside it, where the method is a sum, and what a closed form says from the spectra alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.linalg.spectrum import decompose
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import AdapterSource

WORST_QUALITY, WORST_DOMINANCE = 0.95, 0.2
TINY = 1e-12


@dataclass(frozen=True)
class Outcome:
    """``shares`` of the T sources in a merge, each a mean cosine in [−1, 1]; the sign stays."""

    shares: tuple[float, ...]

    @property
    def quality(self) -> float:
        """Q_min: of the source that is least in it. Balanced orthogonal pairs come to .707 at most, not to 1."""
        return min(self.shares)

    @property
    def dominance(self) -> float:
        """D, of the two that differ most."""
        return max(abs(a - b) / (abs(a) + abs(b) + TINY) for a, b in combinations(self.shares, 2))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"shares": list(self.shares), "q_min": self.quality, "dominance": self.dominance}


@dataclass(frozen=True)
class Structure:
    """``truncated``: of the merge as it is saved; ``untruncated``: of the weighted sum that it was cut from, and
    ``predicted``: the closed form for orthogonal updates, both None where the merge is no weighted sum."""

    truncated: Outcome
    untruncated: Outcome | None
    predicted: Outcome | None

    @property
    def dominated(self) -> bool:
        """Whether one source drowns another in the merge as it is saved."""
        return self.truncated.dominance > WORST_DOMINANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        told = {name: outcome and outcome.to_dict() for name, outcome in vars(self).items()}
        return {**told, "dominated": self.dominated}


def structure_of(merged: Adapter, sources: Sequence[AdapterSource]) -> Structure:
    """What a finished merge is made of, module by module from disk.

    The coefficients of a weighted sum are those that its manifest's diagnosis tells.

    Raises:
        AdapterError: an adapter is damaged.
        RsgwmError: fewer than two sources, adapters of different bases or shapes, a source without a common module.
    """
    pool = Pool.open([merged, *sources])
    if len(pool.sources) < 3:
        raise RsgwmError(f"a merge has at least two sources, found {len(pool.sources) - 1}")
    rows: list[_Row] = []
    coefficients = _coefficients(merged, len(pool.sources) - 1)
    with pool.checked():
        for name, (result, *updates) in pool.updates():
            if name in pool.sources[0].shapes:
                rows.append(_row(result, updates, coefficients.get(name), pool.sources[0].shapes[name][1]))
    if not rows:
        raise RsgwmError(f"{pool.sources[0].label} has no module of its sources")
    truncated = _mean([row.truncated for row in rows])
    assert truncated is not None
    return Structure(
        truncated,
        _mean([row.untruncated for row in rows]),
        _mean([row.predicted for row in rows]),
    )


@dataclass(frozen=True)
class _Row:
    """One module: T cosines of each kind."""

    truncated: np.ndarray
    untruncated: np.ndarray | None
    predicted: np.ndarray | None


def _row(result: Factors, updates: Sequence[Factors], coefficients: Sequence[float] | None, rank: int) -> _Row:
    products = _products([*updates, result])
    if not np.isfinite(products).all():
        raise ValueError("an update is not finite")  # the pool says which
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    truncated = _cosines(products[:-1, -1], norms[:-1], norms[-1])
    if coefficients is None:
        return _Row(truncated, None, None)
    weights, sources = np.asarray(coefficients), products[:-1, :-1]
    dots = sources @ weights
    untruncated = _cosines(dots, norms[:-1], float(np.sqrt(max(weights @ dots, 0.0))))
    return _Row(truncated, untruncated, predicted_shares(updates, weights, rank))


def predicted_shares(updates: Sequence[Factors], weights: np.ndarray, rank: int) -> np.ndarray:
    """c_t = w_t n_t e_t / √(Σ w² n² e) of orthogonal updates: n_t their norms, e_t the share of ‖ΔW_t‖² that survives.

    The singular values of a sum of orthogonal updates are all of theirs, weighted; the ``rank`` largest survive.
    """
    spectra = [decompose(*_arrays(update)).sigma for update in updates]
    owners = np.repeat(np.arange(len(spectra)), [len(sigma) for sigma in spectra])
    largest = np.argsort(-np.abs(weights)[owners] * np.concatenate(spectra), kind="stable")[:rank]
    survived = np.zeros(len(spectra))
    np.add.at(survived, owners[largest], np.square(np.concatenate(spectra))[largest])
    norms = np.array([float(np.sqrt(np.square(sigma).sum())) for sigma in spectra])
    length = np.sqrt(sum(weight**2 * square for weight, square in zip(weights, survived, strict=True)))
    return np.array(
        [
            weight * square / (norm * length) if norm and length else 0.0
            for weight, square, norm in zip(weights, survived, norms, strict=True)
        ]
    )


def _coefficients(merged: Adapter, count: int) -> Mapping[str, Sequence[float]]:
    """By module the coefficients of a merge that is a weighted sum in that order of its sources; empty of any other."""
    diagnosis = ((merged.manifest.get("merge") or {}).get("diagnosis") or {}).get("modules") or {}
    given = {name: row.get("coefficients") for name, row in diagnosis.items()}
    return {name: row for name, row in given.items() if isinstance(row, list) and len(row) == count}


def _mean(rows: Sequence[np.ndarray | None]) -> Outcome | None:
    known = [row for row in rows if row is not None]
    return Outcome(tuple(np.mean(known, axis=0).tolist())) if len(known) == len(rows) else None


def _cosines(dots: np.ndarray, norms: np.ndarray, norm: float) -> np.ndarray:
    lengths = norms * norm
    return np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > TINY**2)


def _products(updates: Sequence[Factors]) -> np.ndarray:
    """(T, T) inner products, float64."""
    arrays = [_arrays(update) for update in updates]
    a, b = np.concatenate([pair[0] for pair in arrays], axis=1), np.concatenate([pair[1] for pair in arrays])
    starts = np.cumsum([0, *(pair[0].shape[1] for pair in arrays[:-1])])
    pieces = (a.T @ a) * (b @ b.T)
    return np.add.reduceat(np.add.reduceat(pieces, starts, axis=0), starts, axis=1)


def _arrays(update: Factors) -> tuple[np.ndarray, np.ndarray]:
    mx.eval(update.a, update.b)
    return np.array(update.a).astype(np.float64), np.array(update.b).astype(np.float64)
