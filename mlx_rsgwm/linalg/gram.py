"""Second moments of a layer's inputs, G = XᵀX / n: whole, or as a Nyström sketch with the rest of its diagonal.

To users these are an adapter's directions; in code one such matrix is a gram.

A sketch keeps Y = G Ω for a fixed orthonormal test matrix Ω (in, k). Y is linear in X, so sums over batches, steps
and processes need nothing else, and k columns stand for (in, in). What Y says of G is G Ω (ΩᵀGΩ)⁻¹ ΩᵀG; what it leaves
out is positive semidefinite, so its trace, which the diagonal of G tells exactly, bounds the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np

Columns = mx.array | np.ndarray

# Eigenvalues of ΩᵀGΩ below this share of the largest are rounding errors of float32 sums.
SMALLEST_SHARE = 1e-7


@dataclass(frozen=True)
class Moment:
    """What products with ``columns`` (in, m) take of a G: ``image`` is G columns (in, m), or of a sketch
    factorᵀ columns (k, m).
    """

    columns: np.ndarray
    image: np.ndarray


@dataclass(frozen=True)
class WholeGram:
    """G as it is: ``matrix`` (in, in) float64."""

    matrix: np.ndarray

    @property
    def width(self) -> int:
        """in: the length of an input."""
        return int(self.matrix.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.matrix.nbytes)

    @property
    def diagonal(self) -> np.ndarray:
        """The diagonal of G, (in,)."""
        return np.diagonal(self.matrix)

    def moment(self, columns: Columns) -> Moment:
        """What :meth:`between` takes of ``columns`` (in, m)."""
        wide = float64(columns)
        return Moment(wide, self.matrix @ wide)

    def between(self, left: Moment, right: Moment) -> np.ndarray:
        """leftᵀ G right, (m, n) float64."""
        return left.columns.T @ right.image

    def product(self, moment: Moment) -> np.ndarray:
        """G columns, (in, m)."""
        return moment.image

    def dense(self) -> np.ndarray:
        """G, (in, in) float64."""
        return self.matrix


@dataclass(frozen=True)
class SketchedGram:
    """G ≈ factor factorᵀ + diag(rest): ``factor`` (in, k) and ``rest`` (in,) ≥ 0, float64.

    The diagonal is G's own. ``missed`` is tr(G − factor factorᵀ) / tr(G), in [0, 1]: a bound on the spectral and the
    nuclear norm of what the factor leaves out, as a share of tr(G). Nothing (in, in) is formed but by ``dense``.
    """

    factor: np.ndarray
    rest: np.ndarray
    missed: float

    @property
    def width(self) -> int:
        """in: the length of an input."""
        return int(self.factor.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.factor.nbytes + self.rest.nbytes)

    @cached_property
    def diagonal(self) -> np.ndarray:
        """The diagonal of G, (in,)."""
        return np.einsum("ik,ik->i", self.factor, self.factor) + self.rest

    def moment(self, columns: Columns) -> Moment:
        """What :meth:`between` takes of ``columns`` (in, m)."""
        wide = float64(columns)
        return Moment(wide, self.factor.T @ wide)

    def between(self, left: Moment, right: Moment) -> np.ndarray:
        """leftᵀ (factor factorᵀ + diag(rest)) right, (m, n) float64."""
        return left.image.T @ right.image + left.columns.T @ (self.rest[:, None] * right.columns)

    def product(self, moment: Moment) -> np.ndarray:
        """G columns, (in, m)."""
        return self.factor @ moment.image + self.rest[:, None] * moment.columns

    def dense(self) -> np.ndarray:
        """What the sketch stands for, (in, in) float64: for where its columns are as many as the inputs."""
        return self.factor @ self.factor.T + np.diag(self.rest)


Gram = WholeGram | SketchedGram


def added(gram: Gram, off_diagonal: float, ridge: float) -> np.ndarray:
    """What (in,) is added to the diagonal of ``off_diagonal`` times G, so that the diagonal is G's own and
    ``ridge`` · tr(G) / in.
    """
    diagonal = gram.diagonal
    return (1 - off_diagonal) * diagonal + ridge * diagonal.mean()


def float64(array: Columns) -> np.ndarray:
    """An evaluated array for NumPy in float64, of the same shape: MLX's own float64 has the CPU stream only."""
    return np.asarray(np.array(array, copy=False), dtype=np.float64)


def no_gram(width: int) -> SketchedGram:
    """G of a module without inputs."""
    return SketchedGram(np.zeros((width, 1)), np.zeros(width), 0.0)


@lru_cache(maxsize=32)
def test_matrix(width: int, rank: int, seed: int) -> mx.array:
    """Ω (in, k) float32 with orthonormal columns, the same on every machine: QR of a Gaussian matrix by ``seed``.

    A smaller k has the first columns of a larger one, and so has its sketch.
    """
    drawn = np.random.default_rng([seed, width]).standard_normal((rank, width)).T
    basis, upper = np.linalg.qr(drawn)
    return mx.array((basis * np.sign(np.diag(upper))).astype(np.float32))


test_matrix.__test__ = False  # type: ignore[attr-defined]  # not a test of pytest


def from_sketch(sketch: mx.array, diagonal: mx.array, test: mx.array) -> SketchedGram:
    """The Nyström approximation of G from Y = G Ω (``sketch``, (in, k)), G's ``diagonal`` (in,) and Ω (``test``).

    Tropp, Yurtsever, Udell, Cevher, 2017 (arXiv 1706.05736), algorithm 3, with small eigenvalues left out in place of
    their shift: expected nuclear error ≤ (1 + p / (k − p − 1)) Σ_{j>p} λ_j for every p < k − 1 and a Gaussian Ω.
    """
    wide, basis, squares = float64(sketch), float64(test), float64(diagonal)
    core = basis.T @ wide
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    sound = values > SMALLEST_SHARE * max(values[-1], 0.0)
    factor = wide @ (vectors[:, sound] / np.sqrt(values[sound])) if sound.any() else np.zeros((len(squares), 1))
    rest = squares - np.einsum("ik,ik->i", factor, factor)
    share = rest.sum() / max(squares.sum(), 1e-300)
    return SketchedGram(factor, np.maximum(rest, 0.0), float(min(max(share, 0.0), 1.0)))
