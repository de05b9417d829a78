"""Merging: this project against PEFT's ``add_weighted_adapter``, against a forward pass, and as pools grow.

    python bench/merging.py [--trials 5] [--budget 120] [--growing regmean] [--plot growth.png] [--out results.json]

Adapters are random, written once and read by both sides: T = 4, rank 16, q/k/v/o of TinyLlama-1.1B's 22 layers (hidden
2048, key–value 256), 4.5M parameters each, float32. PEFT merges by ``linear``, ``ties``, ``dare_ties`` and ``svd`` at
equal weights 1/T and density 0.5, its other options at their defaults; this project by ``peft:<the same>``.

Inside the clock, each with the merged weights evaluated at its end:

- ``speedup_vs_peft``: adapters in memory on both sides. PEFT: ``add_weighted_adapter`` on a model of bare float32
  Linear layers, whose weights are never touched, with the adapters attached. This project: ``merge`` of four loaded
  adapters with its checks, and like PEFT without a diagnosis.
- ``speedup_vs_peft_diagnosed``: the same with the diagnosis that a merge makes unless told not to: what a user gets.
- ``speedup_vs_peft_from_disk``: adapters in folders on both sides. PEFT: loading them into that model (once in a
  process), then the call. This project: ``merge`` of the folders, with SHA-256 of the files against the manifests and
  the diagnosis.

Each side and method has a process of its own; the processes take turns, merge by merge. PEFT's has torch's own BLAS (a
preload or thread number set for this project is taken out of its environment) and the number of threads that a short
search finds best; it is printed, and so are the processor and the losing rows (ratios below 1). Memory is what the
first merge from the folders adds to the resident set at its peak; of PEFT, what its adapters do, all of which it needs
in memory, and its call.

``rsgwm_over_forward`` is the time of a default ``rsgwm`` merge of such a pool, importance included, over that of one
forward pass of 512 tokens, logits and all, through a random model of TinyLlama's shapes in float32, in turns;
``regmean_over_forward`` that of a default ``regmean``, with sketches of 64 columns of every input.

``growth`` is time and peak memory of ``rsgwm``, of ``linear`` (the exact mean, truncated) and of ``regmean`` for T = 2
… 64 adapters of rank 16 (q/k/v/o of six layers of TinyLlama's shapes, 1.2M parameters), and of 1M … 200M parameters
(rank 16, all linear modules of 8B-like layers, more and more layers, T = 4: one adapter under four names; of
``regmean`` up to 21M), each in a fresh process. Memory includes the result. An exponent is the slope of a straight line
through the logarithms.

The last line is JSON: these figures (``speedup``: seconds of the peer by those of this project;
``memory``: of this project by that of the peer), by method where there are several.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_rsgwm.bench.merging_growth import METHODS as GROWN
from mlx_rsgwm.bench.merging_growth import grow, plot
from mlx_rsgwm.bench.merging_sides import process_of
from mlx_rsgwm.bench.random_pools import ATTENTION, COUNT, LAYERS, write_pool
from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.models.adapter import Adapter

METHODS = ("linear", "ties", "dare_ties", "svd")


def in_turns(sides: Mapping[str, Callable[[], dict[str, Any]]], trials: int, budget: float) -> dict[str, list[Any]]:
    """Steps of every side in turns: ``trials`` of them, fewer once ``budget`` seconds are over."""
    started = time.perf_counter()
    steps: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(trials):
        for name, step in sides.items():
            steps[name].append(step())
        if time.perf_counter() - started > budget:
            break
    return steps


def ratio(over: Sequence[Any], under: Sequence[Any], *clocks: str) -> float:
    """Median over the trials of the seconds of ``over`` by those of ``under``; ``clocks`` says which of each."""
    first, second = clocks or ("seconds", "seconds")
    return statistics.median(above[first] / other[second] for above, other in zip(over, under, strict=True))


def against_peft(folder: Path, trials: int, budget: float) -> dict[str, Any]:
    """Every method on both sides, and that both come to the same."""
    folders = write_pool(folder / "plain", ATTENTION, LAYERS, COUNT, importance=False)
    converted = [to_peft(Adapter.load(path), "none", folder / "peft" / path.name) for path in folders]
    rows: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        with (
            process_of("ours thrice", f"peft:{method}", folders) as mlx,
            process_of("peft", method, converted) as peft,
        ):
            steps = in_turns({"ours": mlx, "peft": peft}, trials, budget)
        mine, peer = steps["ours"], steps["peft"]
        # Random masks differ between the sides: 1 % is what that leaves of a norm at these sizes.
        if not math.isclose(mine[0]["norm"], peer[0]["norm"], rel_tol=0.01 if method.startswith("dare") else 1e-4):
            raise RuntimeError(f"{method}: the sides disagree, norms {mine[0]['norm']} and {peer[0]['norm']}")
        rows[method] = {
            "speedup_vs_peft": ratio(peer, mine),
            "speedup_vs_peft_diagnosed": ratio(peer, mine, "seconds", "diagnosed"),
            "speedup_vs_peft_from_disk": ratio(peer, mine, "from_disk", "from_disk"),
            "memory_vs_peft": mine[0]["mb"] / peer[0]["mb_with_adapters"],
            "peft_threads": peer[0]["threads"],
            "steps": steps,
        }
        print(
            f"{method:<10} ours {_seconds(mine)} s, diagnosed {_seconds(mine, 'diagnosed')} s, from disk "
            f"{_seconds(mine, 'from_disk')} s, {mine[0]['mb']:.0f} MB; PEFT {_seconds(peer)} s, from disk "
            f"{_seconds(peer, 'from_disk')} s, {peer[0]['mb_with_adapters']:.0f} MB, {peer[0]['threads']} threads"
            f" (tried: {', '.join(f'{threads} {seconds:.2f} s' for threads, seconds in peer[0]['tried'].items())})",
            flush=True,
        )
        told = {name: value for name, value in rows[method].items() if name.startswith("speedup")}
        for name, value in told.items():
            print(f"    {name} {value:.2f}{' (slower than PEFT)' if value < 1 else ''}", flush=True)
    return {
        figure: {method: round(row[figure], 3) if figure != "steps" else row[figure] for method, row in rows.items()}
        for figure in rows[METHODS[0]]
    }


def _seconds(steps: Sequence[Mapping[str, float]], clock: str = "seconds") -> str:
    return "/".join(f"{step[clock]:.2f}" for step in steps)


def over_forward(folder: Path, trials: int, budget: float) -> dict[str, Any]:
    """Default merges by importance and by directions over one forward pass, after one unmeasured step of each."""
    folders = write_pool(folder / "important", ATTENTION, LAYERS, COUNT, importance=True, directions=True)
    with (
        process_of("ours", "rsgwm", folders) as rsgwm,
        process_of("ours", "regmean", folders) as regmean,
        process_of("forward", "", ()) as forward,
    ):
        sides = {"rsgwm": rsgwm, "regmean": regmean, "forward": forward}
        for step in sides.values():
            step()
        steps = in_turns(sides, trials, budget)
    print("; ".join(f"{name} {_seconds(steps[name])} s" for name in sides), flush=True)
    ratios = {f"{name}_over_forward": round(ratio(steps[name], steps["forward"]), 4) for name in ("rsgwm", "regmean")}
    return {**ratios, "forward_steps": steps}


def processor() -> str:
    """The processor's name, as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    if sys.platform == "darwin":
        named = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout.strip()
    return named or platform.processor() or platform.machine()


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--budget", type=float, default=120, help="seconds after which a method gets no further trial")
    parser.add_argument("--only", choices=("peft", "forward", "growth"), help="one part instead of all")
    parser.add_argument("--growing", action="append", choices=list(GROWN), help="repeat; of growth, these alone")
    parser.add_argument("--plot", type=Path, help="write the growth as a PNG here")
    parser.add_argument("--out", type=Path, help="write the JSON, every trial included, here too")
    options = parser.parse_args()
    result: dict[str, Any] = {"versions": versions(), "processor": processor(), "cores": os.cpu_count()}
    print(f"{result['processor']}, {result['cores']} cores", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.only in (None, "peft"):
            result |= against_peft(folder, options.trials, options.budget)
        if options.only in (None, "forward"):
            result |= over_forward(folder, options.trials, options.budget)
        if options.only in (None, "growth"):
            result["growth"] = grow(folder, options.growing or tuple(GROWN))
            if options.plot:
                plot(result["growth"], options.plot)
    give_result(result, options.out, {name: value for name, value in result.items() if not name.endswith("steps")})


if __name__ == "__main__":
    main()
