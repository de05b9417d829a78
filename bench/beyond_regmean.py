"""What might go beyond RegMean, on the pools of bench/merge_study.py and measured as it measures.

    python bench/beyond_regmean.py FOLDER [--pool balanced] [--seed 0] [--count 48] [--results FILE]

FOLDER is one in which ``merge_study.py FOLDER --stage train`` has trained. From ``count`` draft rows of every task:

- ``by_rows``: ``regmean`` by whole second moments G_t of the inputs under each adapter by itself;
- ``recollected``: of the inputs under the merged layers below (RegMean++);
- ``compensated``: a module's target is what each adapter gives in its own run, so that what the layers below have lost
  is made good: argmin Σ ‖X'_t (W + ΔW) − X_t (W + ΔW_t)‖² / n_t, X'_t the inputs under the merged layers, X_t under the
  adapter's own;
- ``curvature``: errors of outputs count by how the loss depends on them: argmin Σ tr((ΔW − ΔW_t)ᵀ G_t (ΔW − ΔW_t)
  H_t), H_t the second moments of the loss's gradients there (K-FAC), by conjugate gradients.

All count errors as they are, have ``regmean``'s ridge and its rank, and are cut to it in the same metric. Drafting,
loss and AUROC are as in a merge sweep, whose table is printed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.bench.merge_study import BASE, JUDGED_ITEMS, MAX_TOKENS, POOLS, TWO_POOLS
from mlx_rsgwm.bench.output_errors import DraftRows, draft_rows, matrices, with_whole
from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.data.batching import make_batch
from mlx_rsgwm.data.questions import load_jsonl
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.evaluation.stats.stratified import Estimate, item_counts, item_ratio, stratified_mean
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.pool_metric import PARAMETERS
from mlx_rsgwm.merging.recollect import Recollection
from mlx_rsgwm.models.adapter import Adapter, is_complete
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.hooks import block_names, inputs_seen, outputs_changed
from mlx_rsgwm.models.slots import unwrap
from mlx_rsgwm.models.split import split_blocks, split_head
from mlx_rsgwm.studies.merge_sweep import Measured, Plan, Sweep
from mlx_rsgwm.studies.sweep_report import render_table, write_sweep
from mlx_rsgwm.studies.sweep_summary import RESAMPLES
from mlx_rsgwm.studies.sweep_variants import parse_variants
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.losses import batch_nats

RIDGE = float(PARAMETERS["ridge"].default)
STEPS = 20  # of conjugate gradients, from the solution for H_t = 1
MERGES = ("by_rows", "recollected", "compensated", "curvature")
DRAFTER = MergeOptions("regmean", role="draft")
Matrix = np.ndarray


def update(adapter: Adapter, name: str) -> Matrix:
    """ΔW (in, out), float64."""
    a, b = (np.array(adapter.weights[f"{name}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    return np.asarray(adapter.spec.scale * (a @ b))


def ridged(gram: Matrix) -> Matrix:
    """``gram`` with regmean's ridge on its diagonal."""
    return np.asarray(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)))


def cut(target: Matrix, inputs: Matrix, outputs: Matrix | None, rank: int) -> tuple[Matrix, Matrix]:
    """The factors of the best update of ``rank`` in the metric of inputs, and of outputs where that is given."""
    left = np.linalg.cholesky(inputs)
    right = np.eye(target.shape[1]) if outputs is None else np.linalg.cholesky(outputs)
    u, sizes, v = np.linalg.svd(left.T @ target @ right, full_matrices=False)
    root = np.sqrt(sizes[:rank])
    return np.linalg.solve(left.T, u[:, :rank] * root), np.linalg.solve(right.T, (root[:, None] * v[:rank]).T).T


def like(merged: Adapter, updates: Mapping[str, tuple[Matrix, Matrix]]) -> Adapter:
    """An adapter of these factors with the spec and manifest of ``merged``."""
    weights = {}
    for name, (a, b) in updates.items():
        weights[f"{name}.lora_a"] = mx.array(a.astype(np.float32))
        weights[f"{name}.lora_b"] = mx.array((b / merged.spec.scale).astype(np.float32))
    return replace(merged, weights=weights, path=None)


def on(base: Base, adapter: Adapter, names: Sequence[str]) -> Any:
    """The model with the modules ``names`` of ``adapter`` alone."""
    modules = {name: module for name, module in fitting_modules(base, adapter).items() if name in names}
    weights = {
        name: value.astype(mx.float32) for name, value in adapter.weights.items() if name.rpartition(".")[0] in modules
    }
    return adapted(base.model, modules, replace(adapter.spec, dropout=0.0), weights)


