"""The elementwise methods: TIES, DARE, DELLA, Breadcrumbs, magnitude pruning, SCE, as rows of one family.

Every row but SCE is the same three steps: sparsify each update, rescale what is left of it, sum what is left by weight
or by an elected sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlx_rsgwm.merging.parameters import Parameter
from mlx_rsgwm.merging.steps.sign_election import ELECTIONS, NORMALISATIONS, elected_sum, settle, weighted_sum
from mlx_rsgwm.merging.steps.sparsify import RESCALES, keep_count, sparsified
from mlx_rsgwm.models.linux_cpu import ones_where, order_statistics


def merge_task_vectors(
    deltas: Sequence[mx.array],
    weights: Sequence[float],
    key: mx.array,
    *,
    sparsification: str,
    density: float = 1.0,
    epsilon: float = 0.0,
    gamma: float = 0.0,
    rescale: str = "none",
    election: str = "none",
    normalise: str = "weights",
    masks: Sequence[mx.array] | None = None,
) -> mx.array:
    """Sparsify T equal-shaped (in, out) updates, rescale each, and sum them by weight or by the elected sign.

    ``sparsification`` is :func:`~mlx_rsgwm.merging.steps.sparsify.sparsified`'s ``how``; ``density``, ``epsilon``,
    ``gamma`` and ``rescale`` are what they are there. ``election``: none, or as in
    :func:`~mlx_rsgwm.merging.steps.sign_election.elected_sum`. ``normalise``: weights or none. Adapter t draws with the
    t-th part of ``key``; ``masks`` (T of them, true where kept) take the place of what would be drawn or chosen. One
    pass, one update at a time; float32 of the updates' shape.
    """
    keys = mx.random.split(key, len(deltas))
    sparse = (
        sparsified(
            delta,
            sparsification,
            keys[index],
            density=density,
            epsilon=epsilon,
            gamma=gamma,
            rescale=rescale,
            mask=None if masks is None else masks[index],
        )
        for index, delta in enumerate(deltas)
    )
    if election == "none":
        return weighted_sum(sparse, weights, normalise)
    return elected_sum(sparse, weights, election, normalise)


def sce(
    deltas: Sequence[mx.array], weights: Sequence[float], key: mx.array | None = None, *, select_topk: float = 1.0
) -> mx.array:
    """Select, calculate, erase: the entries on which adapters differ most, weighted by energy, by the elected sign.

    Kept are the share ``select_topk`` of those entries that vary between adapters at all, by variance, and at least
    one; all when none varies. An adapter's coefficient is its weight times the mean square of its kept entries. Signs
    are elected by the weighted sum of the kept updates, and what agrees is averaged. ``key`` is not used. Two or three
    passes, one update at a time; float32 of the updates' shape.

    Source: FuseChat (Wan et al., 2024, arXiv 2408.07990); mergekit ``sce``, which has no weights, and falls back to
    equal coefficients when the mean squares sum to less than 1e-6, as those of low-rank updates do.
    """
    mask = _varying(deltas, select_topk) if select_topk < 1 else None

    def masked_updates() -> Iterator[mx.array]:
        return (delta if mask is None else delta * ones_where(mask) for delta in deltas)

    energies = [mx.square(update).mean() * weight for update, weight in zip(masked_updates(), weights, strict=True)]
    return elected_sum(masked_updates(), energies, ballots=weights)


def _varying(deltas: Sequence[mx.array], share: float) -> mx.array:
    # Welford's running variance: a sum of squares minus a squared sum would cancel where adapters are alike.
    mean = spread = mx.zeros(deltas[0].shape)
    for count, delta in enumerate(deltas, start=1):
        step = delta - mean
        mean = mean + step / count
        spread = spread + step * (delta - mean)
        settle({"mean": mean, "spread": spread}, len(deltas))
    varying: Any = (spread > 0).sum().item()
    dropped = spread.size - keep_count(varying, share) if varying else 0
    return spread >= order_statistics(spread.reshape(-1), dropped)


@dataclass(frozen=True)
class TaskVectorMethod:
    """One method of the family: ``merge(deltas, weights, key, **parameters)``, and what its parameters may be.

    ``defaults`` and ``parameters`` name the same ones; ``merge`` has the defaults already. ``lambda`` is among them
    but is none of ``merge``'s: it multiplies the update once, and in factor space ``merge`` runs for either factor.
    """

    merge: Callable[..., mx.array]
    summary: str
    source: str
    defaults: Mapping[str, Any]
    parameters: Mapping[str, Parameter]


DENSITY = Parameter(1.0, "share of an update's entries that is kept", 0, 1, open_low=True)
TOPK = replace(DENSITY, meaning="share of the entries, those that vary most between adapters, that is kept")
LAMBDA = Parameter(1.0, "factor on the merged update", 0, open_low=True)
EPSILON = Parameter(
    0.0,
    "keep probabilities run from density - epsilon to density + epsilon by rank of magnitude",
    0,
    0.5,
    open_high=True,
)
GAMMA = Parameter(0.0, "share of an update's entries, the largest, that is dropped as outliers", 0, 1, open_high=True)
ELECTION = Parameter("none", "the sign of an entry: of the weighted sum, or of the majority", choices=ELECTIONS)
NORMALISE = Parameter("weights", "divide by the sum of the (agreeing) weights, or not", choices=NORMALISATIONS)
RESCALE = Parameter(
    "none",
    "kept entries are divided by their probability (density), or brought to the old L1 norm (l1)",
    choices=RESCALES,
)
# What is chosen by magnitude has no probability to divide by.
RESCALE_CHOSEN = replace(RESCALE, choices=("none", "l1"))


def _row(
    sparsification: str,
    summary: str,
    source: str,
    parameters: Mapping[str, Parameter],
    **defaults: Any,
) -> TaskVectorMethod:
    defaults = {"normalise": "weights", "lambda": 1.0, **defaults}
    options = {name: value for name, value in defaults.items() if name != "lambda"}
    merge = partial(merge_task_vectors, sparsification=sparsification, **options)
    return TaskVectorMethod(merge, summary, source, defaults, {**parameters, "normalise": NORMALISE, "lambda": LAMBDA})


_MAGNITUDE = {"density": DENSITY, "rescale": RESCALE_CHOSEN}
_RANDOM = {"density": DENSITY, "rescale": RESCALE}
_DELLA = {**_RANDOM, "epsilon": EPSILON}
_OUTLIERS = {**_MAGNITUDE, "gamma": GAMMA}
_ELECTED = {"election": ELECTION}

# Weights are 1 each unless the user says otherwise, so every row is a mean by default; where mergekit (DARE,
# Breadcrumbs, della_linear) and PEFT sum, their users give weights that sum to 1. Densities: TIES keeps 20 % as
# published, the random methods half (fusion_bench), Breadcrumbs what mergekit's guide shows; mergekit's default, 1,
# prunes nothing.
FAMILY: Mapping[str, TaskVectorMethod] = MappingProxyType(
    {
        "ties": _row(
            "magnitude",
            "trim the small, elect signs, average what agrees",
            "Yadav et al., 2023 (arXiv 2306.01708), λ = 1; mergekit ties at density 1",
            {**_MAGNITUDE, **_ELECTED},
            density=0.2,
            rescale="none",
            election="sum",
        ),
        "fusion_bench:ties": _row(
            "magnitude",
            "TIES that sums what agrees, scaled down",
            "fusion_bench ties_merging (keep 20 %, λ .3, sum); its threshold is over all parameters and keeps one more",
            {**_MAGNITUDE, **_ELECTED},
            density=0.2,
            rescale="none",
            election="sum",
            normalise="none",
            **{"lambda": 0.3},
        ),
        "dare_linear": _row(
            "bernoulli",
            "drop at random, rescale, average",
            "Yu et al., 2023 (arXiv 2311.03099); PEFT; mergekit dare_linear with rescale l1",
            _RANDOM,
            density=0.5,
            rescale="density",
        ),
        "dare_ties": _row(
            "bernoulli",
            "drop at random, rescale, elect signs, average what agrees",
            "Yu et al., 2023, with TIES' election; PEFT; mergekit dare_ties with rescale l1, normalise none",
            {**_RANDOM, **_ELECTED},
            density=0.5,
            rescale="density",
            election="sum",
        ),
        "della": _row(
            "della",
            "drop the small more often, rescale, elect signs, average what agrees",
            "Deep et al., 2024 (arXiv 2406.11617); mergekit della with rescale l1",
            {**_DELLA, **_ELECTED},
            density=0.5,
            epsilon=0.15,
            rescale="density",
            election="sum",
        ),
        "della_linear": _row(
            "della",
            "drop the small more often, rescale, average",
            "Deep et al., 2024; mergekit della_linear with rescale l1, normalise none",
            _DELLA,
            density=0.5,
            epsilon=0.15,
            rescale="density",
        ),
        "breadcrumbs": _row(
            "breadcrumbs",
            "drop outliers and the small, average",
            "Davari and Belilovsky, 2023 (arXiv 2312.06795); mergekit breadcrumbs with normalise none",
            _OUTLIERS,
            density=0.9,
            gamma=0.01,
            rescale="none",
        ),
        "breadcrumbs_ties": _row(
            "breadcrumbs",
            "drop outliers and the small, elect signs, average what agrees",
            "Davari and Belilovsky, 2023, with TIES' election; mergekit breadcrumbs_ties with normalise none",
            {**_OUTLIERS, **_ELECTED},
            density=0.9,
            gamma=0.01,
            rescale="none",
            election="sum",
        ),
        "magnitude_prune": _row(
            "magnitude",
            "trim the small, average",
            "PEFT magnitude_prune in product space with normalise none",
            _MAGNITUDE,
            density=0.5,
            rescale="none",
        ),
        "sce": TaskVectorMethod(
            sce,
            "keep what differs most, weight by energy, elect signs, average what agrees",
            "Wan et al., 2024 (arXiv 2408.07990); mergekit sce",
            {"select_topk": 1.0, "lambda": 1.0},
            {"select_topk": TOPK, "lambda": LAMBDA},
        ),
    }
)


def check(parameters: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row's parameters together, each being in its range; empty when nothing is."""
    density, epsilon = parameters.get("density"), parameters.get("epsilon")
    if density is None or epsilon is None or density >= 1:
        return []
    if density - epsilon > 0 and density + epsilon <= 1:
        return []
    return [f"density - epsilon and density + epsilon must lie in (0, 1], found density {density}, epsilon {epsilon}"]
