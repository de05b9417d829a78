"""What recorded drafts would have given with other numbers of drafts and another rule: replays, and no new run.

    python bench/replay_drafts.py RUN/items-merged.jsonl [--drafts 3 6] [--score mean_logprob]

The items of ``rsgwm report controls`` with every draft scored. For each number of drafts: any right (the ceiling), the
first, majority, draft–verify with arithmetic checked at the run's threshold, the calculator without a verifier and its
majority, best of all by the score among drafts without a false equation; shares right over items and seeds with 95 %
bootstrap intervals over items. Then what of the answers with the highest scores is right, by the share of the items
that is answered. The last line is JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.tables import aligned
from mlx_rsgwm.evaluation.calculator_systems import annotated, draft_verify, first_calculated, majority_calculated
from mlx_rsgwm.evaluation.metrics import majority_index
from mlx_rsgwm.evaluation.records import ItemRecord, read_items
from mlx_rsgwm.evaluation.stats.intervals import Rate, bootstrapped
from mlx_rsgwm.evaluation.stats.paired import mean_difference

Rule = Callable[[ItemRecord, int], bool]
SHARES = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8)


def best_calculated(record: ItemRecord, k: int, score: str) -> tuple[float, bool]:
    """Score and rightness of the best of ``k`` drafts without a false equation; of none −1 and the first draft's."""
    passing = [draft for draft in record.drafts[:k] if draft.false_equation is None]
    if not passing:
        return -1.0, bool(record.drafts[0].correct)
    best = max(passing, key=lambda draft: draft.scores[score])
    return best.scores[score], bool(best.correct)


def rules(score: str) -> dict[str, Rule]:
    """Every way to an answer, by name."""

    def chosen(system: Callable[[ItemRecord, int], ItemRecord]) -> Rule:
        return lambda record, k: bool((made := system(record, k)).drafts[made.chosen].correct)

    return {
        "any": lambda record, k: any(draft.correct for draft in record.drafts[:k]),
        "first": lambda record, k: bool(record.drafts[0].correct),
        "majority": lambda record, k: bool(record.drafts[majority_index(record.drafts[:k])].correct),
        "draft–verify, arithmetic": chosen(draft_verify),
        "best, arithmetic": lambda record, k: best_calculated(record, k, score)[1],
        "calculator": chosen(first_calculated),
        "calculator, majority": chosen(majority_calculated),
    }


def right(records: Sequence[ItemRecord], rule: Rule, k: int) -> np.ndarray:
    """(items, seeds) of 0 and 1."""
    flags: dict[str, list[float]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        flags.setdefault(record.id, []).append(float(rule(record, k)))
    return np.array(list(flags.values()))


def share_right(flags: np.ndarray) -> Rate | None:
    """Of (items, seeds), with an interval over items."""
    means = flags.mean(axis=1)
    return bootstrapped(lambda drawn: float(means[drawn].mean()), list(range(len(means))))


def answered(records: Sequence[ItemRecord], score: str, k: int) -> dict[str, float]:
    """Of the answers with the highest scores, the share right, by the share of all items that is answered."""
    ranked = sorted((best_calculated(record, k, score) for record in records), reverse=True)
    return {
        str(share): round(float(np.mean([flag for _, flag in ranked[: round(share * len(ranked))]])), 4)
        for share in SHARES
    }


def main() -> None:
    """Parse, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("items", type=Path, help="items-merged.jsonl of a study of controls")
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--score", default="mean_logprob")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    records = annotated(read_items(options.items), "arithmetic")
    result: dict[str, Any] = {}
    table = [["drafts", "system", "right", "draft–verify, arithmetic, minus it", "p"]]
    for k in options.drafts:
        flags = {name: right(records, rule, k) for name, rule in rules(options.score).items()}
        reference = flags["draft–verify, arithmetic"]
        for name, values in flags.items():
            rate: Any = share_right(values)
            gap = mean_difference(values, reference)
            table.append(
                [str(k), name, str(rate), f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]", f"{gap.p_value:.4f}"]
            )
            result[f"{name} of {k}"] = {"right": rate.to_dict(), "difference": gap.to_dict()}
        result[f"answered of {k}"] = answered(records, options.score, k)
    print(aligned(table))
    give_result(result, options.out)


if __name__ == "__main__":
    main()
