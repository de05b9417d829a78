"""A verifier that is several adapters: what they say of a draft together, and which of them said it.

Every adapter of the pool reads the draft; a rule makes one reading of theirs, from which scores follow as from that of
a single verifier:

- ``max``: of yesno, of the mean and of the least log-probability the greatest. An adapter that knows the task finds a
  right answer likely; those that do not know it find every answer unlikely, and are not heard.
- ``mean``: of each the mean, as probabilities.
- ``learned``: a logistic function of what each adapter said, fitted on the calibration's drafts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.files import sha256_json
from mlx_rsgwm.inference.draft import Signals
from mlx_rsgwm.inference.scores import Scorer

if TYPE_CHECKING:
    from mlx_rsgwm.models.adapter import Adapter

RULES = ("max", "mean", "learned")


def check_rule(rule: str, adapters: int) -> None:
    """Raise for an unknown rule, and for one that a single verifier has no use for."""
    if rule not in RULES:
        raise RsgwmError(f"combine must be one of {', '.join(RULES)}, found {rule!r}")
    if rule != "max" and adapters < 2:
        raise RsgwmError(f"combine {rule} takes a verifier of several adapters, and this one has {adapters}")


def pool_key(adapters: Sequence[Adapter], rule: str) -> str:
    """Hex SHA-256 of a pool that verifies: its adapters' weights, in whatever order, and the rule."""
    return sha256_json([rule, sorted(adapter.weights_hash() for adapter in adapters)])


def together(each: Sequence[Signals], rule: str) -> Signals:
    """What the adapters of a pool said of one draft as one reading; that of a single verifier is its own.

    With the rule ``learned`` it is that of ``max``: what was fitted looks at ``each``.
    """
    if len(each) == 1:
        return each[0]
    judged = [signal.yesno for signal in each if signal.yesno is not None]
    means = [signal.mean for signal in each if signal.mean is not None]
    least = [signal.minimum for signal in each if signal.minimum is not None]
    if rule == "mean":
        yesno = sum(judged) / len(judged) if judged else None
        return Signals(yesno, _log_mean(means), _log_mean(least), each[0].tokens, tuple(each))
    return Signals(
        max(judged, default=None), max(means, default=None), max(least, default=None), each[0].tokens, tuple(each)
    )


def _log_mean(logs: Sequence[float]) -> float | None:
    """log of the mean of exp(logs), in float64; None of none."""
    if not logs:
        return None
    top = max(logs)
    return top + math.log(float(np.mean(np.exp(np.array(logs) - top))))


def scores_of_each(scorer: Scorer, signals: Signals) -> list[float]:
    """The score that each adapter of a pool gives a draft by itself; empty for a single verifier.

    Of the combined score that is the combination of its own signals; where a learned rule takes its place, there is
    none, and it is the adapter's mean_logprob.
    """
    if scorer.learned is not None:
        scorer = Scorer("mean_logprob" if scorer.name == "combined" else scorer.name)
    values: list[float] = scorer.values(signals.each).tolist() if signals.each else []
    return values


def winner(scores: Mapping[str, float]) -> str:
    """The adapter with the highest score, the first of equals."""
    return max(scores, key=lambda name: scores[name])
