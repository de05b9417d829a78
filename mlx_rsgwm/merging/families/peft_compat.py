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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.steps import sign_election
from mlx_rsgwm.merging.steps.sparsify import drawn
from mlx_rsgwm.models.linux_cpu import ones_where, order_statistics

MAJORITY_SIGN_METHODS = ("total", "frequency")

# Dense updates are merged by bands of rows that hold about so many entries over all adapters.
BAND_ENTRIES = 1 << 21


class Rule(NamedTuple):
    """How entries are dropped (none, magnitude, random), and whether what is left elects signs or is summed."""

    dropped: str
    elects: bool


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "linear": Rule("none", False),
        "ties": Rule("magnitude", True),
        "dare_linear": Rule("random", False),
        "dare_ties": Rule("random", True),
        "magnitude_prune": Rule("magnitude", False),
    }
)


def thresholds(magnitudes: mx.array, density: float) -> mx.array:
    """The smallest among the int(density · n) largest magnitudes of every delta (n entries): (T, n) to (T, 1).

    +∞ when that is none of them. Entries whose magnitudes equal it all stay, where PEFT keeps an unspecified choice
    among them.
    """
    size = magnitudes.shape[1]
    count = int(density * size)
    if count == 0:
        return mx.full((magnitudes.shape[0], 1), math.inf)
    return order_statistics(magnitudes, size - count)


def keep_masks(count: int, size: int, density: float, key: mx.array) -> mx.array:
    """Which entries random pruning keeps, each with probability ``density``: (count, size) booleans."""
    return drawn(density, (count, size), key)


def elected_mean(pruned: mx.array, weights: mx.array, method: str) -> mx.array:
    """Mean of w_t δ_t over the tasks whose δ_t has the elected sign: (T, n) pruned deltas to (n,).

    ``method`` total elects the sign of the sum of all δ_t, frequency that of the sum of their signs; 0 elects plus.
    """
    ones = mx.ones((pruned.shape[0],))  # a product with it sums in half the time of sum(axis=0) on the CPU
    votes = ones @ (pruned if method == "total" else mx.sign(pruned))
    elected = mx.sign(mx.sign(votes) + 0.5)
    agreeing = mx.maximum(pruned * elected, 0.0)
    return elected * (weights @ agreeing) / mx.maximum(ones @ mx.sign(agreeing), 1.0)


def stacked(layer: Layer) -> Factors:
    """``cat`` and ``svd``: Σ_t w_t ΔW_t as factors of rank Σ r_t, exactly; ranks may differ.

    ``cat`` is this at its full rank, a with weight and scale as in PEFT's lora_A. ``svd`` is its best approximation at
    the highest rank of the pool; PEFT decomposes the dense sum for it, which gives the same.
    """
    pairs = list(zip(layer.factors, layer.weights, layer.scales, strict=True))
    a = mx.concatenate([update.a * (weight * scale) for update, weight, scale in pairs], axis=1)
    return Factors(a, mx.concatenate([update.b / scale for update, _, scale in pairs], axis=0))


def in_factor_space(layer: Layer, rule: Rule) -> Factors:
    """``rule`` on the lora_A's with weights sgn(w) √|w s|, and on the lora_B's without their scales with √|w s|.

    Of key_a, key_b = ``mx.random.split(module.key)``, key_a draws the random masks of a and key_b those of b.

    Raises:
        RsgwmError: the adapters' ranks differ, listing them.
    """
    chosen = _of_one_rank(layer)
    scales = [layer.scales[index] for index in chosen]
    strengths = [layer.weights[index] * scale for index, scale in zip(chosen, scales, strict=True)]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
    if rule.dropped == "none":
        pairs = [layer.factors[index] for index in chosen]
        rescaled = [root / scale for root, scale in zip(roots, scales, strict=True)]
        a = sign_election.weighted_sum((pair.a for pair in pairs), signed, normalise="none")
        return Factors(a, sign_election.weighted_sum((pair.b for pair in pairs), rescaled, normalise="none"))
    a = mx.stack([layer.factors[index].a for index in chosen])
    b = mx.stack([layer.factors[index].b for index in chosen])
    if len(set(scales)) == 1 and scales[0] > 0:  # moves no threshold and no election, so it can wait
        roots = [root / scales[0] for root in roots]
    else:
        b = b / mx.array(scales)[:, None, None]
    key_a, key_b = mx.random.split(layer.key)
    return Factors(_merged(layer, rule, a, signed, key_a), _merged(layer, rule, b, roots, key_b))


