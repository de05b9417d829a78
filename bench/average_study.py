"""Averages of a run's checkpoints beside its last and its best one, on held-out rows: runs of several tasks and seeds.

    python bench/average_study.py FOLDER [--task change] [--seed 0] [--steps 100] [--questions DATA] [--results FILE]

Every run keeps its checkpoints, each with the loss of validation rows. Then the last checkpoint, the one of least
validation loss, the uniform mean, means weighted by that loss (p = .5, .7, .9) and by steps are scored on test rows,
row by row, and greedy answers to test questions are counted. Whatever is finished in FOLDER is not made again.

The last line is JSON: for every task each variant's loss in nats per token, its paired differences from the last
checkpoint and from the uniform mean, and accuracy; test rows are those of every seed, seeds are averaged within a row
and rows resampled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.core.resume import stamped
from mlx_rsgwm.data.corpus import Corpus, make_rows, save_corpus
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.evaluation.judging import judge
from mlx_rsgwm.evaluation.stats.paired import RESAMPLES, mean_difference
from mlx_rsgwm.evaluation.stats.stratified import item_counts, item_mean
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.adapter import MANIFEST_FILE, Adapter, is_complete, read_manifest
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.models.slots import unwrap
from mlx_rsgwm.training.average_weights import AverageOptions
from mlx_rsgwm.training.averaging import Weighted, mean_of, weigh
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train
from mlx_rsgwm.training.losses import row_nats
from mlx_rsgwm.training.run_checkpoints import RunCheckpoint, run_checkpoints

TASKS = ("change", "groups", "gsm8k")
LAST, BEST, UNIFORM = "last", "best", "uniform"
WEIGHTED: Mapping[str, AverageOptions] = {
    UNIFORM: AverageOptions(penalty=1.0, power=0.0),
    **{f"loss-{p}": AverageOptions("validation-loss", p) for p in (0.5, 0.7, 0.9)},
    **{f"steps-{p}": AverageOptions("steps", p) for p in (0.5, 0.7, 0.9)},
}
VARIANTS = (LAST, BEST, *WEIGHTED)


def corpora(
    task: str, folder: Path, seed: int, options: argparse.Namespace
) -> tuple[dict[str, Corpus], list[Question]]:
    """Rows to train on, to validate and to test on, of other questions each, and the test's questions."""
    # Validation rows come after those that are trained on: not every data set has a split of its own for them.
    wanted = {
        "train": ("train", options.rows, 0),
        "validation": ("train", options.validation, options.rows),
        "test": ("test", options.items, 0),
    }
    made, asked = {}, []
    for name, (purpose, count, offset) in wanted.items():
        # Test rows are the same for every seed, so that a row's differences can be averaged over them.
        chosen = select_questions(task, purpose, count, 0 if name == "test" else seed, options.questions, offset=offset)
        rows = make_rows(chosen.questions, count, 0, seed)
        made[name] = save_corpus(folder / "data" / name, rows, find_template("plain"), {"seed": seed, "task": task})
        asked = list(chosen.questions)
    return made, asked


