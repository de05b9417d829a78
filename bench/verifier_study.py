"""What a small verifier needs: scores on the drafter's own drafts, perturbed against on-policy negatives, calibration.

Drafts are made once by the drafter of a finished demo run and kept; every verifier reads the same ones. Stages leave
files in ``--out`` and are skipped when these are there, so that the study can be stopped and taken up again:

    rsgwm demo --out runs/demo
    python bench/verifier_study.py draft --demo runs/demo --out runs/study
    python bench/verifier_study.py train --demo runs/demo --out runs/study --verifier perturbed
    python bench/verifier_study.py read --demo runs/demo --out runs/study --verifier demo
    python bench/verifier_study.py read --demo runs/demo --out runs/study --verifier perturbed
    python bench/verifier_study.py report --demo runs/demo --out runs/study --plot docs/lab-notes/verifier.png

``--verifier`` is ``demo`` (the merged one of the run, which needs no training) or a key of ``VERIFIERS``. ``report``
shows those that have been read; its last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.verifier_picture import plot
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import CheckFailed
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.scoring import calibration_error
from mlx_rsgwm.data.corpus import CorpusRow, load_corpus, save_corpus
from mlx_rsgwm.data.hard_negatives import make_mixed_rows
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.evaluation.judging import judge, read_all
from mlx_rsgwm.evaluation.stats.bootstrap import blocks_of, gatherer, percentile_interval, resampled
from mlx_rsgwm.evaluation.stats.intervals import auroc, wilson
from mlx_rsgwm.inference.calibration_fit import Judged, fit
from mlx_rsgwm.inference.draft import Draft, Signals
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.risk_control import Items, Target
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.scores import SCORES, Scorer
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter, is_complete
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train

TASKS = ("change", "groups", "compare", "prices")
SEED = 42
SAMPLING = Sampling(0.7, 0.9, 32, SEED)
# Questions of each family, those passed over first (the demo's own training questions), drafts of each.
SPLITS = {"test": (60, 0, 3), "calibration": (75, 0, 3), "train": (120, 200, 2)}
# Pairs of each family and the share of them whose wrong answer is a draft; one adapter for all families, or one each
# and merged. All learn to answer from the demo's own draft rows too.
PAIRS = 80
VERIFIERS = {
    "perturbed": {"share": 0.0, "merged": False},
    "drafted": {"share": 0.75, "merged": False},
    "merged-drafted": {"share": 0.75, "merged": True},
}
TRAINING = TrainConfig(epochs=1, learning_rate=1e-3, num_layers=16)
TARGETS = (0.05, 0.10, 0.20)
SPLITS_TRIED = 100
RESAMPLES = 1000


def questions_of(split: str) -> list[Question]:
    """The questions of a split, of all tasks."""
    count, offset, _ = SPLITS[split]
    return [q for task in TASKS for q in select_questions(task, split, count, SEED, offset=offset).questions]


def pipeline_of(base: Any, demo: Path, drafter: Path | None, verifier: Path | None) -> DraftVerify:
    """A pipeline over adapter folders; None is the bare base."""
    pair = {"drafter": drafter, "verifier": verifier}
    slots = slots_of(base, {name: path for name, path in pair.items() if path is not None})
    template = Template.from_description(Adapter.load(demo / "drafter").manifest["template"])
    roles = ("drafter" if drafter else None, "verifier" if verifier else None)
    return DraftVerify(slots, template, roles[0], roles[1], LoopConfig(3, sampling=SAMPLING), calibration=None)


def draft_stage(base: Any, demo: Path, out: Path) -> None:
    """Have the demo's drafter write drafts of every split, and keep them with their labels."""
    pipeline = pipeline_of(base, demo, demo / "drafter", None)
    for split, (_, _, attempts) in SPLITS.items():
        for task in TASKS:
            path = out / "drafts" / f"{split}-{task}.json"
            if path.is_file():
                continue
            started = time.process_time()
            questions = [question for question in questions_of(split) if question.task == task]
            drafted = pipeline.draft_many([q.question for q in questions], attempts, batch_rows=96)
            rows: list[dict[str, Any]] = [
                {
                    "question": asdict(question),
                    "drafts": [{**asdict(draft), "correct": judge(question, draft, {}).correct} for draft in drafts],
                }
                for question, drafts in zip(questions, drafted, strict=True)
            ]
            make_folder(path.parent)
            files.write_json(path, rows)
            right = np.mean([draft["correct"] for row in rows for draft in row["drafts"]])
            seconds = time.process_time() - started
            print(f"{split}, {task}: {len(rows)} questions, {right:.3f} right, {seconds:.0f} processor s", flush=True)


