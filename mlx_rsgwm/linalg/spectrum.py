"""Spectra of low-rank updates, from their factors alone: singular values and vectors, the ranks that they imply, and
how the subspaces of two of them lie to each other.

NumPy in float64: an audit compares numbers near thresholds, and its matrices are thin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Singular values up to this share of the largest are rounding errors of float64.
NEGLIGIBLE = 1e-12
# Columns whose Gram matrix has a condition number above this are orthonormalised by Householder reflections.
WORST_CONDITION = 1e10


@dataclass(frozen=True)
class Decomposed:
    """The SVD of an update ΔW (in, out) of nominal ``rank`` r: ``inputs`` (in, k) @ diag(``sigma``) @ ``outputs``ᵀ.

    k is the least of r, in and out; ``sigma`` (k,) descends; ``inputs`` and ``outputs`` (out, k) have orthonormal
    columns. Float64.
    """

    inputs: np.ndarray
    sigma: np.ndarray
    outputs: np.ndarray
    rank: int

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(np.sqrt(np.square(self.sigma).sum()))


def decompose(a: np.ndarray, b: np.ndarray) -> Decomposed:
    """The SVD of a @ b, a (in, r) and b (r, out): orthonormal bases of both factors, then the r × r core's SVD."""
    inputs, upper_in = orthonormal(np.asarray(a, dtype=np.float64))
    outputs, upper_out = orthonormal(np.asarray(b, dtype=np.float64).T)
    left, sigma, right = np.linalg.svd(upper_in @ upper_out.T, full_matrices=False)
    return Decomposed(inputs @ left, sigma, outputs @ right.T, a.shape[1])


def orthonormal(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q (n, r) with orthonormal columns and R (r, r), Q R = ``columns`` (n, r), n ≥ r, float64.

    By Cholesky factors of the Gram matrix, twice (CholeskyQR2, Yamamoto et al., 2015), which is products and so a
    fraction of the time of Householder reflections; by those where the columns are nearly dependent, or few rows.
    """
    basis, upper = columns, np.eye(columns.shape[1])
    if columns.shape[0] < 4 * columns.shape[1]:
        return np.linalg.qr(columns)
    for _ in range(2):
        products = basis.T @ basis
        try:
            lower = np.linalg.cholesky(products)
        except np.linalg.LinAlgError:
            return np.linalg.qr(columns)
        diagonal = np.diag(lower)
        if not diagonal.max() ** 2 < WORST_CONDITION * diagonal.min() ** 2:
            return np.linalg.qr(columns)
        basis, upper = basis @ np.linalg.inv(lower).T, lower.T @ upper
    return basis, upper


def stable_rank(sigma: np.ndarray) -> float:
    """‖ΔW‖_F² / σ₁², from descending singular values; 0 of an update that is zero."""
    return float(np.square(sigma / sigma[0]).sum()) if len(sigma) and sigma[0] > 0 else 0.0


def effective_rank(sigma: np.ndarray) -> float:
    """exp(−Σ p log p) with p = σ / Σσ (Roy and Vetterli, 2007); 0 of an update that is zero."""
    counted = _counting(sigma)
    if not len(counted):
        return 0.0
    shares = counted / counted.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def energy_rank(sigma: np.ndarray, share: float) -> int:
    """The fewest singular values that have ``share`` of Σσ²; 0 of an update that is zero."""
    counted = _counting(sigma)
    if not len(counted):
        return 0
    energy = np.cumsum(np.square(counted / counted[0]))
    return min(int(np.searchsorted(energy, share * energy[-1])) + 1, len(counted))


def principal_cosines(products: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles, descending, (min(k_a, k_b),), from QᵀP (k_a, k_b) of two orthonormal bases.

    Björck and Golub, 1973; clipped to [0, 1], which rounding leaves.
    """
    return np.clip(np.linalg.svd(products, compute_uv=False), 0.0, 1.0)


def random_overlap(first: int, second: int, dimension: int) -> float:
    """The root mean square cosine between random subspaces of so many dimensions: √(max(k_a, k_b) / n), at most 1.

    Their mean cosine is at most this.
    """
    return min(float(np.sqrt(max(first, second) / dimension)), 1.0)


def _counting(sigma: np.ndarray) -> np.ndarray:
    return sigma[sigma > NEGLIGIBLE * sigma[0]] if len(sigma) and sigma[0] > 0 else sigma[:0]
