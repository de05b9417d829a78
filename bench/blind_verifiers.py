"""What verifiers add to a calculator: all of them read the drafts that an evaluation recorded, and choose among them.

    python bench/blind_verifiers.py --run runs/blind --readings FOLDER [--verifier joint=FOLDER …] [--items 40]

``--run`` is a finished run of a recipe on calculator-blind families, with ``paper`` beside ``merge``. Of its report's
drafts those without a false equation are read by the paper's verifier, the drafter itself, the pool (max), and every
``--verifier`` NAME=FOLDER; what the merged verifier said is in the report. For every verifier and score: AUROC (drafts
of an item are resampled together), and the share of items whose best-scored draft is right, against the first of them
taken without a verifier, with a paired interval. ``minimum`` and ``total`` are the least and the summed log-probability
of a draft's tokens, ``ratio`` its mean less the drafter's own. ``combined`` of what is read here, and ``stacked`` of
all, are fitted on other items, in five folds. With ``--recorded`` nothing is read: the report's scores are compared.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mlx_rsgwm.bench.pool_verifier import unseen, with_scores
from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import SILENT
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.evaluation.calculator import calculates_rightly, calculator_slice
from mlx_rsgwm.evaluation.metrics import score_names, scored_drafts
from mlx_rsgwm.evaluation.records import ItemRecord, read_items
from mlx_rsgwm.evaluation.stats.intervals import auroc
from mlx_rsgwm.inference.draft import Draft, Signals
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import load_base_for, slots_of, template_of
from mlx_rsgwm.inference.pair import load_verifier, roles_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.scores import Scorer, features, fit_combination, logit, out_of_fold

SELF, MERGED = "drafter", "directions"
Reading = tuple[str, str, bool]  # question, draft, whether it ended by itself


def verifiers_of(run: Path, given: Sequence[str]) -> dict[str, Path]:
    """Folders by name: those of the run but for the verifier that its report has, and the ``given`` ones."""
    known = {"paper": run / "paper" / "verifier", SELF: run / "drafter", "pool": run / "pool"}
    return known | {name: Path(folder) for name, _, folder in (text.partition("=") for text in given)}


def read_by_all(
    drafter: Path, verifiers: Mapping[str, Path], records: Sequence[ItemRecord], batch_rows: int, readings: Path
) -> dict[str, dict[Reading, Signals]]:
    """What every verifier says of every draft; what ``readings`` holds is not read again, and equal drafts once."""
    said, base = {}, None
    texts = sorted({(record.question, draft.text, draft.finished) for record in records for draft in record.drafts})
    for name, folder in verifiers.items():
        file = readings / f"{name}.json"
        if not file.is_file():
            judges = roles_of(load_verifier(folder, None, SILENT))
            base = base or load_base_for([*judges.values()], None)
            slots = slots_of(base, {SELF: drafter, **judges})
            pipeline = DraftVerify(slots, template_of([*judges.values()]), SELF, [*judges], LoopConfig())
            encode = pipeline.tokenizer.encode
            drafts = [Draft(0, tuple(encode(text, add_special_tokens=False)), end, text) for _, text, end in texts]
            started = time.perf_counter()
            signals = pipeline.reader.signals_many([asked for asked, *_ in texts], drafts, batch_rows=batch_rows)
            print(f"{len(drafts)} drafts read by {name} in {time.perf_counter() - started:.0f} s", flush=True)
            rows = [[*key, [of.yesno, of.mean, of.minimum, of.tokens]] for key, of in zip(texts, signals, strict=True)]
            make_folder(readings)
            files.write_json(file, {"verifier": str(folder), "rows": rows})
        rows = files.read_json_object(file)["rows"]
        said[name] = {(question, text, end): Signals(*values) for question, text, end, values in rows}
    return said


def columns(
    said: Mapping[str, Sequence[Signals]],
    recorded: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    labels: np.ndarray,
    items: np.ndarray,
) -> dict[str, np.ndarray]:
    """The scores of every draft by ``verifier:score``, higher is better; ``recorded`` are those of the report."""
    scores: dict[str, Any] = {f"{MERGED}:{name}": values for name, values in recorded.items()}
    likelihoods = {name: np.array([signal.mean for signal in signals]) for name, signals in said.items()}
    likelihoods[MERGED] = np.log(recorded["mean_logprob"])
    for name, signals in said.items():
        scores[f"{name}:mean_logprob"] = likelihoods[name]
        scores[f"{name}:yesno"] = Scorer("yesno").values(signals)
        scores[f"{name}:minimum"] = np.array([signal.minimum for signal in signals])
        fit = lambda some, right: Scorer("combined", fit_combination(some, right))  # noqa: E731
        scores[f"{name}:combined"] = unseen(fit, signals, labels, items)
    for name, mean in likelihoods.items():
        scores[f"{name}:total"] = mean * tokens
        if SELF in likelihoods and name != SELF:
            scores[f"{name}:ratio"] = mean - likelihoods[SELF]
    yesno = [logit(recorded["yesno"]), *(features(signals)[:, 0] for signals in said.values())]
    scores["stacked"] = stacked(np.array([*likelihoods.values(), *yesno, tokens]).T, labels, items)
    # Ranks, for a record's scores are in [0, 1].
    return {name: rankdata(values) / len(values) for name, values in scores.items() if values is not None}


def stacked(matrix: np.ndarray, labels: np.ndarray, items: np.ndarray) -> np.ndarray | None:
    """One logistic regression on what all verifiers say (drafts, n); it has not seen the draft's item."""
    from sklearn.linear_model import LogisticRegression

    standard = (matrix - matrix.mean(axis=0)) / matrix.std(axis=0)

    def fitted(train: np.ndarray) -> Any:
        model = LogisticRegression(C=1.0, max_iter=1000).fit(standard[train], labels[train])
        return lambda test: model.decision_function(standard[test])

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


