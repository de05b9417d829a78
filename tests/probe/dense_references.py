"""The measures of a pair as they are defined, of dense float64 updates: slow, and apart from the code they check."""

from __future__ import annotations

import numpy as np


def effective_rank(sigma):
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def over(name, values, energies):
    values = np.array(values)
    return {
        f"{name}.median": np.median(values),
        f"{name}.min": values.min(),
        f"{name}.max": values.max(),
        f"{name}.mean": np.average(values, weights=energies),
    }


def vectors(a, b):
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    norms = sorted([np.linalg.norm(a), np.linalg.norm(b)])
    return {
        "task_vector_cosine": cosine,
        "task_vector_l2": np.linalg.norm(a - b),
        "task_vector_dot": a @ b,
        "task_vector_angle": np.degrees(np.arccos(np.clip(cosine, -1, 1))),
        "task_vector_norm_ratio": norms[0] / norms[1],
    }


def stack(a, b):
    sigma = np.linalg.svd(np.stack([a, b]), compute_uv=False)
    rank = effective_rank(sigma)
    return {
        "stack_effective_rank": rank,
        "stack_effective_rank_score": np.clip(2 - rank, 0, 1),
        "stack_stable_rank": sigma.sum() ** 2 / (sigma**2).sum(),
        "stack_spectral_gap": (sigma[0] - sigma[1]) / sigma[0],
        "stack_singular_ratio": sigma[1] / sigma[0],
    }


def layer_rank(firsts, seconds):
    ranks = [
        effective_rank(np.linalg.svd(np.stack([a.ravel(), b.ravel()]), compute_uv=False))
        for a, b in zip(firsts, seconds, strict=True)
    ]
    rank = np.average(
        ranks, weights=[np.linalg.norm(a) + np.linalg.norm(b) for a, b in zip(firsts, seconds, strict=True)]
    )
    return {"layer_effective_rank": rank, "layer_effective_rank_score": np.clip(2 - rank, 0, 1)}


def subspaces(a, b, ranks, k=10):
    """``a``, ``b`` (in, out) as weights are stored here; the source's are their transposes, with U of outputs."""
    (u1, s1, v1), (u2, s2, v2) = (np.linalg.svd(w.T, full_matrices=False) for w in (a, b))
    k = min(k, *ranks)
    shares = [s[:100] / s.sum() for s in (s1, s2)]
    top = v1[:k] @ v2[:k].T
    bottom = v1[ranks[0] - k : ranks[0]] @ v2[ranks[1] - k : ranks[1]].T
    return {
        "singular_value_overlap": shares[0] @ shares[1] / np.linalg.norm(shares[0]) / np.linalg.norm(shares[1]),
        "left_subspace_overlap": np.linalg.norm(u1[:, :k].T @ u2[:, :k]) / k,
        "right_subspace_overlap_top": np.linalg.norm(top) / np.sqrt(k),
        "right_subspace_overlap_bottom": np.linalg.norm(bottom) / np.sqrt(k),
        "interaction_top": np.mean(np.linalg.svd(top, compute_uv=False) ** 2),
        "interaction_bottom": np.mean(np.linalg.svd(bottom, compute_uv=False) ** 2),
    }


def cos2(a, b, side, energy=0.9):
    bases = []
    for update in (a, b):
        u, s, vt = np.linalg.svd(update, full_matrices=False)
        count = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), energy)) + 1
        bases.append(u[:, :count] if side == "inputs" else vt[:count].T)
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return np.mean(cosines**2)


def signs(a, b):
    least = np.minimum(abs(a), abs(b))
    return least[np.sign(a) != np.sign(b)].sum() / least.sum()


def measures(firsts, seconds, ranks):
    """Every measure but the audit's of updates (in, out) of the modules that both change."""
    pairs = list(zip(firsts, seconds, strict=True))
    flat = [np.concatenate([w.ravel() for w in updates]) for updates in (firsts, seconds)]
    energies = [np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2 for a, b in pairs]
    layers = [subspaces(a, b, each) for (a, b), each in zip(pairs, ranks, strict=True)]
    amplified = [np.linalg.norm(a + b) / np.sqrt(e) for (a, b), e in zip(pairs, energies, strict=True)]
    cosines = [(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    ratios = [abs(np.log(np.linalg.norm(a) / np.linalg.norm(b))) for a, b in pairs]
    return {
        **vectors(*flat),
        **stack(*flat),
        **layer_rank(firsts, seconds),
        **{name: np.mean([layer[name] for layer in layers]) for name in layers[0]},
        **over("update_cosine", cosines, energies),
        **over("log_norm_ratio", ratios, energies),
        **over("output_cos2", [cos2(a, b, "outputs") for a, b in pairs], energies),
        **over("input_cos2", [cos2(a, b, "inputs") for a, b in pairs], energies),
        **over("sign_disagreement", [signs(a, b) for a, b in pairs], energies),
        **over("overamplification", amplified, energies),
        **over("overamplification_squared", np.square(amplified), energies),
    }
