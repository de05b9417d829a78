"""Algebra in the metric of a positive definite M of inputs: solving with it, and the best update of a given rank.

Everything is float64, and NumPy's: hidden states have a few huge features, float32 loses the rest, and MLX has float64
on its CPU stream only, where NumPy takes half the time. Of a sketched M = F Fᵀ + D nothing (in, in) is formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_rsgwm.linalg.gram import float64
from mlx_rsgwm.linalg.lowrank import EXACT_SIDE, OVERSAMPLING, POWER_ITERATIONS, Factors, Truncated

BLOCK = 64
# With a unit diagonal, a pivot is the share of a feature that the features before it do not explain.
SMALLEST_PIVOT = 1e-13


@dataclass(frozen=True)
class WholeMetric:
    """M = ``matrix`` (in, in), and what solving with it takes: ``scale`` (in,), by which a unit diagonal is reached,
    and ``lower``, the Cholesky factor of diag(scale) M diag(scale).
    """

    matrix: np.ndarray
    scale: np.ndarray
    lower: np.ndarray

    def solve(self, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a = M⁻¹ @ right, (in, m), and aᵀ M a."""
        solved = self.scale[:, None] * solve_cholesky(self.lower, self.scale[:, None] * right)
        return solved, solved.T @ right

    def right(self, right: np.ndarray) -> np.ndarray:
        """What :meth:`solve` solves for, (in, m)."""
        return right

    def times(self, columns: np.ndarray) -> np.ndarray:
        """M @ columns, (in, m)."""
        return self.matrix @ columns

    def square(self, columns: np.ndarray) -> np.ndarray:
        """columnsᵀ M columns, (m, m)."""
        return columns.T @ (self.matrix @ columns)


