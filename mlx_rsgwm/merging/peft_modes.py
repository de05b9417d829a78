"""What PEFT 0.21.2's ``add_weighted_adapter`` computes, type by type, under the names ``peft:<type>``.

These reproduce PEFT, its mistakes included, for whoever has to compare with it. The methods without the prefix do what
their names say. Where PEFT departs from its sources (TIES: Yadav et al., 2023; DARE: Yu et al., 2023):

- Types without ``_svd``, but for ``cat``, merge lora_A and lora_B apart, each adapter's with √|w s| (w its weight, s
  its scaling) and w's sign on lora_A: (Σ √(w s) A)(Σ √(w s) B) is not Σ w s A B. For adapters that share nothing the
  error of ``linear`` is as large as the mean itself.
- Signs are elected before the weights come in, so no weight can win or turn an election. A draw elects plus.
- The mean over the adapters that agree divides by their number, not by the sum of their weights.
- Magnitude pruning keeps int(density · n) entries: none at all when that is 0.

Weights are used as they are, 1 for each adapter unless given: PEFT's callers pass 1/T for a mean. What comes out has
scale 1. PEFT itself then applies it √rank times over when its first adapter is rank-stabilised; that is not reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import mlx.core as mx

from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.merging.module import Factors, Module

MAJORITY_SIGN_METHODS = ("total", "frequency")

# Sums of more entries than this are evaluated task by task, so that one ΔW at a time is formed.
LARGE = 1 << 18

# A rule on equal-shaped arrays: (deltas, weights, key, and the method's own parameters by name).
Rule = Callable[..., mx.array]


def threshold(values: mx.array, density: float) -> mx.array:
    """The smallest magnitude among the int(density · n) largest, a scalar; +∞ when that is none of them.

    Entries whose magnitudes equal it all stay, where PEFT keeps an unspecified choice among them.
    """
    count = int(density * values.size)
    if count == 0:
        return mx.array(math.inf)
    place = values.size - count
    return mx.partition(mx.abs(values).reshape(-1), place)[place]


def keep_mask(shape: Sequence[int], density: float, key: mx.array) -> mx.array:
    """Which entries a random pruning keeps, each with probability ``density``: booleans of ``shape``."""
    return mx.random.bernoulli(density, shape, key=key)


def prune(values: mx.array, how: str, density: float, key: mx.array) -> mx.array:
    """``values`` with those entries set to zero that ``how`` drops: none, magnitude or random. Nothing is rescaled.

    A density of 1 keeps everything.
    """
    if how == "none" or density >= 1:
        return values
    if how == "random":
        return values * keep_mask(values.shape, density, key)
    return values * (mx.abs(values) >= threshold(values, density))


def weighted_sum(
    deltas: Sequence[mx.array], weights: Sequence[float], key: mx.array, *, how: str = "none", density: float = 1.0
) -> mx.array:
    """Σ_t w_t prune(δ_t): PEFT's ``task_arithmetic``, ``magnitude_prune``, and ``dare_linear`` (divided by density)."""
    total = mx.array(0.0)
    for index, one in enumerate(_keys(key, len(deltas), how)):
        total = total + _gain(weights[index], how, density) * prune(deltas[index], how, density, one)
        _settle(total)
    return total


def elected_mean(
    deltas: Sequence[mx.array],
    weights: Sequence[float],
    key: mx.array,
    *,
    how: str = "magnitude",
    density: float = 1.0,
    majority_sign_method: str = "total",
) -> mx.array:
    """Mean of w_t prune(δ_t) over the tasks whose pruned δ_t has the elected sign: PEFT's ``ties`` and ``dare_ties``.

    ``majority_sign_method``: the sign of the sum of all pruned δ_t (total) or of their signs (frequency); 0 elects
    plus. One pass: the sums and counts of either sign are kept until all votes are in.
    """
    votes = above = below = positives = negatives = mx.array(0.0)
    for index, one in enumerate(_keys(key, len(deltas), how)):
        kept = prune(deltas[index], how, density, one)
        gain = _gain(weights[index], how, density)
        above = above + gain * mx.maximum(kept, 0.0)
        below = below + gain * mx.minimum(kept, 0.0)
        positives = positives + (kept > 0)
        negatives = negatives + (kept < 0)
        if majority_sign_method == "total":
            votes = votes + kept
        _settle(votes, above, below, positives, negatives)
    if majority_sign_method == "frequency":
        votes = positives - negatives
    return mx.where(votes >= 0, above / mx.maximum(positives, 1.0), below / mx.maximum(negatives, 1.0))


