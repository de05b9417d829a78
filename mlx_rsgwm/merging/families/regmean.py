"""RegMean (Jin et al., 2023): the update whose outputs are nearest to every adapter's on that adapter's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.layer import Layer

BLOCK = 256
RAISES = 5  # of the ridge, tenfold each, before a Gram matrix is given up


def regmean(layer: Layer) -> Factors:
    """ΔW = (Σ w_t G_t)⁻¹ Σ w_t G_t ΔW_t, the least-squares solution for Σ w_t ‖X_t ΔW − X_t ΔW_t‖²
    (Jin et al., 2023, arXiv 2212.09849).

    G_t = X_tᵀX_t / n of the module's inputs under adapter t (``rsgwm adapter grams``). As ΔW_t = a_t b_t, only the a_t
    are solved for, and the result is exact at rank Σ r_t.

    Parameters: ``off_diagonal``, by which all entries of G off its diagonal are multiplied (fusion_bench
    ``reduce_non_diagonal_ratio``: 1.0 in its code, 0.6 in its GPT-2 settings); ``ridge``, times the mean of G's
    diagonal, is added to that diagonal (1e-6). It is added to every G_t and not to their sum alone, so that equal
    updates stay as they are and directions without any input get the mean. Where the data is too little for a sound
    solution (fewer tokens than inputs) the ridge is raised tenfold until it suffices.

    Raises:
        RsgwmError: the Gram matrices are zero or not finite.
    """
    ridge = layer.parameters["ridge"]
    for _ in range(RAISES):
        solved = _solve(layer, ridge)
        if solved is not None:
            layer.notes["ridge"] = mx.array(ridge)
            return Factors(solved, mx.concatenate([update.b for update in layer.factors], axis=0))
        ridge = max(10 * ridge, 1e-7)
    raise RsgwmError(
        f"{layer.name}: RegMean's Gram matrices are singular or not finite; collect them on more rows "
        "(rsgwm adapter grams ADAPTER --corpus ROWS --replace), or set off_diagonal below 1"
    )


def weighted_grams(layer: Layer, ridge: float) -> list[mx.array]:
    """w_t times G_t with its ridge and its off-diagonal entries reduced, (in, in) float64 on the CPU stream."""
    share = layer.parameters["off_diagonal"]
    grams = []
    with mx.stream(mx.cpu):
        for gram, weight in zip(layer.grams, layer.weights, strict=True):
            wide = gram.astype(mx.float64)
            diagonal = mx.diagonal(wide)
            added = (1 - share) * diagonal + ridge * diagonal.mean()
            grams.append(weight * (share * wide + mx.diag(added)))
    return grams


def _solve(layer: Layer, ridge: float) -> mx.array | None:
    """(ΣG)⁻¹ [G_1 a_1 … G_T a_T], (in, Σ r) float32; None when ΣG is not positive definite to working precision.

    float64, which only the CPU stream has: hidden states have a few huge features, and float32 loses the rest.
    """
    with mx.stream(mx.cpu):
        total = right = None
        for gram, update in zip(weighted_grams(layer, ridge), layer.factors, strict=True):
            columns = gram @ update.a.astype(mx.float64)
            total = gram if total is None else total + gram
            right = columns if right is None else mx.concatenate([right, columns], axis=1)
            mx.eval(total, right)
        assert total is not None
        assert right is not None
        # With a unit diagonal, a pivot is the share of a feature that the features before it do not explain.
        scale = mx.rsqrt(mx.diagonal(total))
        lower = mx.linalg.cholesky(total * scale[:, None] * scale[None, :], stream=mx.cpu)
        # LAPACK stops at the first pivot that is not positive; MLX hands back what there is.
        pivots = mx.square(mx.diagonal(lower))
        smallest = mx.min(mx.where(mx.diagonal(lower) > 0, pivots, -1.0)).item()
        if not isinstance(smallest, float) or not smallest > 1e-13:
            return None
        return (scale[:, None] * solve_cholesky(lower, scale[:, None] * right)).astype(mx.float32)


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