def read_drafts(out: Path, split: str) -> tuple[list[Question], list[list[Draft]], list[list[bool]]]:
    """What :func:`draft_stage` kept: questions, and by question the drafts and whether each is right."""
    rows = [row for task in TASKS for row in files.read_json(out / "drafts" / f"{split}-{task}.json")]
    questions = [Question(**row["question"]) for row in rows]
    drafts = [
        [Draft(d["attempt"], tuple(d["tokens"]), d["finished"], d["text"]) for d in row["drafts"]] for row in rows
    ]
    return questions, drafts, [[d["correct"] for d in row["drafts"]] for row in rows]


def corpora(demo: Path, out: Path, name: str) -> dict[str, Path]:
    """The corpus of every family for one verifier: the demo's draft rows and pairs of this study."""
    settings = VERIFIERS[name]
    questions, drafts, correct = read_drafts(out, "train")
    folders = {}
    for task in TASKS:
        indices = [index for index, question in enumerate(questions) if question.task == task]
        labelled = [[(d.text, c) for d, c in zip(drafts[i], correct[i], strict=True)] for i in indices]
        mixed = make_mixed_rows([questions[i] for i in indices], labelled, PAIRS, settings["share"], SEED)
        before = load_corpus(demo / "data" / task)
        rows = [row for row in before.rows if row.role == "draft"] + mixed.rows
        folders[task] = out / "corpora" / name / task
        counts = {"drafted_pairs": mixed.drafted_pairs, "perturbed_pairs": mixed.perturbed_pairs}
        save_corpus(folders[task], rows, before.template, {"seed": SEED, "task": task, "negatives": counts})
        print(f"{name}, {task}: {counts}", flush=True)
    return folders


def train_stage(base: Any, demo: Path, out: Path, name: str) -> None:
    """Train one verifier of ``VERIFIERS``, unless it is there."""
    target = out / "verifiers" / name
    if is_complete(target):
        return
    started = time.process_time()
    folders = corpora(demo, out, name)
    if VERIFIERS[name]["merged"]:
        pool = []
        for task, folder in folders.items():
            pool.append(out / "pools" / name / task)
            if not is_complete(pool[-1]):
                saving = Saving(pool[-1], every=20, resume="replace")
                finish(train(base, load_corpus(folder), TRAINING, label=task, saving=saving), saving)
        merge(pool, MergeOptions(method="rsgwm", role="verify", parameters={"tau": 0.5})).save(target)
    else:
        loaded = [load_corpus(folder) for folder in folders.values()]
        rows: list[CorpusRow] = [row for corpus in loaded for row in corpus.rows]
        together = save_corpus(out / "corpora" / name / "all", rows, loaded[0].template, {"seed": SEED})
        saving = Saving(target, every=20, resume="replace")
        finish(train(base, together, TRAINING, label=name, saving=saving), saving)
    print(f"{name}: trained in {time.process_time() - started:.0f} processor s", flush=True)