def train_run(base: Base, data: Mapping[str, Corpus], folder: Path, seed: int, options: argparse.Namespace) -> Path:
    """A run with its checkpoints, unless it is there."""
    out = folder / "run"
    config = TrainConfig(
        steps=options.steps, learning_rate=options.learning_rate, num_layers=options.layers, seed=seed, init_seed=seed,
        schedule=options.schedule, directions=0,
    )  # fmt: skip
    unwrap(base.model)  # of the slots in which another run's averages were scored
    if is_complete(out):
        made = read_manifest(out / MANIFEST_FILE)
        if (made["config"], made["data"]["hash"]) != (config.describe(), data["train"].hash):
            raise SystemExit(f"{out} was trained with other settings or rows; remove it, or name another folder")
    else:
        saving = Saving(out, options.steps // options.checkpoints, options.checkpoints, "continue", ())
        adapter = train(
            base, data["train"], config, data["validation"], label=str(out), progress=LineProgress(), saving=saving
        )
        finish(adapter, saving)
    return out


def variants(checkpoints: Sequence[RunCheckpoint]) -> dict[str, Weighted]:
    """Which checkpoints each variant averages, with their weights; of the first two a single one."""
    losses = [np.inf if each.validation_loss is None else each.validation_loss for each in checkpoints]
    best = int(np.argmin(losses))
    single = {LAST: len(checkpoints) - 1, BEST: best}
    return {
        **{name: Weighted((checkpoints[place],), np.ones(1), name) for name, place in single.items()},
        **{name: weigh(checkpoints, setting) for name, setting in WEIGHTED.items()},
    }


def measured(
    base: Base, name: str, weighted: Weighted, test: Corpus, asked: Sequence[Question], options: argparse.Namespace
) -> dict[str, Any]:
    """Loss of every test row, and which of the test's questions are answered rightly."""
    adapter = mean_of(weighted, WEIGHTED.get(name, AverageOptions()))
    rows, _ = test.token_rows(base.tokenizer, 1024, "drop")
    slots = slots_of(base, {name: adapter})
    with slots.using(name):
        nats, counts = row_nats(slots.model, rows, options.batch_rows)
    right: list[bool] = []
    if options.answered:
        sampling = Sampling(0.0, 1.0, options.max_tokens, 0)
        pipeline = DraftVerify(slots, find_template("plain"), name, None, LoopConfig(1, sampling=sampling))
        chosen = asked[: options.answered]
        drafted = pipeline.draft_many([q.question for q in chosen], 1, batch_rows=options.batch_rows)
        right = [bool(judge(q, drafts[0], {}).correct) for q, drafts in zip(chosen, drafted, strict=True)]
    return {"loss": (nats / counts).tolist(), "tokens": counts.tolist(), "right": right}


def run_one(base: Base, task: str, seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every variant's figures of one run, kept beside it."""
    folder = options.folder / task / f"seed-{seed}"
    data, asked = corpora(task, folder, seed, options)
    out = train_run(base, data, folder, seed, options)
    key = files.sha256_json([Adapter.load(out).files_hash(), data["test"].hash, options.answered, options.max_tokens])
    figures = {}
    for name, weighted in variants(run_checkpoints([out])).items():
        path = folder / "figures" / f"{name}.json"
        figures[name] = stamped(path, key, partial(measured, base, name, weighted, data["test"], asked, options))
        loss = float(np.mean(figures[name]["loss"]))
        print(f"{task}, seed {seed}, {name}: {loss:.4f} nats per token, a row's mean", flush=True)
    return figures


def compared(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Of one task: every variant over the seeds, paired with the last checkpoint and the uniform mean."""
    losses = {name: np.array([run[name]["loss"] for run in runs]).T for name in VARIANTS}
    result = {}
    for name in VARIANTS:
        drawn = np.random.default_rng(0)
        right = np.array([run[name]["right"] for run in runs], dtype=np.float64).mean(axis=0)
        result[name] = {
            "loss": float(losses[name].mean()),
            "by_seed": losses[name].mean(axis=0).tolist(),
            "against_last": asdict(mean_difference(losses[LAST], losses[name])),
            "against_uniform": asdict(mean_difference(losses[UNIFORM], losses[name])),
            "accuracy": item_mean(right, item_counts(drawn, len(right), RESAMPLES)).to_dict(len(right))
            if right.any()
            else None,
        }
    return result


def main() -> None:
    """Parse, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what is trained and measured is kept here")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--task", action="append", help="repeat; default: change, groups, gsm8k")
    parser.add_argument("--questions", type=Path, help="folder of data sets as TASK/SPLIT.jsonl; default: the Hub")
    parser.add_argument("--seed", action="append", type=int, help="repeat; default: 0, 1, 2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=10, help="kept of each run; must divide --steps")
    parser.add_argument("--rows", type=int, default=200, help="trained on")
    parser.add_argument("--validation", type=int, default=24, help="rows whose loss weighs checkpoints")
    parser.add_argument("--items", type=int, default=60, help="test rows")
    parser.add_argument("--answered", type=int, default=0, help="of them answered, for accuracy")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--results", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    if options.steps % options.checkpoints:
        parser.error(f"--checkpoints {options.checkpoints} does not divide --steps {options.steps}")
    make_folder(options.folder)
    base = load_base(options.base, dtype="float32")
    result = {}
    for task in options.task or TASKS:
        runs = [run_one(base, task, seed, options) for seed in options.seed or (0, 1, 2)]
        result[task] = compared(runs)
        print(json.dumps({task: {name: round(row["loss"], 4) for name, row in result[task].items()}}), flush=True)
    give_result(result, options.results)


if __name__ == "__main__":
    main()
