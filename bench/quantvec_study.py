"""Quantization vectors from one task on another: how much they give back of what rounding takes, beside controls.

    python bench/quantvec_study.py FOLDER [--seed 0] [--bits 4] [--task change] [--answered 24] [--results FILE]

For every seed each task's adapter is trained plainly, and through the rounding to every format; their difference is
the task's vector. Every receiver's plain adapter is then rounded with the base, and scored on test rows: as it is
(``plain``); with its own vector, which is the ceiling and no transfer (``ceiling``); with every other task's vector,
λ = 1 (``vector``); and with what should not help: a random update of the vector's rank and of its norm in every layer
(``random``), the vector's opposite (``minus``), the vector with its blocks in another order (``shuffled``). Recovery is
the loss that is won over ``plain`` as a share of what the ceiling wins. ``--answered`` counts greedy answers, too.
Intervals resample rows; how much donors, receivers and seeds differ, the recovery of every pair shows.

Whatever is finished in FOLDER is not made again; more seeds, formats and tasks may be added. The last line is JSON: for
every format each variant's loss and gain with 95 % intervals, its recovery, and the recovery of every donor on every
receiver.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.core.resume import Journal
from mlx_rsgwm.data.corpus import Corpus, make_rows, save_corpus
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.evaluation.judging import judge
from mlx_rsgwm.evaluation.stats.bootstrap import percentile_interval, resampled
from mlx_rsgwm.evaluation.stats.intervals import share
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.merging.quantisation_vector import extract, patch
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.studies.rounding_remedies import RoundedBase
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.losses import row_nats
from mlx_rsgwm.training.pool import Member, train_pool
from mlx_rsgwm.training.rounded_losses import rounded_sum

TASKS = ("change", "groups", "compare", "prices")
FLOAT, BASE, PLAIN, CEILING, VECTOR = "float", "base", "plain", "ceiling", "vector"
CONTROLS = ("random", "minus", "shuffled")
ANSWERED = (FLOAT, PLAIN, CEILING, VECTOR)
SETTINGS: Mapping[str, Any] = {"learning_rate": 1e-3, "directions": 0}
TEST_SEED = 0  # the same test rows for all seeds, so that a row's losses can be averaged over them
RESAMPLES = 1000
Case = tuple[str, str, Adapter | None]  # variant, donor, what is summed with the base and rounded


# --- training ---------------------------------------------------------------------------------------------------


def pool_of(folder: Path, quant: QuantFormat | None) -> Path:
    """Where the adapters of one format are, or those that are trained plainly."""
    return folder / ("plain" if quant is None else f"{quant.bits}-{quant.group_size}-{quant.mode}")


def train_all(base: Base, formats: Sequence[QuantFormat], seed: int, options: argparse.Namespace) -> None:
    """Every task's adapter, plainly and through the rounding to each format, as far as it is not there."""
    folder = options.folder / f"seed-{seed}"
    members = []
    for task in options.task or TASKS:
        chosen = select_questions(task, "train", options.rows, seed, options.questions)
        rows = make_rows(chosen.questions, options.rows, 0, seed)
        corpus = save_corpus(folder / "data" / task, rows, find_template("plain"), {"seed": seed, "task": task})
        members.append(Member(task, corpus))
    for quant in (None, *formats):
        config = settings(seed, options, quant)
        train_pool(
            base, members, config, Saving(pool_of(folder, quant), resume="continue", snapshots=()),
            progress=LineProgress(),
        )  # fmt: skip