def read_stage(base: Any, demo: Path, out: Path, name: str) -> None:
    """Have one verifier read the drafts to calibrate and test on, and keep its signals."""
    verifier = demo / "verifier" if name == "demo" else out / "verifiers" / name
    pipeline = pipeline_of(base, demo, None, verifier)
    for split in ("test", "calibration"):
        path = out / "read" / name / f"{split}.json"
        if path.is_file():
            continue
        started = time.process_time()
        questions, drafts, correct = read_drafts(out, split)
        signals = read_all(pipeline, [question.question for question in questions], drafts)
        make_folder(path.parent)
        files.write_json(
            path, {"signals": [[asdict(signal) for signal in item] for item in signals], "correct": correct}
        )
        print(f"{name}, {split}: read in {time.process_time() - started:.0f} processor s", flush=True)


def judged(out: Path, name: str, split: str) -> Judged:
    """What :func:`read_stage` kept."""
    stored = files.read_json(out / "read" / name / f"{split}.json")
    return Judged([[Signals(**signal) for signal in item] for item in stored["signals"]], stored["correct"])


def interval(values: Sequence[float] | np.ndarray) -> list[float]:
    """95 % percentile interval of resampled figures, as it is printed."""
    return [round(value, 4) for value in percentile_interval(values)]


def gap_closed(items: Items, threshold: float | None) -> tuple[float, list[float]]:
    """Share of the gap between first draft and oracle that a rule closes, and its interval (items resampled).

    ``threshold`` None takes the best-scored of all drafts; else the loop's rule.
    """
    best = items.scores.argmax(axis=1)
    if threshold is not None:
        reaching = items.scores >= threshold
        best = np.where(reaching.any(axis=1), reaching.argmax(axis=1), best)
    chosen = items.correct[np.arange(len(best)), best].astype(float)
    first, oracle = items.correct[:, 0].astype(float), items.correct.any(axis=1).astype(float)

    def share(rows: np.ndarray) -> float:
        gap = oracle[rows].mean() - first[rows].mean()
        return float((chosen[rows].mean() - first[rows].mean()) / gap) if gap else 0.0

    return round(share(np.arange(len(best))), 4), interval(resampled(share, len(best), SEED, RESAMPLES))


def scores_of(name: str, out: Path) -> dict[str, Any]:
    """AUROC, gap closed and reliability of every score on the test items, all fitted on the calibration items."""
    calibration = fit(judged(out, name, "calibration"))
    test = judged(out, name, "test")
    signals, labels, owners = test.flat
    scores: dict[str, Any] = {"picked": calibration.score, "scores": {}}
    for score in SCORES:
        scorer = calibration.scorer(score)
        raw, curve = scorer.values(signals), calibration.curves[score]
        values = curve.probabilities(raw)
        rate = auroc(values.tolist(), labels.tolist(), groups=owners.tolist())
        assert rate is not None
        items = test.scored(scorer)
        calibrated = calibration if score == calibration.score else fit(judged(out, name, "calibration"), score=score)
        threshold = calibrated.threshold
        best, best_interval = gap_closed(items, None)
        loop, loop_interval = gap_closed(items, threshold)
        scores["scores"][score] = {
            "auroc": rate.to_dict(),
            "auroc_calibration_items": calibration.auroc[score],
            "gap_closed_best_of_3": [best, best_interval],
            "gap_closed_loop": [loop, loop_interval],
            "threshold": threshold,
            "method": curve.method,
            "ece_before": _ece(raw, labels, owners),
            "ece_after": _ece(values, labels, owners),
        }
    return scores


