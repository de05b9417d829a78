"""How sparsified updates of several adapters become one: a weighted sum or mean, or one over an elected sign.

Updates come one by one and are not kept: what an election needs of them, the sums of either sign, is gathered before
it is known who wins. So one pass is enough, and memory does not depend on the number of adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.weights import cancel
from mlx_rsgwm.models.linux_cpu import ones_where

ELECTIONS = ("sum", "count")
NORMALISATIONS = ("weights", "none")

# Up to so many entries over all updates (4 MB), a merge stays one lazy graph that runs together with those of other
# modules; beyond, it is evaluated update by update, which then costs little.
LAZY_ENTRIES = 1 << 20
# What a float32 term may be off by, as a share of it.
ROUNDING = 2.0**-24

Weights = Sequence[float | mx.array]


def weighted_sum(updates: Iterable[mx.array], weights: Sequence[float], normalise: str = "weights") -> mx.array:
    """Σ_t w_t u_t, with ``normalise`` weights divided by Σ_t w_t; float32 of the updates' shape.

    Raises:
        RsgwmError: a mean is asked for and the weights sum to 0.
    """
    if normalise == "weights" and cancel(weights):
        raise RsgwmError("weights sum to zero, so there is no mean; give others, or normalise none")
    weight_sum = sum(weights)
    shares = [weight / weight_sum if normalise == "weights" else weight for weight in weights]
    alike = len(set(shares)) == 1  # then one product instead of one each
    total = mx.array(0.0)
    for update, share in zip(updates, shares, strict=True):
        total = total + (update if alike else update * share)
        settle({"total": total}, len(weights))
    return total * shares[0] if alike else total


def elected_sum(
    updates: Iterable[mx.array],
    weights: Weights,
    election: str = "sum",
    normalise: str = "weights",
    ballots: Sequence[float] | None = None,
) -> mx.array:
    """Σ w_t u_t over the updates that have, entry by entry, the elected sign (TIES; Yadav et al., 2023).

    ``election``: the sign of Σ w_t u_t (sum: PEFT ``total``, mergekit ``sum``), or that of the majority of the w_t u_t
    that are not 0 (count), a draw going to the sign of the sum; PEFT and mergekit give every draw to plus. Where the
    sum draws too, nobody is elected and the entry is 0: also where weights of several sizes leave a rounding error of
    a sum that is 0 (.1 + .2 - .3). ``normalise`` weights divides by Σ |w_t| of the agreeing.
    ``ballots``: other weights for the sum's election (SCE). A negative weight turns an update round. float32 of the
    updates' shape.
    """
    sums: dict[str, mx.array] = {}
    voters = ballots or weights
    uneven = len({abs(float(voter)) for voter in voters}) > 1
    for index, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        ballot = None if ballots is None else ballots[index]
        parts = _parts(update, weight, election, normalise, ballot)
        if ballot is not None and uneven:
            parts["voices"] = mx.abs(parts["votes"])
        sums = {name: sums[name] + part for name, part in parts.items()} if sums else parts
        del parts, update  # named, they would be kept while the sums are evaluated
        settle(sums, len(weights))
    rounding = (len(weights) + 3) * ROUNDING if uneven else 0.0
    winner = _sign(sums["positive"] + sums["negative"], sums["positive"] - sums["negative"], rounding)
    if "votes" in sums:
        votes = _sign(sums["votes"], sums.get("voices", sums["votes"]), rounding if "voices" in sums else 0.0)
        winner = mx.sign(2 * votes + winner)
    # Products with masks, because mx.where takes six times as long on the CPU.
    plus, minus = ones_where(winner > 0), ones_where(winner < 0)
    total = sums["positive"] * plus + sums["negative"] * minus
    if normalise == "none":
        return total
    agreeing = sums["above"] * plus + sums["below"] * minus
    return total / (agreeing + ones_where(agreeing == 0))


def _sign(total: mx.array, size: mx.array, rounding: float) -> mx.array:
    """The sign of a sum whose terms' sizes add up to ``size``; 0 where it is within ``rounding``, a share of that."""
    sign = mx.sign(total)
    return sign * ones_where(mx.abs(total) > rounding * size) if rounding else sign


def _parts(
    update: mx.array, weight: float | mx.array, election: str, normalise: str, ballot: float | None
) -> dict[str, mx.array]:
    """What one update adds to the sums an election needs."""
    share = update * weight
    parts = {"positive": mx.maximum(share, 0.0), "negative": mx.minimum(share, 0.0)}
    if election == "count":
        parts["votes"] = mx.sign(share)
    elif ballot is not None:
        parts["votes"] = update * ballot
    if normalise == "weights":
        strength: Any = abs(weight)
        parts |= {"above": ones_where(share > 0) * strength, "below": ones_where(share < 0) * strength}
    return parts


def settle(state: dict[str, mx.array], count: int) -> None:
    """Evaluate the running ``state`` (an update's shape) of a walk over ``count`` updates too large for one graph.

    One array after the other: together, they would all be held twice.
    """
    if max(array.size for array in state.values()) * count > LAZY_ENTRIES:
        for array in state.values():
            mx.eval(array)