def settings(seed: int, options: argparse.Namespace, quant: QuantFormat | None) -> TrainConfig:
    """What a run is trained with."""
    given = {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
    seeds = {"seed": seed, "init_seed": seed}
    return replace(TrainConfig.from_mapping({**SETTINGS, "steps": options.steps, **given, **seeds}), qat=quant)


# --- what is compared -------------------------------------------------------------------------------------------


def random_like(vector: Adapter, seed: int) -> Adapter:
    """Gaussian factors of the same rank, scaled so that every layer's update has the vector's norm."""
    rng = np.random.default_rng(seed)
    weights = {}
    for module, a, b in vector.factors():
        drawn = [rng.standard_normal(part.shape) for part in (a, b)]
        size, wanted = (norm(*pair) for pair in (drawn, (np.array(a, np.float64), np.array(b, np.float64))))
        weights[f"{module}.lora_a"] = mx.array(drawn[0].astype(np.float32))
        weights[f"{module}.lora_b"] = mx.array((drawn[1] * (wanted / size)).astype(np.float32))
    return replace(vector, weights=weights, path=None)


def norm(a: np.ndarray, b: np.ndarray) -> float:
    """‖a b‖_F of factors (in, r) and (r, out)."""
    return float(np.sqrt(max(((a.T @ a) * (b @ b.T)).sum(), 0.0)))


def shuffled(vector: Adapter, seed: int) -> Adapter:
    """The vector with its blocks in another order, none in its place; a block's modules stay together."""
    pieces = {name: name.split(".") for name in vector.weights}
    place = next(index for index, piece in enumerate(next(iter(pieces.values()))) if piece.isdigit())
    blocks = sorted({int(parts[place]) for parts in pieces.values()})
    order = np.random.default_rng(seed).permutation(len(blocks))
    moved = {str(blocks[order[i]]): str(blocks[order[i - 1]]) for i in range(len(blocks))}  # one cycle over all
    weights = {
        ".".join([*parts[:place], moved[parts[place]], *parts[place + 1 :]]): vector.weights[name]
        for name, parts in pieces.items()
    }
    return replace(vector, weights=weights, path=None)


def cases(plain: Mapping[str, Adapter], vectors: Mapping[str, Adapter], receiver: str, seed: int) -> Iterator[Case]:
    """Everything that is measured of one receiver in one format, made when it is its turn."""
    adapter = plain[receiver]
    yield BASE, "", None
    yield PLAIN, "", adapter
    yield CEILING, receiver, patch(adapter, vectors[receiver])
    for donor, vector in vectors.items():
        if donor != receiver:
            yield VECTOR, donor, patch(adapter, vector)
            yield "random", donor, patch(adapter, random_like(vector, seed))
            yield "minus", donor, patch(adapter, vector, -1.0)
            yield "shuffled", donor, patch(adapter, shuffled(vector, seed))


# --- measuring --------------------------------------------------------------------------------------------------


class Figures:
    """What was measured, by seed, format, receiver, variant and donor; kept in a journal as it comes."""

    def __init__(self, base: Base, options: argparse.Namespace) -> None:
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        about = {
            "kind": "quantvec-study", "version": 1, "base": base.fingerprint, "items": options.items,
            "answered": options.answered, "max_tokens": options.max_tokens, "rows": options.rows,
            "config": settings(0, options, None).describe(),
        }  # fmt: skip
        self.journal = Journal(options.folder / "figures.jsonl", about, lambda row, _: self._take(row))

    def _take(self, row: Mapping[str, Any]) -> None:
        self.rows[tuple(row["key"])] = dict(row)

    def keep(self, key: tuple[Any, ...], figures: Mapping[str, Any]) -> None:
        """Keep what was measured of ``key``."""
        self.journal.append([{"key": list(key), **figures}])
        self._take({"key": key, **figures})


def test_data(base: Base, task: str, options: argparse.Namespace) -> tuple[list[Any], list[Question]]:
    """Test rows of a task as tokens, and its questions."""
    chosen = select_questions(task, "test", options.items, TEST_SEED, options.questions)
    corpus = Corpus(tuple(make_rows(chosen.questions, options.items, 0, TEST_SEED)), find_template("plain"), {})
    return corpus.token_rows(base.tokenizer, 1024, "drop")[0], list(chosen.questions)


def measure_all(base: Base, figures: Figures, formats: Sequence[QuantFormat], seed: int, options: Any) -> None:
    """Every case of every receiver and format of a seed that is not in ``figures``."""
    tasks, folder = options.task or TASKS, options.folder / f"seed-{seed}"
    plain = {task: Adapter.load(pool_of(folder, None) / task) for task in tasks}
    data = {task: test_data(base, task, options) for task in tasks}
    for task in tasks:
        if (key := (seed, "", task, FLOAT, "")) not in figures.rows:
            with rounded_sum(base, plain[task], None) as model:
                figures.keep(key, measured(base, model, data[task], FLOAT, options))
    for quant in formats:
        vectors = {task: extract(Adapter.load(pool_of(folder, quant) / task), plain[task]) for task in tasks}
        rounded = RoundedBase(base, quant)
        for receiver in tasks:
            for variant, donor, adapter in cases(plain, vectors, receiver, seed):
                key = (seed, str(quant), receiver, variant, donor)
                if key in figures.rows:
                    continue
                with rounded.using({} if adapter is None else rounded.sums(adapter)):
                    figures.keep(key, measured(base, base.model, data[receiver], variant, options))
                told = figures.rows[key]
                loss = sum(told["nats"]) / sum(told["tokens"])
                print(f"seed {seed}, {quant}, {receiver}, {variant} {donor}: {loss:.4f}", flush=True)


def measured(
    base: Base, model: Any, data: tuple[list[Any], list[Question]], variant: str, options: Any
) -> dict[str, Any]:
    """Nats and tokens of every test row, and which of the first questions are answered rightly."""
    rows, questions = data
    nats, tokens = row_nats(model, rows, options.batch_rows)
    right: list[bool] = []
    if options.answered and variant in ANSWERED:
        chosen = questions[: options.answered]
        sampling = Sampling(0.0, 1.0, options.max_tokens, 0)
        model.eval()
        config = LoopConfig(1, sampling=sampling)
        pipeline = DraftVerify(AdapterSlots(base), find_template("plain"), None, None, config, calibration=None)
        drafted = pipeline.draft_many([each.question for each in chosen], 1, batch_rows=options.batch_rows)
        right = [bool(judge(each, drafts[0], {}).correct) for each, drafts in zip(chosen, drafted, strict=True)]
    return {"nats": nats.tolist(), "tokens": tokens.tolist(), "right": right}


# --- the result -------------------------------------------------------------------------------------------------


def summary(rows: Mapping[tuple[Any, ...], Mapping[str, Any]], quant: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Of one format: losses, gains over plain rounding, recoveries, all over rows with seeds and donors averaged."""
    seeds = sorted({key[0] for key in rows if key[1] == quant and key[2] in tasks})
    tokens = np.concatenate([rows[seeds[0], quant, task, PLAIN, ""]["tokens"] for task in tasks])

    def nats(variant: str) -> np.ndarray:
        """(rows of all receivers,) averaged over seeds and donors."""
        of_format = "" if variant == FLOAT else quant
        parts = []
        for task in tasks:
            keys = [key for key in rows if key[1:4] == (of_format, task, variant) and key[0] in seeds]
            parts.append(np.mean([rows[key]["nats"] for key in keys if key[4] in ("", *tasks)], axis=0))
        return np.concatenate(parts)

    plain, ceiling = nats(PLAIN), nats(CEILING)
    told: dict[str, Any] = {"seeds": seeds, "rows": len(tokens), "tokens": int(tokens.sum()), "variants": {}}
    for variant in (FLOAT, BASE, PLAIN, CEILING, VECTOR, *CONTROLS):
        values = nats(variant)
        gain = interval(plain - values, tokens)
        recovery = interval(plain - values, plain - ceiling) if variant in (VECTOR, *CONTROLS) else None
        told["variants"][variant] = {
            "loss": float(values.sum() / tokens.sum()), "gain": gain, "recovery": recovery,
            "accuracy": accuracy(rows, "" if variant == FLOAT else quant, variant, seeds, tasks),
        }  # fmt: skip
    told["pairs"] = {f"{donor} → {task}": pair(rows, quant, seeds, donor, task) for donor in tasks for task in tasks
                     if donor != task}  # fmt: skip
    return told


def interval(part: np.ndarray, total: np.ndarray) -> dict[str, float] | None:
    """Σ part / Σ total of rows with its 95 % interval, rows resampled; None where the total is not above 0."""
    if total.sum() <= 0:
        return None
    drawn = resampled(lambda chosen: float(part[chosen].sum() / total[chosen].sum()), len(part), 0, RESAMPLES)
    low, high = percentile_interval(drawn)
    return {"value": float(part.sum() / total.sum()), "low": low, "high": high}


def pair(rows: Mapping[Any, Any], quant: str, seeds: Sequence[int], donor: str, task: str) -> dict[str, Any]:
    """The recovery of one donor's vector on one receiver, rows resampled and seeds averaged, and that of every seed;
    None where the ceiling wins nothing."""
    plain, ceiling, patched = (
        np.array([rows[seed, quant, task, variant, source]["nats"] for seed in seeds])
        for variant, source in ((PLAIN, ""), (CEILING, task), (VECTOR, donor))
    )
    gained, possible = plain - patched, plain - ceiling
    by_seed = [float(g.sum() / p.sum()) if p.sum() > 0 else None for g, p in zip(gained, possible, strict=True)]
    return {"recovery": interval(gained.mean(axis=0), possible.mean(axis=0)), "by_seed": by_seed}


def accuracy(
    rows: Mapping[Any, Any], quant: str, variant: str, seeds: Sequence[int], tasks: Sequence[str]
) -> dict[str, Any] | None:
    """The share of right answers over receivers, donors and seeds; None where nothing was asked or all is wrong."""
    right = [
        answer
        for key, row in rows.items()
        if key[1] == quant and key[3] == variant and key[0] in seeds and key[2] in tasks
        for answer in row["right"]
    ]
    return share(sum(right), len(right)).to_dict() if any(right) else None


def table(result: Mapping[str, Any]) -> str:
    """The text a person reads."""
    lines = ["format                     variant     loss    gain (95 %)                    recovery (95 %)"]
    for quant, told in result.items():
        for variant, row in told["variants"].items():
            gain, recovery = (shown(row[name]) for name in ("gain", "recovery"))
            lines.append(f"{quant:25}  {variant:9}  {row['loss']:7.4f}  {gain:29}  {recovery}")
    return "\n".join(lines)


def shown(value: Mapping[str, float] | None) -> str:
    """An estimate with its interval, in words for none."""
    return "–" if value is None else f"{value['value']:+.4f} ({value['low']:+.4f} to {value['high']:+.4f})"


def main() -> None:
    """Parse, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what is trained and measured is kept here")
    parser.add_argument("--base", default="smollm2-135m", help="a dense one")
    parser.add_argument("--seed", action="append", type=int, help="repeat; default: 0, 1, 2")
    parser.add_argument("--bits", action="append", type=QuantFormat.parse, help="a format; repeat; default: 4, 3, 2")
    parser.add_argument("--task", action="append", help="repeat; default: the four embedded families")
    parser.add_argument("--questions", type=Path, help="folder of data sets as TASK/SPLIT.jsonl; default: the Hub")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rows", type=int, default=192, help="of each task, trained on")
    parser.add_argument("--items", type=int, default=48, help="test rows of each task")
    parser.add_argument("--answered", type=int, default=0, help="of them answered, for accuracy")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="a training setting, name=value as JSON; repeat")
    parser.add_argument("--stage", choices=("train",), help="stop after this one")
    parser.add_argument("--results", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    formats = options.bits or [QuantFormat(bits) for bits in (4, 3, 2)]
    base = load_base(options.base, dtype="float32")
    for seed in options.seed or (0, 1, 2):
        train_all(base, formats, seed, options)
        if options.stage != "train":
            measure_all(base, Figures(base, options), formats, seed, options)
    if options.stage == "train":
        return
    rows = Figures(base, options).rows
    result = {str(quant): summary(rows, str(quant), options.task or TASKS) for quant in formats}
    print(table(result), flush=True)
    give_result(result, options.results)


if __name__ == "__main__":
    main()