def _ece(scores: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> list[Any]:
    """Calibration error and its interval, items resampled with all their drafts."""
    drafts = blocks_of(owners.tolist())
    members = gatherer(drafts)

    def of(items: np.ndarray) -> float:
        rows = members(items)
        return calibration_error(scores[rows], labels[rows])

    return [calibration_error(scores, labels), interval(resampled(of, len(drafts), SEED, RESAMPLES // 5))]


def risk_bounds_of(name: str, out: Path) -> dict[str, Any]:
    """Risk bounds and the rates that came out: once as the command would do it, and over many random divisions."""
    calibration, test = judged(out, name, "calibration"), judged(out, name, "test")
    everything = Judged([*calibration.signals, *test.signals], [*calibration.correct, *test.correct])
    by_rate: dict[str, Any] = {}
    for far in TARGETS:
        once: dict[str, Any]
        try:
            made = fit(calibration, target=Target(far))
            assert made.risk_bound is not None
            accepted, wrong = test.scored(made.scorer(made.score)).counts(made.threshold)
            rate = wilson(wrong, accepted)
            once = {
                "score": made.score,
                "risk_bound": made.risk_bound.to_dict(),
                "realised": rate.to_dict() if rate else None,
                "accept_rate": accepted / len(test),
            }
        except CheckFailed as refused:
            once = {"refused": str(refused)}
        realised, accepts = [], []
        for division in range(SPLITS_TRIED):
            order = np.random.default_rng([SEED, division]).permutation(len(everything))
            held, unseen = everything.take(order[: len(order) // 2]), everything.take(order[len(order) // 2 :])
            try:
                made = fit(held, score="combined", method="platt", target=Target(far), seed=division)
            except CheckFailed:
                continue
            accepted, wrong = unseen.scored(made.scorer(made.score)).counts(made.threshold)
            realised.append(wrong / max(accepted, 1))
            accepts.append(accepted / len(unseen))
        by_rate[str(far)] = {
            "once": once,
            "divisions": SPLITS_TRIED,
            "bounded": len(realised),
            "realised_mean": float(np.mean(realised)) if realised else None,
            "realised_spread": interval(realised) if realised else None,
            "accept_rate_mean": float(np.mean(accepts)) if accepts else None,
            "above_target": int(sum(value > far for value in realised)),
        }
    return by_rate


def report_stage(out: Path, path: Path | None) -> None:
    """Compare the verifiers, print the summary as JSON, and draw the picture at ``path``."""
    names = [name for name in ("demo", *VERIFIERS) if (out / "read" / name / "calibration.json").is_file()]
    test = judged(out, names[0], "test")
    plain = test.scored(Scorer("mean_logprob"))
    verifiers = {name: scores_of(name, out) for name in names}
    ranked = [
        (quality["auroc"]["value"], name, score)
        for name in names
        for score, quality in verifiers[name]["scores"].items()
    ]
    _, best, score = max(ranked)
    summary = {
        "questions": len(test),
        "attempts": 3,
        "first_draft": float(plain.correct[:, 0].mean()),
        "any_of_3": float(plain.correct.any(axis=1).mean()),
        "verifiers": verifiers,
        "best": {"verifier": best, "score": score},
        "risk_bounds": risk_bounds_of(best, out),
    }
    for name, quality in verifiers.items():
        for used, row in quality["scores"].items():
            rate = row["auroc"]
            print(
                f"{name:<15} {used:<13} AUROC {rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]  gap closed: "
                f"best of 3 {row['gap_closed_best_of_3']}, loop {row['gap_closed_loop']}  "
                f"ECE {row['ece_before'][0]:.3f} → {row['ece_after'][0]:.3f} ({row['method']})"
            )
    files.write_json(out / "summary.json", summary)
    if path is not None:
        plot(summary, judged(out, best, "calibration"), judged(out, best, "test"), path)
    print(json.dumps(summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["draft", "train", "read", "report"])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--verifier", choices=["demo", *VERIFIERS])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    make_folder(arguments.out)
    if arguments.stage == "report":
        report_stage(arguments.out, arguments.plot)
        return
    base = load_base("smollm2-135m")
    if arguments.stage == "draft":
        draft_stage(base, arguments.demo, arguments.out)
    elif arguments.stage == "train":
        train_stage(base, arguments.demo, arguments.out, arguments.verifier)
    else:
        read_stage(base, arguments.demo, arguments.out, arguments.verifier)


if __name__ == "__main__":
    main()
