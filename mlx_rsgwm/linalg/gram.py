"""Second moments of a layer's inputs, G = XᵀX / n: whole, or as a Nyström sketch with the rest of its diagonal.

A sketch keeps Y = G Ω for a fixed orthonormal test matrix Ω (in, k). Y is linear in X, so sums over batches, steps
and processes need nothing else, and k columns stand for (in, in). What Y says of G is G Ω (ΩᵀGΩ)⁻¹ ΩᵀG; what it leaves
out is positive semidefinite, so its trace, which the diagonal of G tells exactly, bounds the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

# Eigenvalues of ΩᵀGΩ below this share of the largest are rounding errors of float32 sums.
SMALLEST_SHARE = 1e-7


@dataclass(frozen=True)
class WholeGram:
    """G as it is: ``matrix`` (in, in) float64 on the CPU stream."""

    matrix: mx.array

    @property
    def width(self) -> int:
        """in: the length of an input."""
        return int(self.matrix.shape[0])

    def diagonal(self) -> mx.array:
        """The diagonal of G, (in,)."""
        return mx.diagonal(self.matrix, stream=mx.cpu)

    def times(self, columns: mx.array) -> mx.array:
        """G @ columns, (in, m) float64."""
        with mx.stream(mx.cpu):
            return self.matrix @ columns.astype(mx.float64)

    def dense(self) -> mx.array:
        """G, (in, in) float64."""
        return self.matrix

    def regularised(self, weight: float, off_diagonal: float, ridge: float) -> WholeGram:
        """``weight`` times G with its entries off the diagonal times ``off_diagonal`` and ``ridge`` · tr(G) / in added
        to the diagonal.
        """
        with mx.stream(mx.cpu):
            diagonal = self.diagonal()
            added = (1 - off_diagonal) * diagonal + ridge * diagonal.mean()
            return WholeGram(weight * (off_diagonal * self.matrix + mx.diag(added)))


@dataclass(frozen=True)
class SketchedGram:
    """G ≈ factor factorᵀ + diag(rest): ``factor`` (in, k) and ``rest`` (in,) ≥ 0, float64 on the CPU stream.

    The diagonal is G's own. ``missed`` is tr(G − factor factorᵀ) / tr(G), in [0, 1]: a bound on the spectral and the
    nuclear norm of what the factor leaves out, as a share of tr(G).
    """

    factor: mx.array
    rest: mx.array
    missed: float

    @property
    def width(self) -> int:
        """in: the length of an input."""
        return int(self.factor.shape[0])

    def diagonal(self) -> mx.array:
        """The diagonal of G, (in,)."""
        with mx.stream(mx.cpu):
            return mx.square(self.factor).sum(axis=1) + self.rest

    def times(self, columns: mx.array) -> mx.array:
        """(factor factorᵀ + diag(rest)) @ columns, (in, m) float64; nothing (in, in) is formed."""
        with mx.stream(mx.cpu):
            wide = columns.astype(mx.float64)
            return self.factor @ (self.factor.T @ wide) + self.rest[:, None] * wide

    def dense(self) -> mx.array:
        """What the sketch stands for, (in, in) float64: for where its columns are as many as the inputs."""
        with mx.stream(mx.cpu):
            return self.factor @ self.factor.T + mx.diag(self.rest)

    def regularised(self, weight: float, off_diagonal: float, ridge: float) -> SketchedGram:
        """As :meth:`WholeGram.regularised`, in the same form."""
        with mx.stream(mx.cpu):
            diagonal = self.diagonal()
            added = (1 - off_diagonal) * diagonal + ridge * diagonal.mean()
            rest = weight * (off_diagonal * self.rest + added)
            return SketchedGram(math.sqrt(weight * off_diagonal) * self.factor, rest, self.missed)


Gram = WholeGram | SketchedGram


def no_gram(width: int) -> SketchedGram:
    """G of a module without inputs."""
    with mx.stream(mx.cpu):
        nothing = mx.zeros((width,)).astype(mx.float64)
        return SketchedGram(nothing[:, None], nothing, 0.0)


def plus(first: Gram, second: Gram) -> Gram:
    """The sum of two: a sketch when both are and their columns are fewer than the inputs, else whole."""
    with mx.stream(mx.cpu):
        if isinstance(first, SketchedGram) and isinstance(second, SketchedGram):
            factor = mx.concatenate([first.factor, second.factor], axis=1)
            if factor.shape[1] < first.width:
                return SketchedGram(factor, first.rest + second.rest, max(first.missed, second.missed))
        return WholeGram(first.dense() + second.dense())


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
    with mx.stream(mx.cpu):
        wide, basis = sketch.astype(mx.float64), test.astype(mx.float64)
        core = basis.T @ wide
        values, vectors = mx.linalg.eigh((core + core.T) / 2, stream=mx.cpu)
        sound = values > SMALLEST_SHARE * mx.maximum(values[-1], 0.0)
        roots = mx.where(sound, mx.rsqrt(mx.where(sound, values, 1.0)), 0.0)
        factor = wide @ (vectors * roots)
        trace = diagonal.astype(mx.float64)
        rest = trace - mx.square(factor).sum(axis=1)
        missed = rest.sum() / mx.maximum(trace.sum(), 1e-300)
        mx.eval(factor, rest, missed)
        share = float(missed.item())  # type: ignore[arg-type]
        return SketchedGram(factor, mx.maximum(rest, 0.0), min(max(share, 0.0), 1.0))