def passing(records: Sequence[ItemRecord], count: int | None) -> list[ItemRecord]:
    """The first ``count`` items of each task, with those of their drafts that a calculator passes."""
    tasks: dict[str, list[ItemRecord]] = {}
    for record in records:
        drafts = tuple(draft for draft in record.drafts if calculates_rightly(record, draft))
        if len(tasks.setdefault(record.task, [])) != count:
            # Without any the first is the answer, as in every control; it is read, and the only one to choose.
            chosen = drafts or record.drafts[:1]
            tasks[record.task].append(
                replace(
                    record, drafts=chosen, attempts=len(chosen), chosen=0, score_name="", threshold=1.0, accepted=False
                )
            )
    return [record for of_task in tasks.values() for record in of_task]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/blind"))
    parser.add_argument("--verifier", action="append", default=[], help="NAME=FOLDER of another verifier; repeatable")
    parser.add_argument("--recorded", action="store_true", help="read nothing")
    parser.add_argument("--readings", type=Path, default=Path("readings"), help="kept here, and taken from here")
    parser.add_argument("--items", type=int, help="of each family, the first; all by default")
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records = passing(read_items(options.run / "report" / "items.jsonl"), options.items)
    drafts = [(record, draft) for record in records for draft in record.drafts]
    labels = np.array([draft.correct for _, draft in drafts])
    items = np.repeat(np.arange(len(records)), [len(record.drafts) for record in records])
    verifiers = {} if options.recorded else verifiers_of(options.run, options.verifier)
    by_text = read_by_all(options.run / "drafter", verifiers, records, options.batch_rows, options.readings)
    said = {
        name: [of[record.question, draft.text, draft.finished] for record, draft in drafts]
        for name, of in by_text.items()
    }
    tokens = np.array([draft.tokens + draft.finished for _, draft in drafts])
    names = [name for name in drafts[0][1].scores if all(name in draft.scores for _, draft in drafts)]
    recorded = {name: np.array([draft.scores[name] for _, draft in drafts]) for name in names}
    scored = with_scores(records, columns(said, recorded, tokens, labels, items))
    told = {"items": len(records), "drafts": len(labels), "right": int(labels.sum()), **summary(scored)}
    result = {**told, "by_task": by_task(records), "versions": versions()}
    give_result(result, options.out)


if __name__ == "__main__":
    main()