def output_moments(base: Base, adapter: Adapter, rows: DraftRows) -> dict[str, Matrix]:
    """H_t (out, out) of every module: the sum over tokens of the outer products of the loss's gradients there."""
    widths = {name: b.shape[1] for name, _, b in adapter.factors()}
    names = list(widths)
    sums: dict[str, Any] = {}
    with on(base, adapter, names):
        hidden, head = split_head(base.model)
        for row in rows.rows:
            batch = make_batch([row])
            probes = {name: mx.zeros((*batch.inputs.shape, width)) for name, width in widths.items()}

            def loss(added: dict[str, mx.array], batch: Any = batch) -> mx.array:
                with outputs_changed(base.model, names, lambda seen, x, y: y + added[seen]):
                    return batch_nats(hidden, head, batch)

            for name, gradient in mx.grad(loss)(probes).items():
                flat = gradient.reshape(-1, gradient.shape[-1])
                sums[name] = sums.get(name, 0) + flat.T @ flat
            mx.eval(sums)
    return {name: np.array(total).astype(np.float64) for name, total in sums.items()}


def by_curvature(base: Base, pool: Sequence[Adapter], rows: Sequence[DraftRows], start: Adapter) -> Adapter:
    """K-FAC's merge; ``pool`` has whole matrices, ``start`` is what conjugate gradients begin at."""
    grams = [matrices(adapter) for adapter in pool]
    curved = [output_moments(base, *pair) for pair in zip(pool, rows, strict=True)]
    updates = {}
    for name in start.modules():
        targets = [update(adapter, name) for adapter in pool]
        pairs = [(ridged(gram[name]), ridged(moments[name])) for gram, moments in zip(grams, curved, strict=True)]
        right = np.sum([between([pair], target) for pair, target in zip(pairs, targets, strict=True)], axis=0)
        inputs: Matrix = np.sum([gram for gram, _ in pairs], axis=0)
        outputs: Matrix = np.sum([moment for _, moment in pairs], axis=0)
        inverses = np.linalg.inv(inputs), np.linalg.inv(outputs)
        solved = conjugate_gradients(
            partial(between, pairs),
            partial(between, [inverses]),
            right,
            update(start, name),
        )
        updates[name] = cut(solved, inputs, outputs, start.spec.rank)
    return like(start, updates)


def between(pairs: Sequence[tuple[Matrix, Matrix]], x: Matrix) -> Matrix:
    """Σ G x H over the pairs (G, H)."""
    return np.sum([gram @ x @ moment for gram, moment in pairs], axis=0)


def conjugate_gradients(
    times: Callable[[Matrix], Matrix], prepared: Callable[[Matrix], Matrix], right: Matrix, start: Matrix
) -> Matrix:
    """The solution of ``times(x) = right`` for a positive definite map of matrices, after ``STEPS`` steps."""
    x, residual = start, right - times(start)
    step = toward = prepared(residual)
    square = np.sum(residual * toward)
    for _ in range(STEPS):
        image = times(step)
        length = square / np.sum(step * image)
        x, residual = x + length * step, residual - length * image
        toward = prepared(residual)
        square, before = np.sum(residual * toward), square
        step = toward + square / before * step
    return x


def compensated(base: Base, pool: Sequence[Adapter], rows: Sequence[DraftRows], like_this: Adapter) -> Adapter:
    """Block by block, targets from every adapter's own run and inputs from the merged one."""
    model: Any = base.model
    blocks, names = split_blocks(model), block_names(model)
    assert blocks is not None
    by_itself = [[make_batch([row], length_step=1).inputs for row in task.rows] for task in rows]
    merged = [list(task) for task in by_itself]
    updates: dict[str, tuple[Matrix, Matrix]] = {}
    for block, prefix in zip(blocks, names, strict=True):
        inside = [name for name in like_this.modules() if name.startswith(f"{prefix}.")]
        sums: list[dict[str, Any]] = []
        for task, adapter in enumerate(pool):
            totals: dict[str, Any] = {}
            with on(base, adapter, inside):
                for row, states in enumerate(by_itself[task]):
                    seen: list[dict[str, mx.array]] = [{}, {}]
                    with inputs_seen(model, inside, seen[0].__setitem__):
                        by_itself[task][row] = block(states)
                    with inputs_seen(model, inside, seen[1].__setitem__):
                        block(merged[task][row])
                    for name in inside:
                        x, under_merged = (of[name].reshape(-1, of[name].shape[-1]) for of in seen)
                        gram, cross, tokens = totals.get(name, (0, 0, 0))
                        totals[name] = (
                            gram + under_merged.T @ under_merged,
                            cross + under_merged.T @ x,
                            tokens + len(x),
                        )
                    mx.eval(by_itself[task][row], totals)
            sums.append(totals)
        for name in inside:
            updates[name] = _made_good(base, pool, sums, name, like_this.spec.rank)
        with on(base, like(like_this, updates), inside):
            merged = [[block(states) for states in task] for task in merged]
            mx.eval(merged)
    return like(like_this, updates)


def _made_good(base: Base, pool: Sequence[Adapter], sums: Any, name: str, rank: int) -> tuple[Matrix, Matrix]:
    module: Any = dict(base.model.named_modules())[name]
    weight = np.array(module.weight).astype(np.float64).T
    metric, right = np.zeros((len(weight),) * 2), np.zeros(weight.shape)
    for adapter, totals in zip(pool, sums, strict=True):
        gram, cross, tokens = (np.array(total).astype(np.float64) for total in totals[name])
        target, regular = update(adapter, name), ridged(gram)
        share = 1 / tokens
        metric += share * regular
        right += share * (regular @ target + (cross - gram) @ (weight + target))
    return cut(np.linalg.solve(metric, right), metric, None, rank)


