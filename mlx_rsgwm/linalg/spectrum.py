"""Spectra of low-rank updates, from their factors alone: singular values and vectors, the ranks that they imply, and
how the subspaces of two of them lie to each other.

NumPy in float64: an audit compares numbers near thresholds, and its matrices are thin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import isfinite

import numpy as np

# Singular values up to this share of the largest are rounding errors of float64.
NEGLIGIBLE = 1e-12
# Columns whose Gram matrix has a condition number above this are orthonormalised by Householder reflections: the
# roots of its eigenvalues lose as many digits as this has.
WORST_CONDITION = 1e6
# Rows whose products are summed at a time: in float64 some hundred columns of them stay in a core's cache.
ROWS = 1024


@dataclass(frozen=True)
class Spectrum:
    """The singular values of an update ΔW of ``shape`` (in, r, out): ``sigma`` (k,) float64, descending; k is the least
    of r, in and out.
    """

    shape: tuple[int, int, int]
    sigma: np.ndarray

    @property
    def rank(self) -> int:
        """The nominal one."""
        return self.shape[1]

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(np.sqrt(np.square(self.sigma).sum()))

    @cached_property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / σ₁²."""
        return stable_rank(self.sigma)


@dataclass(frozen=True)
class Decomposed(Spectrum):
    """The SVD of an update without the long vectors.

    ``inputs`` and ``outputs`` (columns, k) are its singular vectors' coordinates, which :class:`Decompositions` knows
    how to multiply. Float64.
    """

    inputs: np.ndarray
    outputs: np.ndarray


