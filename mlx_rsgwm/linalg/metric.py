"""Algebra in the metric of a positive definite M of inputs: solving with it, and the best update of a given rank.

Everything is float64, and NumPy's: hidden states have a few huge features, float32 loses the rest, and MLX has float64
on its CPU stream only, where NumPy takes half the time. Of a sketched M = F Fᵀ + D nothing (in, in) is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_rsgwm.linalg.gram import Gram, SketchedGram, float64
from mlx_rsgwm.linalg.lowrank import EXACT_SIDE, OVERSAMPLING, POWER_ITERATIONS, Factors, Truncated

BLOCK = 64
# With a unit diagonal, a pivot is the share of a feature that the features before it do not explain.
SMALLEST_PIVOT = 1e-13


@dataclass(frozen=True)
class Metric:
    """M of inputs, and what solving with it takes: ``scale`` (in,), by which a unit diagonal is reached, and ``lower``,
    the Cholesky factor of diag(scale) M diag(scale), (in, in), or for a sketch that of I + Eᵀ E, (k, k), with
    ``factor`` E = diag(scale) F.
    """

    gram: Gram
    scale: np.ndarray
    lower: np.ndarray
    factor: np.ndarray | None = None

    def solve(self, right: np.ndarray) -> np.ndarray:
        """M⁻¹ @ right, (in, m)."""
        scaled = self.scale[:, None] * right
        if self.factor is None:
            return self.scale[:, None] * solve_cholesky(self.lower, scaled)
        # Woodbury: (I + E Eᵀ)⁻¹ = I - E (I + EᵀE)⁻¹ Eᵀ.
        scaled -= self.factor @ solve_cholesky(self.lower, self.factor.T @ scaled)
        return self.scale[:, None] * scaled


def factorised(gram: Gram) -> Metric | None:
    """``gram`` ready to be solved with; None when it is not positive definite to working precision, or not finite."""
    diagonal = gram.rest if isinstance(gram, SketchedGram) else gram.diagonal()
    if not (np.isfinite(diagonal).all() and diagonal.min() > 0):
        return None
    scale = 1 / np.sqrt(diagonal)
    if not isinstance(gram, SketchedGram):
        lower = _cholesky(gram.dense() * scale[:, None] * scale[None, :])
        return None if lower is None else Metric(gram, scale, lower)
    factor = scale[:, None] * gram.factor
    matrix = factor.T @ factor
    matrix[np.diag_indices(len(matrix))] += 1
    unit = 1 / np.sqrt(np.diagonal(matrix))
    lower = _cholesky(matrix * unit[:, None] * unit[None, :])
    return None if lower is None else Metric(gram, scale, lower / unit[:, None], factor)


def inner(first: Factors, moment: np.ndarray, second: Factors) -> float:
    """⟨X a₁b₁, X a₂b₂⟩ / n, from ``moment`` = G a₂ (in, r₂)."""
    return float(np.sum((float64(first.a).T @ moment) * (float64(first.b) @ float64(second.b).T)))


def truncate_in(gram: Gram, update: Factors, rank: int) -> Truncated:
    """The update of at most ``rank`` whose outputs are nearest: argmin tr((ΔW − Z)ᵀ M (ΔW − Z)), M = ``gram``.

    With M = L Lᵀ, Z is L⁻ᵀ times the truncated SVD of Lᵀ ΔW. On factors: aᵀMa = C Cᵀ, U the left singular vectors of
    Cᵀb, and Z = a C⁻ᵀ U_k U_kᵀ Cᵀ b. Directions of a that are others' to working precision are left out of C. Columns
    of the new a and rows of the new b are alike in norm. ``lost`` is the share of tr(ΔWᵀ M ΔW) that the rank cannot
    hold.
    """
    if update.rank <= rank:
        return Truncated(update, mx.array(0.0), True)
    a, b = float64(update.a), float64(update.b)
    inwards, outwards = roots(gram.between(a, a))
    outputs = b @ b.T
    values, vectors = _eigh(inwards.T @ outputs @ inwards)
    chosen = vectors[:, :rank]
    left, right = outwards @ chosen, chosen.T @ inwards.T
    missing = np.eye(update.rank) - left @ right
    discarded = np.sum((missing.T @ (a.T @ a) @ missing) * outputs)
    return _truncated(a @ left, right @ b, float(discarded), values, np.maximum(values, 0.0).sum())


def truncate_dense_in(gram: Gram, update: mx.array, rank: int, key: mx.array) -> Truncated:
    """:func:`truncate_in` for a dense (in, out) update: ΔW V_k V_kᵀ, V the eigenvectors of ΔWᵀ M ΔW, (out, out).

    Where the outputs are more than ``EXACT_SIDE``, V comes from a randomised range finder with power iterations, as in
    :func:`~mlx_rsgwm.linalg.lowrank.truncate_dense`.
    """
    dense, outputs = float64(update), update.shape[1]
    if outputs <= EXACT_SIDE:
        values, vectors = _eigh(gram.between(dense, dense))
        chosen, total = vectors[:, :rank], np.maximum(values, 0.0).sum()
    else:
        basis = float64(mx.random.normal((outputs, min(rank + OVERSAMPLING, *update.shape)), key=key))
        for _ in range(POWER_ITERATIONS + 1):
            basis, _ = np.linalg.qr(_finite(dense.T @ gram.times(dense @ basis)))
        inside = dense @ basis
        values, vectors = _eigh(gram.between(inside, inside))
        chosen, total = basis @ vectors[:, :rank], np.sum(dense * gram.times(dense))
    merged = dense @ chosen
    discarded = np.sum(np.square(dense - merged @ chosen.T))
    return _truncated(merged, chosen.T, float(discarded), values, float(total), outputs <= EXACT_SIDE)


def roots(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C and C⁻ᵀ, (R, R'), of a positive semidefinite C Cᵀ, without what is rounding; with a unit diagonal first."""
    size = np.sqrt(np.maximum(np.diagonal(products), 0.0))[:, None]
    unit = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    values, vectors = _eigh(unit * products * unit.T)
    sound = ~(values <= SMALLEST_PIVOT * values[0])  # what is no number stays, so that it shows
    root = np.sqrt(values[sound])
    return size * vectors[:, sound] * root, unit * vectors[:, sound] / root