@dataclass(frozen=True)
class SketchedMetric:
    """M = S⁻¹ (I + E Eᵀ) S⁻¹ with S = diag(``scale``) and ``factor`` E (in, k); ``lower`` (k, k) is the Cholesky factor
    of K = I + EᵀE.
    """

    scale: np.ndarray
    factor: np.ndarray
    lower: np.ndarray

    def solve(self, coordinates: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a = M⁻¹ S⁻¹ (E P + H), (in, m), and aᵀ M a; ``coordinates`` is P (k, m), ``rest`` is H (in, m).

        By Woodbury (I + E Eᵀ)⁻¹ (E P + H) = H + E Z with Z = K⁻¹ (P − Eᵀ H), and Eᵀ of that is P − Z: nothing is taken
        away from what is much larger.
        """
        inside = solve_cholesky(self.lower, coordinates - self.factor.T @ rest)
        scaled = self.factor @ inside
        scaled += rest
        outside = coordinates - inside
        products = scaled.T @ scaled + outside.T @ outside
        scaled *= self.scale[:, None]
        return scaled, products

    def right(self, coordinates: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """What :meth:`solve` solves for: S⁻¹ (E P + H), (in, m)."""
        return (self.factor @ coordinates + rest) / self.scale[:, None]

    def times(self, columns: np.ndarray) -> np.ndarray:
        """M @ columns, (in, m)."""
        unscaled = columns / self.scale[:, None]
        return (unscaled + self.factor @ (self.factor.T @ unscaled)) / self.scale[:, None]

    def square(self, columns: np.ndarray) -> np.ndarray:
        """columnsᵀ M columns, (m, m)."""
        unscaled = columns / self.scale[:, None]
        seen = self.factor.T @ unscaled
        return unscaled.T @ unscaled + seen.T @ seen


Metric = WholeMetric | SketchedMetric


@dataclass(frozen=True)
class Solved:
    """An update a b in float64, a (in, r) and b (r, out), and ``products`` aᵀ M a (r, r) in the metric it is cut in."""

    a: np.ndarray
    b: np.ndarray
    products: np.ndarray

    def factors(self) -> Factors:
        """The same in float32, as it is stored."""
        return Factors(mx.array(self.a.astype(np.float32)), mx.array(self.b.astype(np.float32)))


def whole_metric(matrix: np.ndarray) -> WholeMetric | None:
    """M (in, in) float64, ready to be solved with; None when not finite, or not positive definite in that precision."""
    scale = _scale(np.diagonal(matrix))
    if scale is None:
        return None
    unit = matrix * scale[:, None]
    unit *= scale
    lower = _cholesky(unit)
    return None if lower is None else WholeMetric(matrix, scale, lower)


def sketched_metric(
    factors: Sequence[np.ndarray], shares: Sequence[float], diagonal: np.ndarray
) -> SketchedMetric | None:
    """M = Σ s_t F_t F_tᵀ + diag(``diagonal``) of factors (in, k_t) and shares s_t ≥ 0, as :func:`whole_metric`."""
    scale = _scale(diagonal)
    if scale is None:
        return None
    ends = np.cumsum([factor.shape[1] for factor in factors])
    stacked = np.empty((len(scale), ends[-1]))
    for factor, share, end in zip(factors, shares, ends, strict=True):
        np.multiply(factor, (math.sqrt(share) * scale)[:, None], out=stacked[:, end - factor.shape[1] : end])
    matrix = stacked.T @ stacked
    matrix[np.diag_indices(len(matrix))] += 1
    unit = 1 / np.sqrt(np.diagonal(matrix))
    lower = _cholesky(matrix * unit[:, None] * unit[None, :])
    return None if lower is None else SketchedMetric(scale, stacked, lower / unit[:, None])


def inner(products: np.ndarray, first: Factors, second: Factors) -> float:
    """⟨X a₁b₁, X a₂b₂⟩ / n, from ``products`` = a₁ᵀ G a₂ (r₁, r₂)."""
    return float(np.sum(products * (float64(first.b) @ float64(second.b).T)))


def truncate_in(metric: Metric, update: Factors, rank: int) -> Truncated:
    """The update of at most ``rank`` whose outputs are nearest: argmin tr((ΔW − Z)ᵀ M (ΔW − Z)), M of ``metric``.

    With M = L Lᵀ, Z is L⁻ᵀ times the truncated SVD of Lᵀ ΔW. On factors: aᵀMa = C Cᵀ, U the left singular vectors of
    Cᵀb, and Z = a C⁻ᵀ U_k U_kᵀ Cᵀ b. Directions of a that are others' to working precision are left out of C. Columns
    of the new a and rows of the new b are alike in norm. ``lost`` is the share of tr(ΔWᵀ M ΔW) that the rank cannot
    hold.
    """
    if update.rank <= rank:
        return Truncated(update, mx.array(0.0), True)
    a = float64(update.a)
    return truncate_solved(Solved(a, float64(update.b), metric.square(a)), rank)


def truncate_solved(update: Solved, rank: int) -> Truncated:
    """:func:`truncate_in` where aᵀMa is there already."""
    a, b = update.a, update.b
    if a.shape[1] <= rank:
        return Truncated(update.factors(), mx.array(0.0), True)
    inwards, outwards = roots(update.products)
    outputs = b @ b.T
    values, vectors = _eigh(inwards.T @ outputs @ inwards)
    chosen = vectors[:, :rank]
    left, right = outwards @ chosen, chosen.T @ inwards.T
    missing = np.eye(a.shape[1]) - left @ right
    discarded = np.sum((missing.T @ (a.T @ a) @ missing) * outputs)
    return _truncated(a @ left, right @ b, float(discarded), values, np.maximum(values, 0.0).sum())


def truncate_dense_in(metric: Metric, update: mx.array, rank: int, key: mx.array) -> Truncated:
    """:func:`truncate_in` for a dense (in, out) update: ΔW V_k V_kᵀ, V the eigenvectors of ΔWᵀ M ΔW, (out, out).

    Where the outputs are more than ``EXACT_SIDE``, V comes from a randomised range finder with power iterations, as in
    :func:`~mlx_rsgwm.linalg.lowrank.truncate_dense`.
    """
    dense, outputs = float64(update), update.shape[1]
    if outputs <= EXACT_SIDE:
        values, vectors = _eigh(metric.square(dense))
        chosen, total = vectors[:, :rank], np.maximum(values, 0.0).sum()
    else:
        basis = float64(mx.random.normal((outputs, min(rank + OVERSAMPLING, *update.shape)), key=key))
        for _ in range(POWER_ITERATIONS + 1):
            basis, _ = np.linalg.qr(_finite(dense.T @ metric.times(dense @ basis)))
        inside = dense @ basis
        values, vectors = _eigh(metric.square(inside))
        chosen, total = basis @ vectors[:, :rank], np.sum(dense * metric.times(dense))
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


def _scale(diagonal: np.ndarray) -> np.ndarray | None:
    """What brings a diagonal to 1; None where it is not positive, or not finite."""
    return 1 / np.sqrt(diagonal) if np.isfinite(diagonal).all() and diagonal.min() > 0 else None


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
