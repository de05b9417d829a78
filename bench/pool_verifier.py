"""The pool as verifier against the merged one, on drafts that an evaluation recorded: who tells right from wrong.

    python bench/pool_verifier.py --run runs/demo [--batch-rows 32] [--out results.json]

``--run`` is a finished demo run. The drafts of its report are read again, by the merged verifier and by all adapters
of the pool in one batch; nothing is drafted. For every rule and score: AUROC over all drafts with an interval (drafts
of an item are resampled together), the share of items whose best-scored draft is right, and that share against the
merged verifier's with a paired interval. What is fitted (``combined``, the rule ``learned``) is fitted on other items,
in five folds. Whatever stands under ``arithmetic`` counts only drafts without a false equation.

The last line is JSON; ``reread`` is the largest difference of the merged verifier's mean_logprob from the recorded one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.arithmetic import false_equations
from mlx_rsgwm.evaluation.metrics import any_of_k, verifier_auroc
from mlx_rsgwm.evaluation.records import ItemRecord, read_items, replay
from mlx_rsgwm.evaluation.stats.paired import mean_difference
from mlx_rsgwm.inference.draft import Draft, Signals
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import open_pipeline
from mlx_rsgwm.inference.pool import RULES, together
from mlx_rsgwm.inference.scores import SCORES, Scorer, fit_combination, fit_learned, out_of_fold

REFERENCE = "merged:mean_logprob"


def read_again(pipeline: DraftVerify, records: Sequence[ItemRecord], batch_rows: int) -> tuple[list[Signals], float]:
    """What the verifier says of every recorded draft in order, and how many seconds that took."""
    encode = pipeline.tokenizer.encode
    drafts = [
        Draft(0, tuple(encode(draft.text, add_special_tokens=False)), draft.finished, draft.text)
        for record in records
        for draft in record.drafts
    ]
    owners = [record.question for record in records for _ in record.drafts]
    started = time.perf_counter()
    signals = pipeline.reader.signals_many(owners, drafts, batch_rows=batch_rows)
    return signals, time.perf_counter() - started


def unseen(
    fit_scorer: Callable[[list[Signals], np.ndarray], Scorer],
    signals: Sequence[Signals],
    labels: np.ndarray,
    items: np.ndarray,
) -> np.ndarray | None:
    """Scores by what was fitted on other items."""

    def fitted(train: np.ndarray) -> Any:
        scorer = fit_scorer([signals[index] for index in train], labels[train])
        return lambda test: scorer.values([signals[index] for index in test])

    return out_of_fold(items, labels, 42, fitted)


def values_of(name: str, rule: str, signals: Sequence[Signals], labels: np.ndarray, items: np.ndarray) -> Any:
    """The score of every draft by a rule; what is fitted has not seen the draft's item."""
    if rule == "learned":
        learn = lambda some, right: Scorer(name, learned=fit_learned(name, some, right))  # noqa: E731
        return unseen(learn, signals, labels, items)
    if name == "combined":
        return unseen(lambda some, right: Scorer(name, fit_combination(some, right)), signals, labels, items)
    return Scorer(name).values(signals)


def columns(merged: Sequence[Signals], pool: Sequence[Signals], records: Sequence[ItemRecord]) -> dict[str, np.ndarray]:
    """The scores of every draft by ``verifier:score``."""
    labels = np.array([draft.correct for record in records for draft in record.drafts])
    items = np.repeat(np.arange(len(records)), [len(record.drafts) for record in records])
    said = {"merged": ("max", merged)}
    said |= {f"pool {rule}": (rule, [together(signal.each, rule) for signal in pool]) for rule in RULES}
    scores = {
        f"{verifier}:{name}": values_of(name, rule, signals, labels, items)
        for verifier, (rule, signals) in said.items()
        for name in SCORES
    }
    return {name: values for name, values in scores.items() if values is not None}


def with_scores(records: Sequence[ItemRecord], scores: dict[str, np.ndarray]) -> list[ItemRecord]:
    """The records with these scores alone, accepted by none of them."""
    rows, place = [], 0
    for record in records:
        drafts = []
        for draft in record.drafts:
            drafts.append(replace(draft, scores={name: float(values[place]) for name, values in scores.items()}))
            place += 1
        plain = replace(record, drafts=tuple(drafts), score_name=REFERENCE, threshold=1.0, accepted=False)
        rows.append(replace(plain, attempts=len(drafts), chosen=0))
    return rows


def summary(records: Sequence[ItemRecord], count: int) -> dict[str, Any]:
    """By score: AUROC, the share of items whose best of ``count`` is right, its difference to the merged verifier's."""
    areas = verifier_auroc(records)
    right = {
        name: np.array([replay(record, 1.0, len(record.drafts), name).returned.correct for record in records])
        for name in areas
    }
    told = {}
    for name, by_label in areas.items():
        area, difference = by_label["all"], mean_difference(right[REFERENCE] * 1.0, right[name] * 1.0)
        told[name] = {
            "auroc": area.to_dict() if area else None,
            "best": round(float(right[name].mean()), 4),
            "against_merged": difference.to_dict(),
        }
        print(f"{name:<26}{area}  best of {count} {right[name].mean():.3f}, {difference.value:+.3f}", flush=True)
    first = round(float(np.mean([record.first.correct for record in records])), 4)
    print(f"{len(records)} items, first draft {first:.3f}", flush=True)
    return {"items": len(records), "first": first, "by_score": told}


def calculated(records: Sequence[ItemRecord]) -> list[ItemRecord]:
    """The records with the drafts alone that state no false equation, of items that have any."""
    passed = [[draft for draft in record.drafts if not false_equations(draft.text)] for record in records]
    return [
        replace(record, drafts=tuple(drafts), attempts=len(drafts), chosen=0)
        for record, drafts in zip(records, passed, strict=True)
        if drafts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records = read_items(options.run / "report" / "items.jsonl")
    merged = open_pipeline(options.run / "drafter", options.run / "verifier", calibration=None, threshold=0.5)
    by_merged, merged_seconds = read_again(merged, records, options.batch_rows)
    pool = open_pipeline(options.run / "drafter", options.run / "pool", merged.slots.base, calibration=None)
    by_pool, pool_seconds = read_again(pool, records, options.batch_rows)
    print(f"read in {merged_seconds:.1f} s, by the pool in {pool_seconds:.1f} s", flush=True)
    recorded = [draft.scores["mean_logprob"] for record in records for draft in record.drafts]
    moved = [abs((signal.mean_logprob or 0.0) - old) for signal, old in zip(by_merged, recorded, strict=True)]
    scored = with_scores(records, columns(by_merged, by_pool, records))
    count = len(records[0].drafts)
    ceiling = any_of_k(records, count)
    result = {
        "items": len(records),
        "drafts": len(recorded),
        "any": ceiling.to_dict() if ceiling else None,
        "reread": round(max(moved), 6),
        "seconds": {"merged": round(merged_seconds, 1), "pool": round(pool_seconds, 1)},
        "scores": summary(scored, count),
        "arithmetic": summary(calculated(scored), count),
        "versions": versions(),
    }
    give_result(result, options.out)


if __name__ == "__main__":
    main()
