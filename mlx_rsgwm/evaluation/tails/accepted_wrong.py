"""Two runs by the wrong answers that their verifiers accepted: how sure they were of the worst of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_rsgwm.core.tables import aligned
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.evaluation.stats.bootstrap import percentile_interval, resampled
from mlx_rsgwm.evaluation.tails.gates import FEWEST, INCONCLUSIVE, Settings, judge_tails
from mlx_rsgwm.evaluation.tails.resampling import tail_count
from mlx_rsgwm.evaluation.tails.scores import ItemScores, wrongly_accepted

RESAMPLES = 999
WORST = 0.05  # share of the wrong answers that CVaR is the mean of


def expected_worst(logits: np.ndarray) -> float:
    """CVaR at 5 %: the mean of the largest twentieth of ``logits`` (n,), of one at least."""
    count = max(1, round(WORST * len(logits)))
    return float(np.sort(logits)[-count:].mean())


def compare_tails(
    first: Sequence[ItemRecord], second: Sequence[ItemRecord], names: tuple[str, str], seed: int = 0
) -> dict[str, Any]:
    """Number and CVaR of accepted wrong answers' log odds in both runs, and the gates' verdict on their tails.

    Raises:
        RsgwmError: a run accepted no wrong answer.
    """
    arms = [wrongly_accepted(records, name) for records, name in zip((first, second), names, strict=True)]
    settings = Settings(quantile=1 - WORST, seed=seed)
    told: dict[str, Any] = {"runs": [_described(arm, seed) for arm in arms]}
    fewest = min(tail_count(len(arm.scores), settings.quantile) for arm in arms)
    if fewest < FEWEST:
        reason = (
            f"the smaller tail has {fewest} of the answers; a word on its shape takes {FEWEST}, which is "
            f"{round(FEWEST / WORST)} wrong answers accepted"
        )
        return {**told, "verdict": INCONCLUSIVE, "reason": reason}
    verdict = judge_tails(names, [arm.scores for arm in arms], settings)
    return {**told, "verdict": verdict.verdict, "reason": verdict.reason, "gates": verdict.to_dict()["gates"]}


def tails_text(told: dict[str, Any]) -> str:
    """:func:`compare_tails` for a terminal."""
    rows = [["accepted and wrong", "answers", "CVaR of log odds, worst 5 %", "95 % interval"]]
    for run in told["runs"]:
        rows.append(
            [run["name"], f"{run['answers']}", f"{run['cvar']:.2f}", "[{:.2f}, {:.2f}]".format(*run["interval"])]
        )
    return f"{aligned(rows)}\ntails: {told['verdict']}: {told['reason']}"


def _described(arm: ItemScores, seed: int) -> dict[str, Any]:
    value = expected_worst(arm.scores)
    drawn = np.array([value])
    if len(arm.scores) > 1:
        drawn = resampled(lambda places: expected_worst(arm.scores[places]), len(arm.scores), seed, RESAMPLES)
    return {"name": arm.name, "answers": len(arm.scores), "cvar": value, "interval": list(percentile_interval(drawn))}