def solve_cholesky(lower: np.ndarray, right: np.ndarray) -> np.ndarray:
    """x of L Lᵀ x = right, (n, m), by substitution in blocks: NumPy's ``solve`` would factorise anew."""
    starts = range(0, len(lower), BLOCK)
    blocks = [slice(start, start + BLOCK) for start in starts]
    inverses = [np.linalg.inv(lower[block, block]) for block in blocks]
    solved = np.array(right, dtype=np.float64)
    for block, inverse in zip(blocks, inverses, strict=True):
        solved[block] = inverse @ (solved[block] - lower[block, : block.start] @ solved[: block.start])
    for block, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        solved[block] = inverse.T @ (solved[block] - lower[block.stop :, block].T @ solved[block.stop :])
    return solved


def _cholesky(matrix: np.ndarray) -> np.ndarray | None:
    try:
        lower = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    return lower if np.square(np.diagonal(lower)).min() > SMALLEST_PIVOT else None


def _eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues falling, and vectors; where an entry is not finite (LAPACK would give up), no value is a number."""
    safe = _finite(matrix)
    values, vectors = np.linalg.eigh((safe + safe.T) / 2)
    return values[::-1] + (0.0 if np.isfinite(matrix).all() else np.nan), vectors[:, ::-1]


def _finite(matrix: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(matrix), matrix, 0.0)


def _truncated(
    a: np.ndarray, b: np.ndarray, discarded: float, energies: np.ndarray, total: float, exact: bool = True
) -> Truncated:
    """Columns of ``a`` and rows of ``b`` brought to one norm each, and what was lost of ``total``."""
    norms = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
    alive = (norms[0] > 0) & (norms[1] > 0)
    share = np.sqrt(np.divide(norms[1], norms[0], out=np.ones_like(norms[0]), where=alive))
    lost = max(1 - float(np.maximum(energies[: a.shape[1]], 0.0).sum()) / max(total, 1e-300), 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        factors = Factors(mx.array((a * share).astype(np.float32)), mx.array((b / share[:, None]).astype(np.float32)))
    return Truncated(factors, mx.array(discarded), exact, mx.array(lost))
