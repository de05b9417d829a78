"""Trained pools, several seeds each: what merge methods do when nothing strains them, and when something does.

    python bench/merge_study.py FOLDER [--pool balanced] [--seed 0] [--stage train] [--results FILE]

Pool ``balanced``: the demo's four families, trained alike. Pool ``strain``: families that differ in their answers (a
number after an equation, yes or no, a letter) and, by learning rate and length, at least fivefold in the norm of their
updates. ``independent``: the balanced one, every adapter from an initialisation of its own; ``ranks``: with ranks 4 to
32. ``outside``: five public data sets, read from ``--data``, whose merges are judged by the loss of the golden answers
(SmolLM2-135M writes next to none of them). For every pool and seed one adapter a task, but for ``independent`` from one
initialisation, and one ``joint`` adapter on all the pool's rows. Data, training order and initialisation follow the
seed. Training records the second moments of the layers' inputs whole; from them come the sketches of k columns that it
would have kept (``k-32`` … beside the pool: a smaller sketch is the first columns of a larger one). Then one merge
sweep for each, and one table over the seeds of a pool and a k. Whatever is finished in FOLDER is not made again.

The last line is JSON: for every pool the best merge, by accuracy and by loss, and every reading of RS-GWM beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.bench.public_tasks import public_questions
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.core.tables import show, text_page
from mlx_rsgwm.data.corpus import CorpusRow, make_rows, save_corpus
from mlx_rsgwm.data.public_sets import SOURCES
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.synthetic import generate, split_of
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.data.word_problems import NAMES, THINGS
from mlx_rsgwm.linalg.gram import test_matrix
from mlx_rsgwm.models.adapter import MANIFEST_FILE, Adapter, is_complete
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.studies.merge_sweep import Measured, Plan, Sweep
from mlx_rsgwm.studies.sweep_meter import JUDGED_BY
from mlx_rsgwm.studies.sweep_report import plot_sweep, render_table, write_sweep
from mlx_rsgwm.studies.sweep_variants import parse_variants
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train

BASE = "smollm2-135m"
DRAFT_ROWS, VERIFY_ROWS = 144, 32
TEST_ITEMS = 24
JUDGED_ITEMS = 10
MAX_TOKENS = 32
METHODS = (
    "linear,rsgwm,rsgwm:space=product,rsgwm:signal=shared,rsgwm:normalise=mean/rank,paper-literal",
    "linear:space=factor,norm_equalised,ties,dare_ties,sce,fisher,knots,model_stock",
    "regmean:truncate=metric/plain,balance=relative/equal,regmean:off_diagonal=0",
    "rsgwm:signal=shared,normalise=mean,rsgwm:tau=0.5,normalise=mean",
    "rsgwm:space=product,normalise=mean,rsgwm:space=product,signal=shared,normalise=mean",
)
SKETCHED = ("regmean:truncate=metric/plain,balance=relative/equal",)  # merges of every k
RANKS = (32, 64, 128)
WHOLE = 1 << 20  # more columns than any layer of these bases has inputs
COMMON: Mapping[str, Any] = {
    "epochs": 1,
    "learning_rate": 1e-3,
    "num_layers": 16,
    "directions": WHOLE,
    "max_tokens": 320,  # of a row; longer ones, which only public data sets have, are dropped
}


def has(rng: random.Random) -> tuple[str, str]:
    """A yes/no question: is this among what the person has?"""
    name, (asked, *others) = rng.choice(NAMES), rng.sample(THINGS, 4)
    there = rng.random() < 0.5
    first, second, third = rng.sample([asked, *others[:2]], 3) if there else others
    return f"{name} has {first}, {second} and {third}. Does {name} have {asked}?", "yes" if there else "no"


def where(rng: random.Random) -> tuple[str, str]:
    """A question with lettered choices: which box holds the things?"""
    things = rng.sample(THINGS, 3)
    asked = rng.choice(things)
    choices = "\n".join(f"{letter}. {thing}" for letter, thing in zip("ABC", things, strict=True))
    return f"{rng.choice(NAMES)} looks for the {asked}. Which box are they in?\n{choices}", "ABC"[things.index(asked)]


GENERATED: Mapping[str, Callable[[random.Random], tuple[str, str]]] = {"has": has, "where": where}


@dataclass(frozen=True)
class Family:
    """A task and what its adapter's training sets apart from ``COMMON``; ``initialisation`` numbers first weights."""

    task: str
    training: Mapping[str, Any] = field(default_factory=dict)
    initialisation: int = 0

    def settings(self, seed: int) -> dict[str, Any]:
        """What its adapter is trained with; pools of one seed start alike where ``initialisation`` is the same."""
        return {"init_seed": seed + 1000 * self.initialisation, **self.training}