def make_all(base: Base, folder: Path, tasks: Sequence[str], count: int, wanted: Sequence[str]) -> dict[str, Path]:
    """The ``wanted`` merges of a trained pool, in folders; what is there is not made again."""
    places = {name: folder / f"beyond-{count}" / name for name in wanted}
    if all(is_complete(place) for place in places.values()):
        return places
    pool = [Adapter.load(folder / task) for task in tasks]
    rows = [draft_rows(folder / "data" / task, base, count) for task in tasks]
    counted = [with_whole(base, *pair) for pair in zip(pool, rows, strict=True)]
    plain = merge(counted, DRAFTER)
    data: list[Any] = list(rows)
    makers: Mapping[str, Callable[[], Adapter]] = {
        "by_rows": lambda: plain,
        "recollected": lambda: merge(pool, DRAFTER, recollection=Recollection(base, data, rows=0)),
        "compensated": lambda: compensated(base, pool, rows, plain),
        "curvature": lambda: by_curvature(base, counted, rows, plain),
    }
    for name, place in places.items():
        if not is_complete(place):
            make_folder(place.parent)
            makers[name]().save(place)
            print(f"{place}: made", flush=True)
    return places


def sweep(base: Base, pool: str, folder: Path, seed: int, count: int, wanted: Sequence[str]) -> Measured:
    """The ``wanted`` merges beside the pool's recorded regmean and its mean, on the study's questions."""
    tasks = [family.task for family in POOLS[pool]]
    unwrap(base.model)  # the sweep of another seed has left its slots
    places = make_all(base, folder, tasks, count, wanted)
    plan = Plan(
        pool=tuple(folder / task for task in tasks),
        variants=tuple(parse_variants(("linear,regmean",))),
        questions=tuple(q for task in tasks for q in load_jsonl(folder / "test" / f"{task}.jsonl")),
        template=find_template("plain"),
        extras=places,
        judged=JUDGED_ITEMS,
        max_tokens=MAX_TOKENS,
        seed=seed,
    )
    return Sweep(base, plan, folder / f"beyond-{count}" / "sweep", LineProgress()).execute()


def losses(runs: Sequence[Measured], names: Sequence[str], seed: int = 0) -> dict[str, Estimate]:
    """Nats a golden token of each candidate: the mean over tasks and sweeps, on the same resamples of their items."""
    rng = np.random.default_rng(seed)
    strata: dict[str, list[Estimate]] = {name: [] for name in names}
    for run in runs:
        outcomes = {outcome.name: np.array(outcome.gold) for outcome in run.outcomes if outcome.name in strata}
        for task in dict.fromkeys(question.task for question in run.questions):
            items = [place for place, question in enumerate(run.questions) if question.task == task]
            counts = item_counts(rng, len(items), RESAMPLES)
            for name in names:
                nats, tokens = outcomes[name][items].T
                strata[name].append(item_ratio(nats, tokens, counts))
    return {name: stratified_mean(each) for name, each in strata.items()}


def in_pairs(runs: Sequence[Measured], names: Sequence[str]) -> str:
    """Losses of the candidates ``names`` and, of every pair, the difference with its interval, as lines."""
    estimates = losses(runs, names)
    lines = []
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            gap = estimates[name].minus(estimates[other])
            lines.append(f"{name} minus {other}: {gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")
    return "\n".join(lines)


def main() -> None:
    """Parse, make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where bench/merge_study.py has trained")
    parser.add_argument("--pool", action="append", choices=list(POOLS), help="repeat; default: balanced, strain")
    parser.add_argument("--seed", action="append", type=int, help="repeat; default: 0, 1, 2")
    parser.add_argument("--count", type=int, default=48, help="draft rows of each task")
    parser.add_argument("--merge", action="append", choices=MERGES, help="repeat; default: all four")
    parser.add_argument("--results", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    base = load_base(BASE, dtype="float32")
    summaries: dict[str, Any] = {}
    for pool in options.pool or list(TWO_POOLS):
        runs = [
            sweep(base, pool, options.folder / pool / f"seed-{seed}", seed, options.count, options.merge or MERGES)
            for seed in options.seed or [0, 1, 2]
        ]
        out = options.folder / pool / f"beyond-{options.count}"
        make_folder(out)
        summaries[pool] = write_sweep(out, runs)
        print(f"\n{pool}\n\n{render_table(summaries[pool])}\n", flush=True)
        print(f"Loss in pairs\n\n{in_pairs(runs, ('regmean', *(options.merge or MERGES)))}\n", flush=True)
    if options.results:
        files.write_json(options.results, summaries)
    print(json.dumps({pool: summary["best"] for pool, summary in summaries.items()}))


if __name__ == "__main__":
    main()