class Decompositions:
    """The SVDs of T updates of one module, and how their singular vectors lie to each other.

    All of it comes from two Gram matrices of the stacked factors, AᵀA and BBᵀ, Σ r_t wide: a Cholesky factor of a
    diagonal block is R of a QR decomposition, and products between two updates' vectors are other blocks in those
    coordinates. So the long side is walked over once for all updates and pairs, by matrix products.
    """

    def __init__(self, factors: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """``factors``: of each update a (in, r_t) and b (r_t, out); their product is it.

        Raises:
            ValueError: a value is not finite.
        """
        self._inputs = _Side([a for a, _ in factors])
        self._outputs = _Side([b.T for _, b in factors])
        self.updates = tuple(
            self._decomposed(index, (a.shape[0], a.shape[1], b.shape[1])) for index, (a, b) in enumerate(factors)
        )

    def _decomposed(self, index: int, shape: tuple[int, int, int]) -> Decomposed:
        upper_in, upper_out = self._inputs.uppers[index], self._outputs.uppers[index]
        left, sigma, right = np.linalg.svd(upper_in @ upper_out.T, full_matrices=False)
        inputs, outputs = self._inputs.coordinates(index, left), self._outputs.coordinates(index, right.T)
        return Decomposed(shape, sigma, inputs, outputs)

    def products(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Of two updates' singular vectors, (k_first, k_second) each: their inputs' and their outputs'."""
        a, b = self.updates[first], self.updates[second]
        return (
            a.inputs.T @ self._inputs.block(first, second) @ b.inputs,
            a.outputs.T @ self._outputs.block(first, second) @ b.outputs,
        )


class _Side:
    """Columns of all updates on one side, as their Gram matrix; ``uppers``: R of each one's QR decomposition."""

    def __init__(self, columns: Sequence[np.ndarray]) -> None:
        columns, self.uppers, self._bases = list(columns), [], []
        products, spans = gram_matrix(columns), _spans(columns)
        changed = False
        for index, span in enumerate(spans):
            upper = _upper(products[span, span]) if columns[index].shape[0] >= columns[index].shape[1] else None
            basis = None if upper is None else np.linalg.inv(upper)
            if upper is None:  # nearly dependent: the orthonormal columns stand for these from here on
                columns[index], upper = np.linalg.qr(np.asarray(columns[index], np.float64))
                changed = True
            self.uppers.append(upper)
            self._bases.append(basis)
        self._products, self._spans = (gram_matrix(columns), _spans(columns)) if changed else (products, spans)

    def coordinates(self, index: int, vectors: np.ndarray) -> np.ndarray:
        """What the columns of an update are multiplied by to come to Q @ ``vectors``."""
        basis = self._bases[index]
        return vectors if basis is None else basis @ vectors

    def block(self, first: int, second: int) -> np.ndarray:
        """Products between the columns of two updates."""
        return self._products[self._spans[first], self._spans[second]]


def decompose(a: np.ndarray, b: np.ndarray) -> Decomposed:
    """The SVD of a @ b, a (in, r) and b (r, out)."""
    return Decompositions([(a, b)]).updates[0]


def gram_matrix(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Products (Σ r_t, Σ r_t) in float64 of all columns with all, from blocks (n, r_t) of them of any float type.

    Raises:
        ValueError: a value is not finite.
    """
    spans, length = _spans(columns), columns[0].shape[0]
    width = spans[-1].stop
    products = np.zeros((width, width))
    # The piece lies as the first block does, and is filled by copies without a transposition where all lie so.
    tall = columns[0].flags.c_contiguous
    piece = np.empty((min(ROWS, length), width)) if tall else np.empty((width, min(ROWS, length))).T
    for start in range(0, length, ROWS):
        part = piece[: min(ROWS, length - start)]
        for span, block in zip(spans, columns, strict=True):
            part[:, span] = block[start : start + ROWS]
        products += part.T @ part
    if not isfinite(products.trace()):  # its terms are the columns' squares
        raise ValueError("an update is not finite")
    return products


def _spans(columns: Sequence[np.ndarray]) -> list[slice]:
    ends = accumulate((block.shape[1] for block in columns), initial=0)
    return [slice(start, end) for start, end in pairwise(ends)]


def _upper(products: np.ndarray) -> np.ndarray | None:
    """R of the QR decomposition of columns with these products; None where they are nearly dependent."""
    try:
        lower = np.linalg.cholesky(products)
    except np.linalg.LinAlgError:
        return None
    diagonal = lower.diagonal()
    return lower.T if diagonal.max() ** 2 < WORST_CONDITION * diagonal.min() ** 2 else None


def stable_rank(sigma: np.ndarray) -> float:
    """‖ΔW‖_F² / σ₁² from descending singular values (k,); 0 of an update that is zero."""
    return float(np.square(sigma / sigma[0]).sum()) if len(sigma) and sigma[0] > 0 else 0.0


def effective_rank(sigma: np.ndarray) -> float:
    """exp(−Σ p log p) with p = σ / Σσ, σ (k,) descending (Roy and Vetterli, 2007); 0 of an update that is zero."""
    counted = _counting(sigma)
    if not len(counted):
        return 0.0
    shares = counted / counted.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def energy_rank(sigma: np.ndarray, share: float) -> int:
    """The fewest of the descending singular values (k,) that have ``share`` of Σσ²; 0 of an update that is zero."""
    values = sigma.tolist()  # a few numbers, which NumPy takes longer over than Python
    if not values or values[0] <= 0:
        return 0
    energy = list(accumulate((value / values[0]) ** 2 for value in values if value > NEGLIGIBLE * values[0]))
    return min(bisect_left(energy, share * energy[-1]) + 1, len(energy))


def principal_cosines(products: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles, descending, (min(k_a, k_b),), from QᵀP (k_a, k_b) of two orthonormal bases.

    Björck and Golub, 1973; at most 1, which rounding leaves.
    """
    cosines: np.ndarray = np.minimum(np.linalg.svd(products, compute_uv=False), 1.0)
    return cosines


def random_overlap(first: int, second: int, dimension: int) -> float:
    """The root mean square cosine between random subspaces of so many dimensions: √(max(k_a, k_b) / n), at most 1.

    Their mean cosine is at most this.
    """
    return min(float(np.sqrt(max(first, second) / dimension)), 1.0)


def _counting(sigma: np.ndarray) -> np.ndarray:
    return sigma[sigma > NEGLIGIBLE * sigma[0]] if len(sigma) and sigma[0] > 0 else sigma[:0]