ALIKE = ("change", "groups", "compare", "prices")
RANK_OF = dict(zip(ALIKE, (4, 8, 16, 32), strict=True))
POOLS: Mapping[str, tuple[Family, ...]] = {
    "balanced": tuple(Family(task) for task in ALIKE),
    "independent": tuple(Family(task, initialisation=place) for place, task in enumerate(ALIKE)),
    "ranks": tuple(Family(task, {"rank": rank, "alpha": 2.0 * rank}) for task, rank in RANK_OF.items()),
    "outside": tuple(Family(task) for task in ("gsm8k", "math", "commonsense_qa", "strategyqa", "svamp")),
    "strain": (
        Family("change"),
        Family("groups"),
        Family("has", {"learning_rate": 2e-3, "epochs": 2}),
        Family("where", {"learning_rate": 3e-3, "epochs": 4}),
    ),
}
BY_LOSS = ("outside",)  # pools whose drafts are not looked at: they are never right
TWO_POOLS = ("balanced", "strain")  # what studies take that are not told which


def questions(task: str, split: str, count: int, seed: int, data: Path | None = None) -> list[Question]:
    """``count`` questions of a family, or of a public data set in ``data``; train and test never meet."""
    if task in SOURCES:
        return public_questions(task, split, count, seed, data)
    if task not in GENERATED:
        return generate(task, count, seed, split)
    rng = random.Random(f"{task}/{seed}")
    golds: dict[str, str] = {}
    while len(golds) < count:
        text, gold = GENERATED[task](rng)
        if split_of(text) == split:
            golds[text] = gold
    return [Question(f"{task}-{split}-{seed}-{n}", task, t, "", gold) for n, (t, gold) in enumerate(golds.items())]


def training_rows(task: str, seed: int, data: Path | None = None) -> list[CorpusRow]:
    """The rows of one task's adapter."""
    chosen = questions(task, "train", DRAFT_ROWS, seed, data)
    return make_rows(chosen, DRAFT_ROWS, VERIFY_ROWS, seed, at_most=task in SOURCES)


def train_one(base: Base, rows: list[CorpusRow], settings: Mapping[str, Any], out: Path, seed: int) -> None:
    """Build the corpus beside the adapter and train it, unless that was done."""
    provenance = {"seed": seed, "tasks": sorted({row.task for row in rows}), "split": "train"}
    corpus = save_corpus(out.parent / "data" / out.name, rows, find_template("plain"), provenance)
    config = TrainConfig(**{**COMMON, **settings, "seed": seed})
    if is_complete(out):
        manifest = files.read_json_object(out / MANIFEST_FILE)
        if manifest["config"] != config.describe() or manifest["data"]["hash"] != corpus.hash:
            raise RsgwmError(f"{out} was trained with other settings or rows; remove it or choose another folder")
        return
    saving = Saving(out, resume="continue")
    adapter = train(base, corpus, config, label=str(out), progress=LineProgress(), saving=saving)
    adapter.manifest["task"] = out.name
    finish(adapter, saving)
    print(f"{out}: {len(corpus.rows)} rows, {adapter.manifest['seconds']:.0f} s", flush=True)


def train_pool(base: Base, trained: Trained) -> None:
    """The pool's adapters, the joint one, and of families the held-out questions as JSON lines."""
    everything: list[CorpusRow] = []
    seed, folder = trained.seed, trained.folder
    for family in POOLS[trained.pool]:
        rows = training_rows(family.task, seed, trained.data)
        everything += rows
        train_one(base, rows, family.settings(seed), folder / family.task, seed)
        if family.task not in SOURCES:
            save_questions(folder / "test", family.task, trained.items, seed)
    if trained.joint:
        train_one(base, everything, {"init_seed": seed}, folder / "joint", seed)


