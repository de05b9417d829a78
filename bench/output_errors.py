"""How much of its adapters' outputs a merge by directions keeps, on held-out rows: columns, rank, recollection, bounds.

    python bench/output_errors.py --pool A --pool B --rows ROWS/A --rows ROWS/B --held-out HELD/A --held-out HELD/B

Adapters with recorded directions, and for each, in their order, rows of its task to recollect directions from and
held-out ones. For every merge: the output error ‖X_t (ΔW − ΔW_t)‖² / ‖X_t ΔW_t‖² with X_t the held-out rows' inputs
under adapter t, mean over adapters and modules (1: as without an adapter, 0: intact), with an interval over modules;
and with ``--losses`` the held-out loss in nats a token, mean over rows, with its difference from ``regmean whole`` and
an interval over rows. ``weighted sums`` is no merge but a bound: Σ c_t ΔW_t with the c_t that are best on these very
rows, for every module its own. ``held-out whole`` merges by the held-out rows' own matrices.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.data.corpus import load_corpus
from mlx_rsgwm.inference.open import find_base
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.recollect import Recollection
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.models.directions import role_grams
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.training.collect_directions import collect_directions, draw_rows
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.losses import held_out_nats

DRAFT = "draft"
RESAMPLES = 4000
Grams = Sequence[Mapping[str, np.ndarray]]
REGMEAN = MergeOptions("regmean")


@dataclass(frozen=True)
class DraftRows:
    """The draft rows of a corpus, as what directions are collected from."""

    rows: list[TokenRow]
    template: Any
    hash: str

    def token_rows(self, *_: Any) -> tuple[list[TokenRow], int]:
        """All of them."""
        return self.rows, 0


def draft_rows(path: Path, base: Base, count: int = 0) -> DraftRows:
    """``count`` draft rows of the corpus at ``path``; 0 for all."""
    corpus = load_corpus(path)
    rows = [row for row in corpus.token_rows(base.tokenizer, 1024, "drop")[0] if row.role == DRAFT]
    return DraftRows(draw_rows(rows, count, 0), corpus.template, corpus.hash)


def with_whole(base: Base, adapter: Adapter, rows: DraftRows) -> Adapter:
    """The adapter in memory, with whole matrices of ``rows`` under it."""
    data: Any = rows
    arrays, metadata = collect_directions(base, adapter, data, rank=0)
    return replace(adapter, path=None, directions=arrays, directions_metadata=metadata)


def with_columns(adapter: Adapter, columns: int) -> Adapter:
    """The adapter in memory with the first ``columns`` of its sketches: those of a sketch of so many."""
    directions = {
        name: array[:, :columns] if name.endswith(".sketch") else array for name, array in adapter.directions.items()
    }
    metadata = {**adapter.directions_metadata, "k": str(columns)}
    return replace(adapter, path=None, directions=directions, directions_metadata=metadata)


def matrices(adapter: Adapter) -> dict[str, np.ndarray]:
    """Whole second moments by module."""
    grams = role_grams(lambda: dict(adapter.directions), adapter.directions_metadata, DRAFT, adapter.where)
    return {name: grams[name].dense() for name in grams}


def product(adapter: Adapter, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module, float64, the scale in A."""
    a, b = (np.array(adapter.weights[f"{name}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    return adapter.spec.scale * a, b


def inner(gram: np.ndarray, first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """tr((A₁B₁)ᵀ G A₂B₂)."""
    return float(np.sum((first[0].T @ gram @ second[0]) * (first[1] @ second[1].T)))


def errors(merged: Adapter, pool: Sequence[Adapter], grams: Grams) -> np.ndarray:
    """Output errors, (modules, adapters)."""

    def error(gram: np.ndarray, result: Any, update: Any) -> float:
        return (inner(gram, result, result) - 2 * inner(gram, result, update)) / inner(gram, update, update) + 1

    return np.array(
        [
            [
                error(gram[name], product(merged, name), product(adapter, name))
                for adapter, gram in zip(pool, grams, strict=True)
            ]
            for name in merged.modules()
        ]
    )


def best_sums(pool: Sequence[Adapter], grams: Grams) -> np.ndarray:
    """Output errors of Σ c_t ΔW_t with the best c for every module, (modules, adapters)."""
    rows = []
    for name in grams[0]:
        updates = [product(adapter, name) for adapter in pool]
        tables = []
        for index, gram in enumerate(grams):
            table = np.array([[inner(gram[name], first, second) for second in updates] for first in updates])
            tables.append(table / table[index, index])
        right = sum(table[:, index] for index, table in enumerate(tables))
        best = np.linalg.solve(np.sum(tables, axis=0), right)
        rows.append([best @ table @ best - 2 * best @ table[:, t] + 1 for t, table in enumerate(tables)])
    return np.array(rows)


def interval(values: np.ndarray) -> list[float]:
    """Percentile interval of the mean of ``values`` over resamples of them."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return [round(float(limit), 5) for limit in np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))]


def row_losses(base: Base, merged: Adapter, held_out: Sequence[DraftRows]) -> np.ndarray:
    """Nats a trained token of every held-out row."""
    weights = {name: value.astype(mx.float32) for name, value in merged.weights.items()}
    with adapted(base.model, fitting_modules(base, merged), replace(merged.spec, dropout=0.0), weights):
        sums = [held_out_nats(base.model, [row], 1)[DRAFT] for rows in held_out for row in rows.rows]
    return np.array([nats / count for nats, count in sums])


def merges(options: argparse.Namespace, base: Base, pool: Sequence[Adapter]) -> Iterator[tuple[str, Adapter]]:
    """What is compared, in turn; ``regmean whole`` first."""
    data: list[Any] = [draft_rows(path, base, options.count) for path in options.rows]
    yield "regmean whole", merge([with_whole(base, *pair) for pair in zip(pool, data, strict=True)], REGMEAN)
    for columns in options.columns:
        yield f"regmean k={columns}", merge([with_columns(adapter, columns) for adapter in pool], REGMEAN)
    recollection = Recollection(base, data, rows=0)
    yield "regmean recollected", merge(pool, REGMEAN, recollection=recollection)
    yield "linear", merge(pool, MergeOptions("linear"))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, meaning in (("pool", "an adapter"), ("rows", "its task's rows"), ("held-out", "held-out rows")):
        parser.add_argument(f"--{name}", type=Path, action="append", required=True, help=f"{meaning}; repeatable")
    parser.add_argument("--columns", type=int, nargs="*", default=[64, 52, 48, 32], help="of the sketches, at most k")
    parser.add_argument("--count", type=int, default=48, help="rows of each adapter to collect from; 0 for all")
    parser.add_argument("--losses", type=int, default=0, help="held-out rows of each adapter whose loss is measured")
    options = parser.parse_args()
    pool = [Adapter.load(path) for path in options.pool]
    base = load_base(find_base(pool, None), dtype="float32")
    held_out = [draft_rows(path, base) for path in options.held_out]
    measured = [with_whole(base, *pair) for pair in zip(pool, held_out, strict=True)]
    grams = [matrices(adapter) for adapter in measured]
    bounds = {"held-out whole": errors(merge(measured, REGMEAN), pool, grams), "weighted sums": best_sums(pool, grams)}
    figures: dict[str, Any] = {}
    for name, table in bounds.items():
        figures[name] = {"output_error": [round(float(table.mean()), 5), *interval(table.mean(axis=1))]}
        print(name, json.dumps(figures[name]), flush=True)
    judged = [replace(rows, rows=rows.rows[: options.losses]) for rows in held_out]
    reference: np.ndarray | None = None
    for name, merged in merges(options, base, pool):
        table = errors(merged, pool, grams)
        figures[name] = {"output_error": [round(float(table.mean()), 5), *interval(table.mean(axis=1))]}
        if options.losses:
            losses = row_losses(base, merged, judged)
            reference = losses if reference is None else reference
            difference = losses - reference
            figures[name] |= {
                "loss": round(float(losses.mean()), 5),
                "difference": [round(float(difference.mean()), 5), *interval(difference)],
            }
        print(name, json.dumps(figures[name]), flush=True)
    print(json.dumps({"versions": versions(), **figures}))


if __name__ == "__main__":
    main()
