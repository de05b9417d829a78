"""KnOTS (Stoica et al., 2025, arXiv 2410.19735): updates are brought to one basis by a joint SVD and merged there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors, cross, svd
from mlx_rsgwm.merging.families.task_vectors import FAMILY, merge_task_vectors
from mlx_rsgwm.merging.layer import DenseUpdates, Layer


@dataclass(frozen=True)
class SharedBasis:
    """ΔW_t = V_t diag(S) Uᵀ for every t: ``left`` U (out, K), ``values`` S (K,) in falling order, ``rights`` the T V_t
    (in, K) as factors. Over all t together the columns of V are orthonormal.
    """

    left: mx.array
    values: mx.array
    rights: tuple[Factors, ...]


def shared_basis(updates: Sequence[Factors], threshold: float) -> SharedBasis:
    """SVD of [ΔW_1ᵀ … ΔW_Tᵀ], concatenated along the input, without the singular values ≤ ``threshold``.

    Exact without forming anything dense: with the b_t stacked, bᵀ = Q R, and a_t = Q_t R_t, the concatenation is
    Q [R_1ᵀ-blocks of R] diag(Q_1ᵀ … Q_Tᵀ), and only the core of Σ r_t columns is decomposed. fusion_bench's
    ``subspace_alignment`` decomposes the dense one.
    """
    basis, upper = mx.linalg.qr(mx.concatenate([update.b for update in updates], axis=0).T, stream=mx.cpu)
    bases, blocks, start = [], [], 0
    for update in updates:
        right, own_upper = mx.linalg.qr(update.a, stream=mx.cpu)
        bases.append(right)
        blocks.append(upper[:, start : start + update.rank] @ own_upper.T)
        start += update.rank
    u, sigma, vt = svd(mx.concatenate(blocks, axis=1))
    # What is not a number is kept too, so that it shows in the result.
    count: Any = mx.logical_not(sigma <= threshold).sum().item()
    rights, start = [], 0
    for right in bases:
        rights.append(Factors(right, vt[:count, start : start + right.shape[1]].T))
        start += right.shape[1]
    return SharedBasis(basis @ u[:, :count], sigma[:count], tuple(rights))


MERGES: Mapping[str, Callable[..., mx.array]] = MappingProxyType(
    {
        "ties": FAMILY["ties"].merge,
        "dare_ties": FAMILY["dare_ties"].merge,
        "linear": partial(merge_task_vectors, sparsification="none"),
    }
)


def knots(layer: Layer) -> Factors:
    """U diag(S) V with V merged from the V_t of a basis that all adapters share; rank K, the directions kept.

    Parameters: ``merge`` ties | dare_ties | linear (which gives back the weighted mean of the updates), ``density`` of
    its trimming, 1 by default as the authors have it for Llama 3 8B (0.2 for their vision models); ``part`` v | sv:
    whether V_t is merged (the paper; fusion_bench), or diag(S) V_t (the authors' code, s_on_V), which trims what is
    small in the update and not in the basis; the same at density 1. ``threshold`` on the singular values, 1e-4 as in
    fusion_bench (1e-5 in the authors' code); ``lambda``. Trimming is per module, the authors' over all modules.

    Raises:
        RsgwmError: every singular value is at or below ``threshold``, though the updates are not zero.
    """
    parameters = layer.parameters
    shared = shared_basis(layer.factors, parameters["threshold"])
    if not shared.values.size:
        return _nothing(layer)
    layer.notes["directions"] = mx.array(float(shared.values.size))
    # The singular values go with one side or the other.
    inner, outer = (1.0, shared.values) if parameters["part"] == "v" else (shared.values, 1.0)
    rights = DenseUpdates([Factors(right.a, right.b * inner) for right in shared.rights])
    merged = MERGES[parameters["merge"]](rights, layer.weights, layer.key, density=parameters["density"])
    return Factors(merged, parameters["lambda"] * (shared.left * outer).T)


def _nothing(layer: Layer) -> Factors:
    if mx.max(mx.stack([cross(update, update) for update in layer.factors])).item() == 0:
        return layer.factors[0]
    raise RsgwmError(
        f"{layer.name}: no singular value of the updates is above knots' threshold "
        f"{layer.parameters['threshold']:g}; set a lower one"
    )