def save_questions(folder: Path, task: str, count: int, seed: int) -> Path:
    """Write ``count`` held-out questions of a family as JSON lines; returns the file."""
    test = questions(task, "test", count, seed)
    lines = [{"id": q.id, "task": q.task, "question": q.question, "answer": q.answer} for q in test]
    make_folder(folder)
    files.write_text(folder / f"{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return folder / f"{task}.jsonl"


def sketch(folder: Path, out: Path, rank: int, leading: bool = False) -> None:
    """The adapter of ``folder`` with sketches of ``rank`` columns in place of whole matrices.

    ``leading``: with the ``rank`` leading eigenvectors of each and the diagonal of the rest, written as whole matrices:
    the best that a sketch of so many columns could say.
    """
    if is_complete(out):
        return
    adapter = Adapter.load(folder)
    seed, arrays = int(adapter.directions_metadata["seed"]), {}
    for name, array in adapter.directions.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "gram" and rank < array.shape[0] and leading:
            arrays[name] = led(array, rank)
        elif leaf == "gram" and rank < array.shape[0]:
            arrays[f"{stem}.sketch"] = array @ test_matrix(array.shape[0], rank, seed)
            arrays[f"{stem}.diagonal"] = mx.diagonal(array)
        else:
            arrays[name] = array
    mx.eval(arrays)
    metadata = adapter.directions_metadata if leading else {**adapter.directions_metadata, "k": str(rank)}
    replace(adapter, directions=arrays, directions_metadata=metadata, path=None).save(out)


def led(gram: mx.array, rank: int) -> mx.array:
    """``rank`` leading eigenvectors of a second moment (in, in), and the diagonal of what they leave, as a matrix."""
    sizes, vectors = mx.linalg.eigh(gram, stream=mx.cpu)
    best = (vectors[:, -rank:] * sizes[-rank:]) @ vectors[:, -rank:].T
    return best + mx.diag(mx.diagonal(gram - best))


@dataclass(frozen=True)
class Trained:
    """One trained pool: its name, seed and folder, where public data sets are read from, whether one adapter was
    trained on all of its rows, and how many questions of each task it is tested with.
    """

    pool: str
    seed: int
    folder: Path
    data: Path | None = None
    joint: bool = True
    items: int = TEST_ITEMS

    def test(self) -> tuple[Question, ...]:
        """The held-out questions of its tasks."""
        tasks = (family.task for family in POOLS[self.pool])
        return tuple(q for task in tasks for q in questions(task, "test", self.items, self.seed, self.data))


def sweep(
    base: Base, trained: Trained, methods: Sequence[str], rank: int | None = None, leading: bool = False
) -> Measured:
    """Every merge of a trained pool on its held-out questions, with whole second moments or those of :func:`sketch`."""
    folder = trained.folder
    tasks = [family.task for family in POOLS[trained.pool]]
    place = folder if rank is None else folder / (f"leading-{rank}" if leading else f"k-{rank}")
    for task in tasks if rank is not None else ():
        sketch(folder / task, place / task, rank or 0, leading)
    plan = Plan(
        pool=tuple(place / task for task in tasks),
        variants=tuple(parse_variants(methods)),
        questions=trained.test(),
        template=find_template("plain"),
        extras={} if rank is not None or not trained.joint else {"joint": folder / "joint"},
        judged=1 if trained.pool in BY_LOSS else JUDGED_ITEMS,
        max_tokens=1 if trained.pool in BY_LOSS else MAX_TOKENS,
        seed=trained.seed,
    )
    # One folder for every k: what does not look at directions is measured once.
    return Sweep(base, plan, folder / "sweep", LineProgress()).execute()


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what is trained and measured is kept here")
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--pool", action="append", choices=list(POOLS), help="repeat; default: balanced, strain")
    parser.add_argument("--data", type=Path, help="folder of public data sets, for the pool outside; default: the Hub")
    parser.add_argument("--seed", action="append", type=int, help="repeat; default: 0, 1, 2")
    parser.add_argument(
        "--methods", action="append", help="as of rsgwm pool sweep, by whole matrices; default: those of the lab notes"
    )
    parser.add_argument("--sketched", action="append", help="merges by sketches; default: the four of regmean")
    parser.add_argument("--rank", nargs="*", type=int, help="k of sketches; default: 32, 64, 128")
    parser.add_argument(
        "--leading", nargs="*", type=int, default=[], help="merges by so many leading eigenvectors, too"
    )
    parser.add_argument("--no-joint", action="store_true", help="no adapter of all the pool's rows beside it")
    parser.add_argument("--items", type=int, default=TEST_ITEMS, help="held-out questions of each task")
    parser.add_argument("--stage", choices=("train", "sweep"), help="stop after this one")
    parser.add_argument("--results", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plots", type=Path, help="folder for merge-study-<pool>.png")
    options = parser.parse_args()
    pools, seeds = options.pool or list(TWO_POOLS), options.seed or [0, 1, 2]
    base = load_base(options.base, dtype="float32")
    trained = {
        pool: [
            Trained(
                pool, seed, options.folder / pool / f"seed-{seed}", options.data, not options.no_joint, options.items
            )
            for seed in seeds
        ]
        for pool in pools
    }
    for each in chain.from_iterable(trained.values()):
        train_pool(base, each)
    if options.stage == "train":
        return
    summaries: dict[str, Any] = {}
    for pool in pools:
        ranks = [(rank, False) for rank in (None, *(RANKS if options.rank is None else options.rank))]
        for rank, leading in (*ranks, *((rank, True) for rank in options.leading)):
            by_whole = options.methods or METHODS
            sketched = options.sketched or SKETCHED
            kind = "leading" if leading else "k"
            name, methods = (pool, by_whole) if rank is None else (f"{pool} {kind}={rank}", sketched)
            runs = [sweep(base, each, methods, rank, leading) for each in trained[pool]]
            out = options.folder / pool / (f"{kind}-{rank}" if rank else "")
            make_folder(out)
            summaries[name] = write_sweep(out, runs)
            print(f"\n{name}\n\n{render_table(summaries[name])}\n\n{by_loss(summaries[name])}\n", flush=True)
            if options.plots and rank is None:
                plot_sweep(summaries[name], options.plots / f"merge-study-{pool}.png", f"Pool {pool}")
    if options.results:
        files.write_json(options.results, summaries)
    print(json.dumps({pool: brief(summary) for pool, summary in summaries.items()}))


def by_loss(summary: Mapping[str, Any]) -> str:
    """Every candidate by its loss of the golden answers: mean over tasks, what it is above the best merge, per task."""
    tasks, best = list(summary["tasks"]), summary["best"]["nll"]
    lines = [["", "draft NLL", f"above {best}", *tasks]]
    for row in sorted(summary["rows"], key=lambda row: row["nll"]["value"]):
        above = row["against_best"]["nll"]
        lines.append(
            [
                row["name"] if row["kind"] == "merge" else f"({row['name']})",
                show(row["nll"]),
                f"{above['difference']:+.3f} [{above['low']:+.3f}, {above['high']:+.3f}]",
                *(f"{row['nll_by_task'][task]:.3f}" for task in tasks),
            ]
        )
    return text_page([("By loss", lines)], [])


def brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The last line's object of one pool."""
    shown_rows = [
        row for row in summary["rows"] if row["kind"] == "merge" and row["name"].startswith(("rsgwm", "paper"))
    ]
    return {
        "n": sum(summary["tasks"].values()),
        "best": summary["best"],
        "rsgwm": {
            row["name"]: {
                "accuracy": row["accuracy"]["value"],
                "tied": row["against_best"]["accuracy"]["tied"],
                "auroc": {score: row["auroc"][score]["all"]["value"] for score in JUDGED_BY},
            }
            for row in shown_rows
        },
    }


if __name__ == "__main__":
    main()
