"""A pair's row of the table, from what was measured in each of the modules that both adapters change."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, degrees, log, sqrt

import numpy as np

from mlx_rsgwm.audit.pair_audit import PairAudit
from mlx_rsgwm.audit.verdicts import CONFLICTING, IMBALANCED, REDUNDANT
from mlx_rsgwm.probe.measures import over_modules
from mlx_rsgwm.probe.module_pair import ModuleMeasures


def pair_measures(modules: Sequence[ModuleMeasures]) -> dict[str, float]:
    """Every measure that weights give, by the names of the table.

    ``modules``: those that both adapters change, at least one.
    """
    squares = np.square([module.pair.norms for module in modules])
    gram = np.diag(squares.sum(axis=0))
    gram[0, 1] = gram[1, 0] = sum(module.dot for module in modules)
    return {
        **vector_measures(gram),
        **stack_measures(gram),
        **_layer_rank(modules),
        **{name: float(np.mean([m.subspaces[name] for m in modules])) for name in modules[0].subspaces},
        **_by_module(modules),
        **_audited(modules),
    }


def vector_measures(gram: np.ndarray) -> dict[str, float]:
    """The five of two updates as vectors, from their inner products (2, 2)."""
    norms, dot = np.sqrt(np.diag(gram)), float(gram[0, 1])
    cosine = min(max(dot / float(norms.prod()), -1.0), 1.0)
    return {
        "task_vector_cosine": cosine,
        "task_vector_l2": sqrt(max(float(np.trace(gram)) - 2 * dot, 0.0)),
        "task_vector_dot": dot,
        "task_vector_angle": degrees(acos(cosine)),
        "task_vector_norm_ratio": float(norms.min() / norms.max()),
    }


def stack_measures(gram: np.ndarray) -> dict[str, float]:
    """Five of the seven of two updates stacked as rows, from their inner products (2, 2)."""
    first, second = stack_singular_values(gram)
    rank = stack_effective_rank(gram)
    return {
        "stack_effective_rank": rank,
        "stack_effective_rank_score": min(max(2.0 - rank, 0.0), 1.0),
        "stack_stable_rank": (first + second) ** 2 / (first**2 + second**2),
        "stack_spectral_gap": (first - second) / first,
        "stack_singular_ratio": second / first,
    }


def stack_singular_values(gram: np.ndarray) -> tuple[float, float]:
    """Of two rows with inner products (2, 2), the larger first."""
    mean = float(np.trace(gram)) / 2
    spread = float(np.hypot((gram[0, 0] - gram[1, 1]) / 2, gram[0, 1]))
    # The smaller by the determinant: the difference of two like numbers would lose what it is.
    smaller = max(float(gram[0, 0] * gram[1, 1] - gram[0, 1] ** 2), 0.0) / (mean + spread)
    return sqrt(mean + spread), sqrt(smaller)


def stack_effective_rank(gram: np.ndarray) -> float:
    """exp of the entropy of σ/Σσ of two rows with inner products (2, 2): 1 of parallel ones, at most 2."""
    sigma = np.array(stack_singular_values(gram))
    shares = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _layer_rank(modules: Sequence[ModuleMeasures]) -> dict[str, float]:
    ranks, weights = [], []
    for module in modules:
        first, second = module.pair.norms
        ranks.append(stack_effective_rank(np.array([[first**2, module.dot], [module.dot, second**2]])))
        weights.append(first + second)
    rank = float(np.average(ranks, weights=weights))
    return {"layer_effective_rank": rank, "layer_effective_rank_score": min(max(2.0 - rank, 0.0), 1.0)}


def _by_module(modules: Sequence[ModuleMeasures]) -> dict[str, float]:
    energies = np.array([module.energy for module in modules])
    dots = np.array([module.dot for module in modules])
    squared = np.maximum(1 + 2 * dots / energies, 0.0)
    common = np.array([module.common for module in modules])
    opposed = np.array([module.opposed for module in modules])
    values = {
        "update_cosine": np.array([module.pair.cosine for module in modules]),
        "log_norm_ratio": np.array([log(module.pair.frobenius_ratio) for module in modules]),
        "output_cos2": np.array([module.output_cos2 for module in modules]),
        "input_cos2": np.array([module.input_cos2 for module in modules]),
        "sign_disagreement": np.divide(opposed, common, out=np.zeros_like(common), where=common > 0),
        "overamplification": np.sqrt(squared),
        "overamplification_squared": squared,
    }
    return {column: value for name in values for column, value in over_modules(name, values[name], energies)}


def _audited(modules: Sequence[ModuleMeasures]) -> dict[str, float]:
    pairs = tuple(module.pair for module in modules)
    audit = PairAudit(0, 1, pairs)
    return {
        "audit_overlap": audit.mean_overlap,
        "audit_largest_overlap": max(pair.max_overlap for pair in pairs),
        "audit_input_overlap": float(np.mean([pair.mean_input_overlap for pair in pairs])),
        "audit_agreement": float(np.mean([pair.mean_agreement for pair in pairs])),
        "audit_magnitude_ratio": float(np.mean([log(pair.magnitude_ratio) for pair in pairs])),
        "audit_redundant": audit.share(REDUNDANT),
        "audit_imbalanced": audit.share(IMBALANCED),
        "audit_conflicting": audit.share(CONFLICTING),
        "audit_stable_rank": float(np.mean([pair.stable_ranks for pair in pairs])),
        "audit_utilisation": float(np.mean([np.divide(pair.stable_ranks, pair.ranks) for pair in pairs])),
    }
