"""What verifiers add to a calculator: all of them read the drafts that an evaluation recorded, and choose among them.

    python bench/blind_verifiers.py --run runs/blind [--verifier joint=pool/joint …] [--out results.json]

``--run`` is a finished run of a recipe on calculator-blind families, with ``paper`` beside ``merge``. The drafts of its
report are read by the drafter itself, the merged verifiers, the pool (max), and every ``--verifier`` NAME=FOLDER; none
is drafted. Only drafts without a false equation count. For every verifier and score: AUROC (drafts of an item are
resampled together), and the share of items whose best-scored draft is right, against the first such draft taken without
a verifier, with a paired interval. ``minimum`` and ``total`` are the least and the summed log-probability of a draft's
tokens, ``ratio`` its mean less the drafter's own. ``combined`` (one verifier) and ``stacked`` (all of ``--stack``) are
fitted on other items, in five folds.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.pool_verifier import read_again, unseen, with_scores
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.evaluation.calculator import calculates_rightly, calculator_slice
from mlx_rsgwm.evaluation.metrics import score_names, scored_drafts
from mlx_rsgwm.evaluation.records import ItemRecord, read_items
from mlx_rsgwm.evaluation.stats.intervals import auroc
from mlx_rsgwm.inference.draft import Signals
from mlx_rsgwm.inference.open import open_pipeline
from mlx_rsgwm.inference.scores import Scorer, features, fit_combination, out_of_fold

SELF = "drafter"


def verifiers_of(run: Path, given: Sequence[str]) -> dict[str, Path]:
    """Folders by name: those of the run, and the ``given`` ones as NAME=FOLDER."""
    known = {
        SELF: run / "drafter",
        "directions": run / "verifier",
        "paper": run / "paper" / "verifier",
        "pool": run / "pool",
    }
    return known | {name: Path(folder) for name, _, folder in (text.partition("=") for text in given)}


def read_by_all(
    drafter: Path, verifiers: Mapping[str, Path], records: Sequence[ItemRecord], batch_rows: int
) -> dict[str, list[Signals]]:
    """What every verifier says of every recorded draft, in order."""
    said, base = {}, None
    for name, folder in verifiers.items():
        pipeline = open_pipeline(drafter, folder, base, calibration=None, threshold=0.5)
        base = pipeline.slots.base
        said[name], seconds = read_again(pipeline, records, batch_rows)
        print(f"read by {name} in {seconds:.0f} s", flush=True)
    return said


def columns(
    said: Mapping[str, Sequence[Signals]], labels: np.ndarray, items: np.ndarray, stack: Sequence[str]
) -> dict[str, np.ndarray]:
    """The scores of every draft by ``verifier:score``, between 0 and 1 or not; higher is better."""
    by_drafter = np.array([signal.mean for signal in said[SELF]])
    scores: dict[str, Any] = {}
    for name, signals in said.items():
        mean = np.array([signal.mean for signal in signals])
        scores[f"{name}:mean_logprob"] = mean
        scores[f"{name}:yesno"] = Scorer("yesno").values(signals)
        scores[f"{name}:minimum"] = np.array([signal.minimum for signal in signals])
        scores[f"{name}:total"] = mean * [signal.tokens for signal in signals]
        if name != SELF:
            scores[f"{name}:ratio"] = mean - by_drafter
        fit = lambda some, right: Scorer("combined", fit_combination(some, right))  # noqa: E731
        scores[f"{name}:combined"] = unseen(fit, signals, labels, items)
    if stack:
        scores["stacked"] = stacked([said[name] for name in stack], labels, items)
    return {name: values for name, values in scores.items() if values is not None}


def stacked(said: Sequence[Sequence[Signals]], labels: np.ndarray, items: np.ndarray) -> np.ndarray | None:
    """One logistic regression on what several verifiers say; it has not seen the draft's item."""
    from sklearn.linear_model import LogisticRegression

    matrix = np.concatenate([features(signals)[:, :3] for signals in said], axis=1)
    matrix = (matrix - matrix.mean(axis=0)) / matrix.std(axis=0)

    def fitted(train: np.ndarray) -> Any:
        model = LogisticRegression(C=1.0, max_iter=1000).fit(matrix[train], labels[train])
        return lambda test: model.decision_function(matrix[test])

    return out_of_fold(items, labels, 42, fitted)


def summary(records: Sequence[ItemRecord]) -> dict[str, Any]:
    """By score: AUROC on the drafts that a calculator passes, and selection among them beside the control."""
    told = calculator_slice(records).to_dict()
    areas = {}
    for name in score_names(records):
        scores, correct, ids = scored_drafts(records, name, None, calculates_rightly)
        areas[name] = auroc(scores, correct, groups=ids)
        best = told["best"][name]
        gap = best["over_control"]
        line = f"{name:<26}{areas[name]}  best {best['accuracy']['value']:.3f}"
        print(f"{line}, {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]", flush=True)
    return {**told, "auroc": {name: area.to_dict() if area else None for name, area in areas.items()}}


def by_task(records: Sequence[ItemRecord]) -> dict[str, dict[str, Any]]:
    """What :func:`calculator_slice` says of every family's drafts, without the scores."""
    told = {}
    for task in dict.fromkeys(record.task for record in records):
        of_task = calculator_slice([record for record in records if record.task == task]).to_dict()
        told[task] = {name: of_task[name] for name in ("passing_wrong", "passing_right", "control", "any")}
        shown = {name: told[task][name]["accuracy"]["value"] for name in ("control", "any")}
        print(f"{task}: first {shown['control']:.3f}, any {shown['any']:.3f}", flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/blind"))
    parser.add_argument("--verifier", action="append", default=[], help="NAME=FOLDER of another verifier; repeatable")
    parser.add_argument("--stack", action="append", default=[], help="NAME of a verifier to fit on; repeatable")
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records = read_items(options.run / "report" / "items.jsonl")
    labels = np.array([draft.correct for record in records for draft in record.drafts])
    items = np.repeat(np.arange(len(records)), [len(record.drafts) for record in records])
    verifiers = verifiers_of(options.run, options.verifier)
    said = read_by_all(options.run / "drafter", verifiers, records, options.batch_rows)
    scored = with_scores(records, columns(said, labels, items, options.stack))
    told = summary(scored)
    result = {
        "items": len(records),
        "drafts": len(labels),
        "right": int(labels.sum()),
        **told,
        "by_task": by_task(records),
        "versions": versions(),
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
