"""Training in rounds beside one-shot merging and joint training: the same rows and steps for all, three seeds.

    python bench/rounds_study.py FOLDER [--seed 0] [--condition mean-4] [--steps 24] [--items 24] [--results FILE]

The demo's four families. Condition ``once`` is a pool that is merged after training; ``mean-K`` is trained in K rounds
merged by the mean, ``regmean-K`` merged by the directions that each round's training records; ``joint`` is one adapter
on all rows for as many steps as a pool takes together. Of every pool the drafter and verifier are merged by the
methods of ``--methods``, and each pair's accuracy and AUROC measured by a merge sweep on held-out questions. Whatever
is finished in FOLDER is not made again.

The last line is JSON: by condition and merge accuracy, its share of joint training's and what it has over the one-shot
pool's same merge (questions resampled within seed and task), AUROC, and the mean cosine between the tasks' updates of
every round. Labelled answers are gold, perturbed gold and drafts by the pool's own mean, so those differ by condition.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.merge_study import questions, save_questions
from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.data.corpus import Corpus, CorpusRow, make_rows, save_corpus
from mlx_rsgwm.data.questions import load_jsonl
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.evaluation.stats.paired import RESAMPLES
from mlx_rsgwm.evaluation.stats.stratified import Estimate, item_counts, item_mean, stratified_mean
from mlx_rsgwm.merging.alternate import FOLDER as ROUNDS_FOLDER
from mlx_rsgwm.merging.alternate import RECORD_FILE, mean_cosine, train_rounds
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.studies.merge_sweep import Measured, Plan, Sweep
from mlx_rsgwm.studies.sweep_report import render_table, write_sweep
from mlx_rsgwm.studies.sweep_variants import parse_variants
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.pool import Member, train_pool
from mlx_rsgwm.training.rounds import Rounds

TASKS = ("change", "groups", "compare", "prices")
JOINT, ONCE = "joint", "once"
CONDITIONS: Mapping[str, Rounds | None] = {
    ONCE: None,
    **{f"mean-{count}": Rounds(count) for count in (2, 4, 8)},
    **{f"regmean-{count}": Rounds(count, method="regmean") for count in (2, 4, 8)},
    "mean-8-run": Rounds(8, schedule="run"),  # one decay over all rounds, as joint training has
    "regmean-8-run": Rounds(8, method="regmean", schedule="run"),
    "mean-8-alpha-2": Rounds(8, alpha=2.0),  # late updates have little in common, and their mean is a quarter of each
}
METHODS = ("linear,regmean,rsgwm:space=product",)
DRAFT_SHARE = 9 / 11  # the demo's 144 of 176 rows
JUDGED_ITEMS, MAX_TOKENS = 10, 32
# Of every token, as a round sees few.
SETTINGS: Mapping[str, Any] = {"learning_rate": 1e-3, "num_layers": 16, "directions_every": 1}


def corpora(folder: Path, seed: int, rows: int) -> dict[str, Corpus]:
    """Every family's corpus of ``rows`` rows, and that of all together under ``joint``."""
    made: dict[str, Corpus] = {}
    everything: list[CorpusRow] = []
    draft = round(rows * DRAFT_SHARE)
    verify = 2 * ((rows - draft) // 2)
    for task in TASKS:
        chosen = make_rows(questions(task, "train", max(draft, 2 * verify), seed), draft, verify, seed)
        made[task] = save_corpus(folder / "data" / task, chosen, find_template("plain"), {"seed": seed, "task": task})
        everything += chosen
    made[JOINT] = save_corpus(folder / "data" / JOINT, everything, find_template("plain"), {"seed": seed})
    return made


def train_condition(base: Base, name: str, folder: Path, seed: int, rows: int, settings: Mapping[str, Any]) -> None:
    """Train the pool of one condition into ``folder``/name, and the joint adapter, as far as they are not there."""
    data = corpora(folder, seed, rows)
    members = [Member(task, data[task]) for task in TASKS]
    config = TrainConfig(**{**SETTINGS, **settings, "seed": seed, "init_seed": seed, "rounds": CONDITIONS[name]})
    saving, progress = Saving(folder / name, resume="continue", snapshots=()), LineProgress()
    if config.rounds:
        train_rounds(base, TASKS, members, config, saving, progress=progress)
    else:
        train_pool(base, members, config, saving, progress=progress)
        together = TrainConfig(**{**SETTINGS, **settings, "seed": seed, "init_seed": seed})
        together = TrainConfig(**{**vars(together), "steps": together.steps * len(TASKS)})
        train_pool(base, [Member(JOINT, data[JOINT])], together, Saving(folder, resume="continue"), progress=progress)


def sweep(base: Base, name: str, folder: Path, methods: Sequence[str], seed: int, items: int, judged: int) -> Measured:
    """Every merge of one condition's pool, and the joint adapter beside the one-shot pool's."""
    test = [question for task in TASKS for question in load_jsonl(save_questions(folder / "test", task, items, seed))]
    plan = Plan(
        pool=tuple(folder / name / task for task in TASKS),
        variants=tuple(parse_variants(methods)),
        questions=tuple(test),
        template=find_template("plain"),
        extras={JOINT: folder / JOINT} if name == ONCE else {},
        judged=judged,
        max_tokens=MAX_TOKENS,
        seed=seed,
        alone=False,
    )
    return Sweep(base, plan, folder / name / "sweep", LineProgress()).execute()


def cosines(folders: Sequence[Path]) -> list[list[float]]:
    """By round, the mean cosine between the tasks' updates in each of some pools (of the seeds)."""
    told = [sorted((folder / ROUNDS_FOLDER).glob(f"round-*/{RECORD_FILE}")) for folder in folders]
    return [[mean_cosine(files.read_json_object(path)) for path in row] for row in zip(*told, strict=True)]


def compared(runs: Mapping[str, Sequence[Measured]], seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Of every condition's merges the share of joint training's accuracy, and what they have over the same merge of
    ``once``, with intervals: all answer a seed's questions, which are resampled within seed and task."""
    drawn = np.random.default_rng(seed)
    strata = [
        (place, [i for i, question in enumerate(run.questions) if question.task == task])
        for place, run in enumerate(runs[ONCE])
        for task in dict.fromkeys(question.task for question in run.questions)
    ]
    counts = [item_counts(drawn, len(items), RESAMPLES) for _, items in strata]

    def accuracies(condition: str) -> dict[str, Estimate]:
        return {name: stratified_mean(parts) for name, parts in _by_stratum(runs[condition], strata, counts).items()}

    once = accuracies(ONCE)
    return {
        condition: {
            name: {
                "of_joint": value.over(once[JOINT]).to_dict(sum(len(items) for _, items in strata)),
                **({"over_once": value.minus(once[name])} if name in once else {}),
            }
            for name, value in accuracies(condition).items()
        }
        for condition in runs
    }


def _by_stratum(
    runs: Sequence[Measured], strata: Sequence[tuple[int, list[int]]], counts: Sequence[np.ndarray]
) -> dict[str, list[Estimate]]:
    """Every candidate's accuracy in each stratum."""
    rights = [
        {outcome.name: np.array([float(ok) for _, ok in outcome.drafts]) for outcome in run.outcomes} for run in runs
    ]
    return {
        name: [
            item_mean(rights[place][name][items], drawn) for (place, items), drawn in zip(strata, counts, strict=True)
        ]
        for name in rights[0]
    }


def brief(
    summaries: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Sequence[Measured]],
    folder: Path,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """The last line's object: every row of every condition's table, beside the joint adapter."""
    beside = compared(runs) if ONCE in runs else {}
    result: dict[str, Any] = {}
    for name, summary in summaries.items():
        merges = {
            row["name"]: {
                "accuracy": row["accuracy"],
                **beside.get(name, {}).get(row["name"], {}),
                "auroc": {score: told["all"] for score, told in row["auroc"].items()},
            }
            for row in summary["rows"]
        }
        pools = [folder / f"seed-{seed}" / name for seed in seeds]
        result[name] = {"n": sum(summary["tasks"].values()), "merges": merges, "cosines": cosines(pools)}
    return result


def main() -> None:
    """Parse, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what is trained and measured is kept here")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--seed", action="append", type=int, help="repeat; default: 0, 1, 2")
    parser.add_argument("--condition", action="append", choices=list(CONDITIONS), help="repeat; default: all")
    parser.add_argument("--methods", action="append", help="as of rsgwm pool sweep")
    parser.add_argument("--steps", type=int, default=24, help="of each task; every number of rounds must divide it")
    parser.add_argument("--rows", type=int, default=176, help="of each task")
    parser.add_argument("--items", type=int, default=24, help="held-out questions of each task and seed")
    parser.add_argument("--judged", type=int, default=JUDGED_ITEMS, help="of them for the AUROC, several drafts each")
    parser.add_argument("--set", action="append", default=[], help="a training setting, name=value as JSON; repeat")
    parser.add_argument("--stage", choices=("train",), help="stop after this one")
    parser.add_argument("--results", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    seeds, names = options.seed or [0, 1, 2], options.condition or list(CONDITIONS)
    given = {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
    base = load_base(options.base, dtype="float32")
    for seed in seeds:
        for name in names:
            place = options.folder / f"seed-{seed}"
            train_condition(base, name, place, seed, options.rows, {**given, "steps": options.steps})
    if options.stage == "train":
        return
    summaries: dict[str, Any] = {}
    runs: dict[str, list[Measured]] = {}
    for name in names:
        runs[name] = [
            sweep(base, name, options.folder / f"seed-{seed}", options.methods or METHODS, seed, options.items,
                  options.judged)
            for seed in seeds
        ]  # fmt: skip
        summaries[name] = write_sweep(make_folder(options.folder / name), runs[name])
        print(f"\n{name}\n\n{render_table(summaries[name])}\n", flush=True)
    give_result(brief(summaries, runs, options.folder, seeds), options.results)


if __name__ == "__main__":
    main()
