"""What a batch can gain on this machine: passes of one model over one row and over many, timed in turns.

    python bench/batching.py [--base smollm2-135m] [--past 64] [--trials 5] [--out results.json]

- ``decode``: milliseconds of a step that reads one token of every row after ``--past`` others, head included, and
  ``gain``, tokens a second over those of a single row: no server's throughput can grow further by more clients.
- ``prefill``: the same of ``--past`` tokens a row, read at once.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.inference.generate import unread
from mlx_rsgwm.models.base import Base, load_base
from mlx_rsgwm.models.split import split_head


def prefill(base: Base, rows: int, past: int) -> Callable[[], list[Any]]:
    """What reads so many random prompts, and returns their caches."""
    hidden, head = split_head(base.model)
    drawn: Any = np.random.default_rng(rows).integers(5, 1000, (rows, past)).tolist()

    def work() -> list[Any]:
        ids, caches, _ = unread(base.model, drawn, batched=True)
        mx.eval(head(hidden(ids, cache=caches)[:, -1:]), [cache.state for cache in caches])
        return caches

    return work


def decode(base: Base, rows: int, past: int) -> Callable[[], None]:
    """What reads one token more of every row, and forgets it."""
    hidden, head = split_head(base.model)
    caches = prefill(base, rows, past)()
    ids = mx.zeros((rows, 1), dtype=mx.int32)

    def work() -> None:
        mx.eval(head(hidden(ids, cache=caches)))
        for cache in caches:
            cache.trim(1)

    return work


def compare(works: dict[int, Callable[[], Any]], trials: int) -> dict[str, dict[str, float]]:
    """Medians in milliseconds by number of rows, taken in turns after one warm-up of each, and gains over one row."""
    times: dict[int, list[float]] = {rows: [] for rows in works}
    for trial in range(trials + 1):
        for rows, work in works.items():
            started = time.perf_counter()
            work()
            if trial:
                times[rows].append(1000 * (time.perf_counter() - started))
    medians = {rows: statistics.median(taken) for rows, taken in times.items()}
    return {
        "ms": {str(rows): round(median, 1) for rows, median in medians.items()},
        "gain": {str(rows): round(rows * medians[1] / median, 2) for rows, median in medians.items()},
    }


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--past", type=int, default=64)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load_base(options.base)
    shown = {
        name: compare({rows: make(base, rows, options.past) for rows in counts}, options.trials)
        for name, make, counts in (("decode", decode, (1, 4, 16, 32, 48)), ("prefill", prefill, (1, 4, 16)))
    }
    give_result({**shown, "past": options.past, "base": options.base, "versions": versions()}, options.out, shown)


if __name__ == "__main__":
    main()