def stacked(module: Module) -> Factors:
    """``cat`` and ``svd``: Σ_t w_t ΔW_t as factors of rank Σ r_t, exactly; ranks may differ.

    ``cat`` is this at its full rank, a with weight and scale as in PEFT's lora_A. ``svd`` is its best approximation at
    the highest rank of the pool; PEFT decomposes the dense sum for it, which gives the same.
    """
    pairs = list(zip(module.factors, module.weights, module.scales, strict=True))
    a = mx.concatenate([one.a * (weight * scale) for one, weight, scale in pairs], axis=1)
    return Factors(a, mx.concatenate([one.b / scale for one, _, scale in pairs], axis=0))


def in_factor_space(module: Module, rule: Rule) -> Factors:
    """``rule`` on the lora_A's with weights sgn(w) √|w s|, and on the lora_B's without their scales with √|w s|.

    Of key_a, key_b = ``mx.random.split(module.key)``, key_a's T parts draw the random masks for a and key_b's for b.

    Raises:
        RsgwmError: the adapters' ranks differ, listing them.
    """
    chosen = _of_one_rank(module)
    strengths = [module.weights[index] * module.scales[index] for index in chosen]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
    key_a, key_b = mx.random.split(module.key)
    a = rule([module.factors[index].a for index in chosen], signed, key_a, **module.parameters)
    unscaled = [module.factors[index].b / module.scales[index] for index in chosen]
    return Factors(a, rule(unscaled, roots, key_b, **module.parameters))


def in_product_space(module: Module, rule: Rule) -> mx.array:
    """``rule`` on the ΔW_t, scales included, with the weights as given: dense, (in, out); ranks may differ.

    One ΔW_t at a time is formed. ``module.key``'s T parts draw the random masks. PEFT truncates the result to the
    highest rank of the pool.
    """
    return rule(module.dense_updates, module.weights, module.key, **module.parameters)


def _gain(weight: float, how: str, density: float) -> float:
    # PEFT divides by the density after a random pruning. A factor that all tasks share moves no election.
    return weight / density if how == "random" else weight


def _keys(key: mx.array, count: int, how: str) -> Iterable[mx.array]:
    return mx.random.split(key, count) if how == "random" else [key] * count


def _settle(*sums: mx.array) -> None:
    if sums[-1].size > LARGE:
        mx.eval(sums)


def _of_one_rank(module: Module) -> list[int]:
    """Which adapters to merge: all, or, when ranks differ, those that adapt this module at all."""
    chosen = list(range(len(module.factors)))
    if len({one.rank for one in module.factors}) > 1:
        chosen = [index for index in chosen if not _is_missing(module.factors[index])]
    ranks = [module.factors[index].rank for index in chosen]
    if len(set(ranks)) > 1:
        raise RsgwmError(
            f"{module.name}: the adapters have ranks {', '.join(map(str, ranks))}, and this PEFT type needs one rank; "
            "use peft:cat, peft:svd or a type that ends in _svd"
        )
    return chosen


def _is_missing(factors: Factors) -> bool:
    # An adapter without this module stands in the pool with a zero update of rank 1. PEFT passes over it.
    return factors.rank == 1 and not mx.any(factors.b).item()


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "linear": weighted_sum,
        "ties": elected_mean,
        "dare_linear": partial(weighted_sum, how="random"),
        "dare_ties": partial(elected_mean, how="random"),
        "magnitude_prune": partial(weighted_sum, how="magnitude"),
    }
)

# PEFT's combination types. All but linear, cat and svd take density; those with ties in their name take
# majority_sign_method too.
TYPES: Mapping[str, Callable[[Module], Factors | mx.array]] = MappingProxyType(
    {
        "cat": stacked,
        "svd": stacked,
        **{name: partial(in_factor_space, rule=rule) for name, rule in RULES.items()},
        **{f"{name}_svd": partial(in_product_space, rule=rule) for name, rule in RULES.items() if name != "linear"},
    }
)
