"""Low-rank algebra: inner products of updates that are never formed, and the way back from a sum to a given rank.

Everything is float32; factorisations run on the CPU stream, the only one that has them (Metal has none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

# A dense update whose smaller side is at most this long is decomposed whole: cheaper than sketching it well.
EXACT_SIDE = 256
OVERSAMPLING = 16
POWER_ITERATIONS = 3


@dataclass(frozen=True)
class Factors:
    """A low-rank update ΔW = a @ b of a weight stored as (in, out): a (in, rank), b (rank, out), float32.

    The adapter's scale is already multiplied into ``b``.
    """

    a: mx.array
    b: mx.array

    @property
    def rank(self) -> int:
        """Columns of ``a``; the rank of the product may be lower."""
        return int(self.a.shape[1])

    def dense(self) -> mx.array:
        """ΔW, (in, out)."""
        return self.a @ self.b


@dataclass(frozen=True)
class Truncated:
    """An update at a given rank, and what that cost.

    ``discarded``: ‖ΔW − ab‖²_F, a float32 scalar; ab is a projection, so ‖ΔW‖²_F is ‖ab‖²_F and this. ``exact``: the
    truncation is the best there is of this rank (Eckart–Young), not a sketch's. ``lost``: of one in a metric, where
    the projection is oblique, the share of ‖·‖² in that metric; else None. ``core``: the update and its truncation in
    the coordinates of the orthonormal bases that they were taken by, where inner products are what they are outside.
    """

    factors: Factors
    discarded: mx.array
    exact: bool
    lost: mx.array | None = None
    core: tuple[Factors, Factors] | None = None


def cross(first: Factors, second: Factors) -> mx.array:
    """⟨a₁b₁, a₂b₂⟩ = Σ (a₁ᵀa₂) ⊙ (b₁b₂ᵀ), a float32 scalar."""
    return ((first.a.T @ second.a) * (first.b @ second.b.T)).sum()


def inner_products(updates: Sequence[Factors]) -> mx.array:
    """(T, T) inner products between T updates of one module, by two products of the stacked factors."""
    stacked = stack(updates)
    pieces = (stacked.a.T @ stacked.a) * (stacked.b @ stacked.b.T)
    owners = owner_matrix(tuple(update.rank for update in updates))
    return owners.T @ pieces @ owners


@cache
def owner_matrix(ranks: tuple[int, ...]) -> mx.array:
    """(Σ r_t, T): 1 where a row of stacked factors is adapter t's; sums over ranks by a product with it."""
    rows = mx.concatenate([mx.full((rank,), index) for index, rank in enumerate(ranks)])
    return (rows[:, None] == mx.arange(len(ranks))).astype(mx.float32)


def stack(updates: Sequence[Factors], coefficients: mx.array | Sequence[float] | None = None) -> Factors:
    """Σ_t c_t a_t b_t as one pair of factors of rank Σ r_t, exactly; ``coefficients`` (T,) are 1 unless given."""
    scaled = [
        update.b if coefficients is None else update.b * coefficients[index] for index, update in enumerate(updates)
    ]
    return Factors(mx.concatenate([update.a for update in updates], axis=1), mx.concatenate(scaled, axis=0))


def truncate(update: Factors, rank: int) -> Truncated:
    """The best approximation of ab of at most ``rank``, exactly: QR of both factors, SVD of the core between them.

    The new factors share the singular values' roots, a' = U √σ and b' = √σ Vᵀ. An update whose rank is not above
    ``rank`` is handed back as it is.
    """
    if update.rank <= rank:
        return Truncated(update, mx.array(0.0), True)
    left, upper_left = mx.linalg.qr(update.a, stream=mx.cpu)
    right, upper_right = mx.linalg.qr(update.b.T, stream=mx.cpu)
    u, sigma, vt = svd(upper_left @ upper_right.T)
    root = mx.sqrt(sigma[:rank])
    core = Factors(u[:, :rank] * root, root[:, None] * vt[:rank])
    factors = Factors(left @ core.a, core.b @ right.T)
    return Truncated(factors, mx.square(sigma[rank:]).sum(), True, core=(Factors(upper_left, upper_right.T), core))


def truncate_dense(update: mx.array, rank: int, key: mx.array, exact: bool | None = None) -> Truncated:
    """A dense (in, out) update at ``rank``: by its SVD when its smaller side is at most 256 (or ``exact``), else by a
    randomised range finder with oversampling and power iterations (Halko, Martinsson, Tropp, 2011, algorithm 4.4).

    ``discarded`` is the error really made, ‖ΔW‖² − ‖ab‖² (a projection), so a sketch that missed something shows it.
    """
    if exact is None:
        exact = min(update.shape) <= EXACT_SIDE
    if exact:
        return _truncate_whole(update, rank)
    width = min(rank + OVERSAMPLING, *update.shape)
    basis = _orthonormal(update @ mx.random.normal((update.shape[1], width), key=key))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(update @ _orthonormal(update.T @ basis))
    sketched = truncate(Factors(basis, basis.T @ update), rank)
    square = cross(sketched.factors, sketched.factors)
    return Truncated(sketched.factors, mx.maximum(mx.square(update).sum() - square, 0.0), False)


def _truncate_whole(update: mx.array, rank: int) -> Truncated:
    # QR first: MLX's SVD returns both orthogonal matrices whole, and the longer of them would be in × in.
    tall = update if update.shape[0] >= update.shape[1] else update.T
    basis, upper = mx.linalg.qr(tall, stream=mx.cpu)
    u, sigma, vt = svd(upper)
    root = mx.sqrt(sigma[:rank])
    a, b = basis @ (u[:, :rank] * root), root[:, None] * vt[:rank]
    factors = Factors(a, b) if tall is update else Factors(b.T, a.T)
    return Truncated(factors, mx.square(sigma[rank:]).sum(), True)


def svd(matrix: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """U (m, m), σ (k,) and Vᵀ (n, n) of a small float32 matrix (m, n), k = min(m, n).

    Where an entry is not finite (LAPACK would give up), every σ is not a number.
    """
    finite = mx.isfinite(matrix)
    u, sigma, vt = mx.linalg.svd(mx.where(finite, matrix, 0.0), stream=mx.cpu)
    return u, sigma + mx.where(finite.all(), 0.0, mx.nan), vt


def _orthonormal(columns: mx.array) -> mx.array:
    return mx.linalg.qr(columns, stream=mx.cpu)[0]
