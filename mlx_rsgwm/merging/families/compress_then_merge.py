"""Compress-then-Merge (He et al., 2026, arXiv 2606.03723): to shared bases of the result's rank first, then merged.

No rank is cut off a merged update: what is merged are r × r coordinates of the adapters in bases that serve all.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.knots import MERGES
from mlx_rsgwm.merging.layer import Layer

ITERATIONS = 1000
# The alternation ends when a round gains less than this share of the updates' squared norm.
TOLERANCE = 1e-6


def compress_then_merge(layer: Layer) -> Factors:
    """U C Vᵀ with orthonormal U (in, r) and V (out, r) that maximise Σ_t ‖Uᵀ s_t ΔW_t V‖²_F, and C merged from the
    coordinates C_t = Uᵀ ΔW_t V.

    Parameters: ``components`` r, 0 for the highest rank of the pool; ``beta``: s_t brings ‖ΔW_t‖ to β ‖ΔW_t‖ + (1 − β)
    times the mean norm, so that at 0 every adapter has the same say in the bases, and at 1 the larger ones more;
    ``merge`` linear | ties | dare_ties of the C_t, with ``density`` for the latter (its authors prefer ties, which kept
    less than the mean on the demo's pool); ``lambda`` on the result.

    The bases are the Tucker decomposition of the tensor of the s_t ΔW_t in its first two modes, by alternating
    eigenproblems from the SVDs of its unfoldings (the authors' code: tensorly ``partial_tucker``), in the Σ r_t
    dimensions that the stacked factors span, which loses nothing.
    """
    parameters = layer.parameters
    rank = int(parameters["components"]) or max(update.rank for update in layer.factors)
    with mx.stream(mx.cpu):
        left, right, cores = core_space(layer.factors)
        u, v = shared_bases(_evened(cores, parameters["beta"]), rank)
        coordinates = [(u.T @ core @ v).astype(mx.float32) for core in cores]
        squares = [mx.stack([mx.square(each).sum() for each in some]).sum() for some in (coordinates, cores)]
        layer.notes["coordinates_share"] = (squares[0] / mx.maximum(squares[1], 1e-300)).astype(mx.float32)
        ends = (left @ u).astype(mx.float32), (right @ v).astype(mx.float32)
    merged = MERGES[parameters["merge"]](coordinates, layer.weights, layer.key, density=parameters["density"])
    return Factors(ends[0], parameters["lambda"] * (merged @ ends[1].T))


def core_space(updates: Sequence[Factors]) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Orthonormal Q (in, R), P (out, R') and the cores M_t = Qᵀ ΔW_t P of T updates, float64: ΔW_t = Q M_t Pᵀ."""
    with mx.stream(mx.cpu):
        a = mx.concatenate([update.a for update in updates], axis=1).astype(mx.float64)
        b = mx.concatenate([update.b for update in updates], axis=0).astype(mx.float64)
        left, upper = mx.linalg.qr(mx.where(mx.isfinite(a), a, 0.0), stream=mx.cpu)
        right, lower = mx.linalg.qr(mx.where(mx.isfinite(b), b, 0.0).T, stream=mx.cpu)
        lost = mx.where(mx.isfinite(a).all() & mx.isfinite(b).all(), 0.0, mx.nan)
        cores, start = [], 0
        for update in updates:
            columns = slice(start, start + update.rank)
            cores.append(upper[:, columns] @ lower[:, columns].T + lost)
            start += update.rank
        return left, right, cores


def shared_bases(cores: Sequence[mx.array], rank: int) -> tuple[mx.array, mx.array]:
    """U (R, r) and V (R', r), orthonormal, at a maximum of Σ_t ‖Uᵀ M_t V‖²_F: higher-order orthogonal iteration."""
    with mx.stream(mx.cpu):
        stacked = mx.stack(list(cores))  # (T, R, R')
        stacked = mx.where(mx.isfinite(stacked), stacked, 0.0)
        v, _ = _leading(_products(stacked.transpose(0, 2, 1)), rank)
        total, before = float(mx.square(stacked).sum().item()), -1.0  # type: ignore[arg-type]
        for _ in range(ITERATIONS):
            u, _ = _leading(_products(stacked @ v), rank)
            v, energy = _leading(_products(stacked.transpose(0, 2, 1) @ u), rank)
            now = float(energy.item())  # type: ignore[arg-type]
            if now - before <= TOLERANCE * total:
                break
            before = now
        return u, v


def _products(stacked: mx.array) -> mx.array:
    """Σ_t X_t X_tᵀ of (T, n, m), (n, n)."""
    flat = stacked.transpose(1, 0, 2).reshape(stacked.shape[1], -1)
    return flat @ flat.T


def _leading(matrix: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """The eigenvectors of the ``rank`` largest eigenvalues, and the sum of those."""
    values, vectors = mx.linalg.eigh((matrix + matrix.T) / 2, stream=mx.cpu)
    return vectors[:, ::-1][:, :rank], values[::-1][:rank].sum()


def _evened(cores: Sequence[mx.array], beta: float) -> list[mx.array]:
    """s_t M_t: norms β of the way from their mean to what they are. What is zero stays zero."""
    norms = mx.sqrt(mx.stack([mx.square(core).sum() for core in cores]))
    scales = beta + (1 - beta) * norms.mean() / mx.where(norms > 0, norms, 1.0)
    return [core * scales[index] for index, core in enumerate(cores)]
