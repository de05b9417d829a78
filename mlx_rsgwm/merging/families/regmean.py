"""RegMean (Jin et al., 2023): the update whose outputs are nearest to every adapter's on that adapter's inputs."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_rsgwm.linalg.metric import Solved, roots
from mlx_rsgwm.merging import pool_metric
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.parameters import Parameter
from mlx_rsgwm.merging.pool_metric import stacked_b

PARAMETERS: Mapping[str, Parameter] = {
    **pool_metric.PARAMETERS,
    "source": Parameter(
        "directions",
        "where the update is sought: anywhere, or in the span of the A",
        choices=("directions", "span"),
    ),
}


def regmean(layer: Layer) -> Solved:
    """ΔW = (Σ w_t Ḡ_t)⁻¹ Σ w_t Ḡ_t ΔW_t, the least-squares solution for Σ w_t ‖X_t ΔW − X_t ΔW_t‖²
    (Jin et al., 2023, arXiv 2212.09849).

    Ḡ_t = X_tᵀX_t / n of the module's inputs under adapter t, with a ridge: :func:`pool_metric` says which, and what the
    w_t are. As ΔW_t = a_t b_t, only the a_t are solved for, and the result is exact at rank Σ r_t; of sketches nothing
    (in, in) is formed.

    Parameters: ``balance`` relative | equal; ``off_diagonal``, by which all entries of G off its diagonal are
    multiplied (fusion_bench ``reduce_non_diagonal_ratio``: 1.0 in its code, 0.6 in its GPT-2 settings); ``ridge``,
    times the mean of G's diagonal, is added to that diagonal; ``truncate`` metric | plain, how :mod:`merge` brings the
    result to its rank; ``source`` directions | span: with span ΔW is sought among a_1 c_1 + … + a_T c_T alone, which
    takes no more of the second moments than [a_1 … a_T]ᵀ G_t [a_1 … a_T].

    Raises:
        RsgwmError: the second moments are zero or not finite.
    """
    metric = layer.metric
    layer.notes["ridge"] = mx.array(metric.ridge)
    if layer.parameters.get("source") != "span":
        return metric.solution(layer.factors)
    a = np.concatenate([moment.columns for moment in metric.moments], axis=1)
    # (aᵀMa)⁻¹ aᵀ [w_t Ḡ_t a_t]; what of a is linearly dependent adds nothing to the span.
    _, outwards = roots(metric.metric.square(a))
    inside = outwards.T @ (a.T @ metric.metric.right(*metric.right))
    return Solved(a @ (outwards @ inside), stacked_b(layer.factors), inside.T @ inside)