def _merged(layer: Layer, rule: Rule, deltas: mx.array, weights: Sequence[float], key: mx.array) -> mx.array:
    flat = deltas.reshape(deltas.shape[0], -1)
    large = None
    if rule.dropped == "magnitude":
        magnitudes = mx.abs(flat)
        large = magnitudes >= thresholds(magnitudes, layer.parameters["density"])
    return _applied(layer, rule, flat, weights, large, key).reshape(deltas.shape[1:])


def _applied(
    layer: Layer, rule: Rule, deltas: mx.array, weights: Sequence[float], large: mx.array | None, key: mx.array
) -> mx.array:
    """``rule`` on (T, n) deltas, of which ``large`` (bool) stay when it drops by magnitude: (n,)."""
    density = layer.parameters.get("density", 1.0)
    count, size = deltas.shape
    gain = 1.0
    if density < 1 and rule.dropped == "random":
        # PEFT divides by the density before the election. A factor that all tasks share moves no election.
        deltas, gain = deltas * ones_where(keep_masks(count, size, density, key)), 1 / density
    elif density < 1 and large is not None:
        deltas = deltas * ones_where(large)
    coefficients = gain * mx.array(list(weights))
    if rule.elects:
        return elected_mean(deltas, coefficients, layer.parameters["majority_sign_method"])
    return coefficients @ deltas  # the last step of PEFT's task_arithmetic


def in_product_space(layer: Layer, rule: Rule) -> mx.array:
    """``rule`` on the ΔW_t, scales included, with the weights as given: dense, (in, out); ranks may differ.

    Thresholds are found one ΔW_t at a time; what follows goes band by band of rows, so no T of them are ever held.
    Part i of ``mx.random.split(module.key, bands)`` draws the random masks of band i. PEFT truncates the result to the
    highest rank of the pool.
    """
    least = None
    if rule.dropped == "magnitude":
        parts = []
        for delta in layer.dense_updates:
            parts.append(thresholds(mx.abs(delta).reshape(1, -1), layer.parameters["density"]))
            mx.eval(parts)
        least = mx.concatenate(parts)
    spans = list(bands(layer))
    merged = []
    for (start, stop), key in zip(spans, mx.random.split(layer.key, len(spans)), strict=True):
        deltas = mx.stack([update.a[start:stop] @ update.b for update in layer.factors])
        flat = deltas.reshape(deltas.shape[0], -1)
        large = None if least is None else mx.abs(flat) >= least
        merged.append(_applied(layer, rule, flat, layer.weights, large, key).reshape(deltas.shape[1:]))
        mx.eval(merged)
    return mx.concatenate(merged)


def bands(layer: Layer) -> Iterator[tuple[int, int]]:
    """First row and last but one of the bands in which ΔW's rows are merged."""
    rows, columns = layer.factors[0].a.shape[0], layer.factors[0].b.shape[1]
    step = max(1, BAND_ENTRIES // (len(layer.factors) * columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _of_one_rank(layer: Layer) -> list[int]:
    """Which adapters to merge: all, or, when ranks differ, those that adapt this module at all."""
    chosen = list(range(len(layer.factors)))
    if len({update.rank for update in layer.factors}) > 1:
        chosen = [index for index in chosen if not _is_missing(layer.factors[index])]
    ranks = [layer.factors[index].rank for index in chosen]
    if len(set(ranks)) > 1:
        raise RsgwmError(
            f"{layer.name}: the adapters have ranks {', '.join(map(str, ranks))}, and this PEFT type needs one rank; "
            "use peft:cat, peft:svd or a type that ends in _svd"
        )
    return chosen


def _is_missing(factors: Factors) -> bool:
    # An adapter without this module stands in the pool with a zero update of rank 1. PEFT passes over it.
    return factors.rank == 1 and not mx.any(factors.b).item()


# PEFT's combination types. All but linear, cat and svd take density; those with ties in their name take
# majority_sign_method too.
TYPES: Mapping[str, Callable[[Layer], Factors | mx.array]] = MappingProxyType(
    {
        "cat": stacked,
        "svd": stacked,
        **{name: partial(in_factor_space, rule=rule) for name, rule in RULES.items()},
        **{f"{name}_svd": partial(in_product_space, rule=rule) for name, rule in RULES.items() if name != "linear"},
    }
)
