"""Measuring pairs of adapters: one pair at TinyLlama's shapes, and the table of more and more adapters.

    python bench/probing.py [--trials 3] [--least 16] [--most 256] [--out results.json]

- ``pair_seconds``: ``rsgwm probe measure`` of two random adapters of rank 16 on TinyLlama's 22 layers, all seven linear
  modules, without data; the median, and ``pair_mb`` what it adds to the resident set at its peak.
- ``growth``: tables of ``--least``, twice as many, … ``--most`` adapters of one small module each: seconds,
  milliseconds a pair, and what making the table adds to the resident set at its peak (an adapter's headers stay, rows
  do not), each in a fresh process. With two or more tables, an exponent is the slope of a straight line through the
  logarithms, over the pairs.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from itertools import count as count_from
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlx_rsgwm.bench.random_pools import LAYERS, LINEAR, write_pool
from mlx_rsgwm.bench.resident_memory import measured
from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.bench.sides import side_process
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.probe.inputs import probed_adapters
from mlx_rsgwm.probe.measure import write_table

SMALL = {"self_attn.q_proj": (64, 64)}
FIGURES = ("seconds", "mb")


class Measuring:
    """Tables of the adapters in some folders."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def table(self, folders: Sequence[Path], out: Path) -> dict[str, float]:
        """Seconds and MB of one, from the folders."""
        out.unlink(missing_ok=True)
        step = measured(lambda: write_table(out, *probed_adapters(folders)))
        return {name: step[name] for name in FIGURES}


def one_pair(folder: Path, trials: int) -> dict[str, Any]:
    """Seconds and MB of a pair at TinyLlama's shapes."""
    folders = write_pool(folder / "wide", LINEAR, LAYERS, 2, importance=False)
    with side_process("probe measure", Measuring, without_mlx=False) as side:
        steps = [side.call("table", folders, folder / "pair.jsonl") for _ in range(trials)]
    for step in steps:
        print(f"a pair: {step['seconds']:.2f} s, {step['mb']:.0f} MB", flush=True)
    return {f"pair_{name}": round(statistics.median(step[name] for step in steps), 2) for name in FIGURES}


def growth(folder: Path, least: int, most: int) -> dict[str, Any]:
    """Seconds, milliseconds a pair and MB of larger and larger tables, and the exponents."""
    counts = [*takewhile(lambda count: count < most, (least << power for power in count_from())), most]
    folders = write_pool(folder / "many", SMALL, 1, most, importance=False)
    rows = []
    for count in counts:
        with side_process("probe measure", Measuring, without_mlx=False) as side:
            step = side.call("table", folders[:count], folder / f"{count}.jsonl")
        pairs = math.comb(count, 2)
        each = 1000 * step["seconds"] / pairs
        rows.append({"adapters": count, "pairs": pairs, "ms_a_pair": round(each, 3), **step})
        print(
            f"{count} adapters: {pairs} pairs, {step['seconds']:.1f} s, {each:.2f} ms each, {step['mb']:.0f} MB",
            flush=True,
        )
    if len(rows) < 2:
        return {"growth": rows}
    x = [math.log(row["pairs"]) for row in rows]
    slopes = {
        name: round(statistics.linear_regression(x, [math.log(row[name]) for row in rows]).slope, 3) for name in FIGURES
    }
    return {"growth": rows, "exponents": slopes}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--least", type=int, default=16, help="adapters of the smallest table")
    parser.add_argument("--most", type=int, default=256, help="adapters of the largest table")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    options = parser.parse_args()
    result: dict[str, Any] = {"versions": versions()}
    with tempfile.TemporaryDirectory() as temporary:
        result |= one_pair(Path(temporary), options.trials)
        result |= growth(Path(temporary), options.least, options.most)
    give_result(result, options.out)


if __name__ == "__main__":
    main()
