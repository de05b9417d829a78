"""Algebra in the metric of a positive definite M of inputs: solving with it, and the best update of a given rank.

Everything is float64 on the CPU stream: hidden states have a few huge features, and float32 loses the rest. Of a
sketched M = F Fᵀ + D nothing (in, in) is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_rsgwm.linalg.gram import Gram, SketchedGram
from mlx_rsgwm.linalg.lowrank import EXACT_SIDE, OVERSAMPLING, POWER_ITERATIONS, Factors, Truncated

BLOCK = 256
# With a unit diagonal, a pivot is the share of a feature that the features before it do not explain.
SMALLEST_PIVOT = 1e-13


@dataclass(frozen=True)
class Metric:
    """M of inputs, and what solving with it takes: ``scale`` (in,), by which a unit diagonal is reached, and ``lower``,
    the Cholesky factor of diag(scale) M diag(scale), (in, in), or for a sketch that of I + Fᵀ D⁻¹ F, (k, k).
    """

    gram: Gram
    scale: mx.array
    lower: mx.array

    def solve(self, right: mx.array) -> mx.array:
        """M⁻¹ @ right, (in, m) float64."""
        with mx.stream(mx.cpu):
            scaled = self.scale[:, None] * right.astype(mx.float64)
            if not isinstance(self.gram, SketchedGram):
                return self.scale[:, None] * solve_cholesky(self.lower, scaled)
            # Woodbury: (I + E Eᵀ)⁻¹ = I - E (I + EᵀE)⁻¹ Eᵀ.
            factor = self.scale[:, None] * self.gram.factor
            return self.scale[:, None] * (scaled - factor @ solve_cholesky(self.lower, factor.T @ scaled))


def factorised(gram: Gram) -> Metric | None:
    """``gram`` ready to be solved with; None when it is not positive definite to working precision, or not finite."""
    with mx.stream(mx.cpu):
        if isinstance(gram, SketchedGram):
            smallest = mx.min(gram.rest).item()
            if not isinstance(smallest, float) or not smallest > 0:
                return None
            scale = mx.rsqrt(gram.rest)
            factor = scale[:, None] * gram.factor
            matrix = factor.T @ factor + mx.eye(factor.shape[1]).astype(mx.float64)
            unit = mx.rsqrt(mx.diagonal(matrix))
        else:
            matrix = gram.dense()
            scale = unit = mx.rsqrt(gram.diagonal())
        lower = mx.linalg.cholesky(matrix * unit[:, None] * unit[None, :], stream=mx.cpu)
        # LAPACK stops at the first pivot that is not positive; MLX hands back what there is.
        pivots = mx.square(mx.diagonal(lower))
        sound = mx.min(mx.where(mx.diagonal(lower) > 0, pivots, -1.0)).item()
        if not isinstance(sound, float) or not sound > SMALLEST_PIVOT:
            return None
        return Metric(gram, scale, lower / unit[:, None] if isinstance(gram, SketchedGram) else lower)


def energy(gram: Gram, update: Factors) -> mx.array:
    """‖X ΔW‖²_F / n = tr(bᵀ aᵀ G a b), a float64 scalar."""
    return inner(update, gram.times(update.a), update)


def inner(first: Factors, seen: mx.array, second: Factors) -> mx.array:
    """⟨X a₁b₁, X a₂b₂⟩ / n, a float64 scalar, from ``seen`` = G a₂ (in, r₂)."""
    with mx.stream(mx.cpu):
        a, b, other = (each.astype(mx.float64) for each in (first.a, first.b, second.b))
        return ((a.T @ seen) * (b @ other.T)).sum()


def truncate_in(gram: Gram, update: Factors, rank: int) -> Truncated:
    """The update of at most ``rank`` whose outputs are nearest: argmin tr((ΔW − Z)ᵀ M (ΔW − Z)), M = ``gram``.

    With M = L Lᵀ, Z is L⁻ᵀ times the truncated SVD of Lᵀ ΔW. On factors: aᵀMa = C Cᵀ, U the left singular vectors of
    Cᵀb, and Z = a C⁻ᵀ U_k U_kᵀ Cᵀ b. Directions of a that are others' to working precision are left out of C. Columns
    of the new a and rows of the new b are alike in norm. ``lost`` is the share of tr(ΔWᵀ M ΔW) that the rank cannot
    hold.
    """
    if update.rank <= rank:
        return Truncated(update, mx.array(0.0), True)
    with mx.stream(mx.cpu):
        a, b = update.a.astype(mx.float64), update.b.astype(mx.float64)
        inwards, outwards = roots(a.T @ gram.times(a))
        outputs = b @ b.T
        values, vectors = _eigh(inwards.T @ outputs @ inwards)
        chosen = vectors[:, ::-1][:, :rank]
        left, right = outwards @ chosen, chosen.T @ inwards.T
        merged = _balanced(a @ left, right @ b)
        missing = mx.eye(update.rank).astype(mx.float64) - left @ right
        discarded = ((missing.T @ (a.T @ a) @ missing) * outputs).sum()
        energies = mx.maximum(values, 0.0)[::-1]
        lost = mx.maximum(1 - energies[:rank].sum() / mx.maximum(energies.sum(), 1e-300), 0.0)
        return Truncated(merged, discarded.astype(mx.float32), True, lost.astype(mx.float32))


def truncate_dense_in(gram: Gram, update: mx.array, rank: int, key: mx.array) -> Truncated:
    """:func:`truncate_in` for a dense (in, out) update: ΔW V_k V_kᵀ, V the eigenvectors of ΔWᵀ M ΔW, (out, out).

    Where the outputs are more than ``EXACT_SIDE``, V comes from a randomised range finder with power iterations, as in
    :func:`~mlx_rsgwm.linalg.lowrank.truncate_dense`.
    """
    with mx.stream(mx.cpu):
        dense = update.astype(mx.float64)
        exact = update.shape[1] <= EXACT_SIDE
        if exact:
            seen = gram.times(dense)
            values, vectors = _eigh(dense.T @ seen)
            chosen, total = vectors[:, ::-1][:, :rank], values.sum()
        else:
            total = (dense * gram.times(dense)).sum()
            width = min(rank + OVERSAMPLING, *update.shape)
            basis = mx.random.normal((update.shape[1], width), key=key).astype(mx.float64)
            for _ in range(POWER_ITERATIONS + 1):
                basis, _ = mx.linalg.qr(_finite(dense.T @ gram.times(dense @ basis)), stream=mx.cpu)
            inside = dense @ basis
            values, vectors = _eigh(inside.T @ gram.times(inside))
            chosen = basis @ vectors[:, ::-1][:, :rank]
        merged = _balanced(dense @ chosen, chosen.T)
        discarded = mx.square(dense - (dense @ chosen) @ chosen.T).sum()
        lost = 1 - mx.maximum(values, 0.0)[::-1][:rank].sum() / mx.maximum(total, 1e-300)
        return Truncated(merged, discarded.astype(mx.float32), exact, mx.maximum(lost, 0.0).astype(mx.float32))


def _finite(matrix: mx.array) -> mx.array:
    return mx.where(mx.isfinite(matrix), matrix, 0.0)


def roots(products: mx.array) -> tuple[mx.array, mx.array]:
    """C and C⁻ᵀ, (R, R'), of a positive semidefinite C Cᵀ, without what is rounding; with a unit diagonal first."""
    diagonal = mx.maximum(mx.diagonal(products), 0.0)
    size = mx.sqrt(diagonal)[:, None]
    unit = mx.where(diagonal > 0, mx.rsqrt(mx.where(diagonal > 0, diagonal, 1.0)), 0.0)[:, None]
    values, vectors = _eigh(unit * products * unit.T)
    sound = values > SMALLEST_PIVOT * mx.max(values)
    roots = mx.sqrt(mx.where(sound, values, 1.0))
    return size * vectors * mx.where(sound, roots, 0.0), unit * vectors * mx.where(sound, 1 / roots, 0.0)


def _eigh(matrix: mx.array) -> tuple[mx.array, mx.array]:
    """Eigenvalues rising and vectors; where an entry is not finite (LAPACK would give up), every value is no number."""
    safe = _finite(matrix)
    values, vectors = mx.linalg.eigh((safe + safe.T) / 2, stream=mx.cpu)
    return values + mx.where(mx.isfinite(matrix).all(), 0.0, mx.nan), vectors


def _balanced(a: mx.array, b: mx.array) -> Factors:
    norms = mx.sqrt(mx.square(a).sum(axis=0)), mx.sqrt(mx.square(b).sum(axis=1))
    alive = (norms[0] > 0) & (norms[1] > 0)
    share = mx.where(alive, mx.sqrt(norms[1] / mx.where(alive, norms[0], 1.0)), 1.0)
    return Factors((a * share).astype(mx.float32), (b / share[:, None]).astype(mx.float32))


def solve_cholesky(lower: mx.array, right: mx.array) -> mx.array:
    """x of L Lᵀ x = right, (n, m), by substitution in blocks on the CPU stream.

    MLX's ``solve_triangular`` inverts the whole matrix first, which costs more than the Cholesky factorisation.
    """
    size = lower.shape[0]
    starts = list(range(0, size, BLOCK))
    with mx.stream(mx.cpu):
        inverses = [
            mx.linalg.tri_inv(lower[start : start + BLOCK, start : start + BLOCK], upper=False, stream=mx.cpu)
            for start in starts
        ]
        forward: list[mx.array] = []
        for start, inverse in zip(starts, inverses, strict=True):
            rest = right[start : start + BLOCK]
            if forward:
                rest = rest - lower[start : start + BLOCK, :start] @ _rows(forward)
            forward.append(inverse @ rest)
        backward: list[mx.array] = []
        for start, inverse, rest in zip(reversed(starts), reversed(inverses), reversed(forward), strict=True):
            if backward:
                rest = rest - lower[start + BLOCK :, start : start + BLOCK].T @ _rows(backward[::-1])
            backward.append(inverse.T @ rest)
        return _rows(backward[::-1])


def _rows(blocks: Sequence[mx.array]) -> mx.array:
    return mx.concatenate(list(blocks), axis=0)
