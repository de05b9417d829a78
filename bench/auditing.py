"""Auditing: all pairs of four adapters beside gradience's ``merge_audit``, a pair of an 8B base, and the memory.

    python bench/auditing.py [--trials 5] [--out results.json]

Adapters are random, rank 16, float32, all seven linear modules, written once as PEFT folders and read by both sides.

- ``speedup_vs_gradience``: four adapters of TinyLlama's 22 layers. gradience: ``merge_audit`` of each of the six pairs,
  in float64 as it is by default. This project: one ``audit`` of the four, which also has every adapter's spectrum,
  overlaps of inputs, agreement both ways and the SHA-256 of what it read. Folders are read inside the clock on both
  sides. Beside it ``speedup_from_own_folders``, the same adapters in this project's layout, and
  ``processor_seconds_ratio``, which other work on the machine changes less.
- ``pair_seconds_8b``: two adapters of 32 layers of an 8B base's shapes, PEFT's folders.
- ``memory_mb``: what the same audit adds to the resident set at its peak, from PEFT's folders, after an audit of two
  layers. Two and eight layers stand beside it, and folders of this project's or mlx-lm's layout. All are streamed.

Each side has a process of its own, gradience's without what is preloaded for MLX; it gets the number of threads that a
short search finds best. The processes take turns, and the ratio is the median of the turns'. Before that both are asked
for the mean overlap of every module, which must agree to 1e-6. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.merging import processor, ratio
from mlx_rsgwm.bench.merging_sides import thread_seconds
from mlx_rsgwm.bench.random_pools import COUNT, LINEAR, WIDE, Shapes, write_hollow_base, write_pool
from mlx_rsgwm.bench.resident_memory import measured
from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.bench.shapes import LLAMA_8B, TINYLLAMA
from mlx_rsgwm.bench.sides import side_process
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.models.adapter import Adapter

CLOSE = 1e-6
WIDE_LAYERS = (2, 8, 32)


class OurSide:
    """Audits of whole pools."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def audit(self, folders: Sequence[Path]) -> dict[str, Any]:
        """Seconds and memory of one audit, and the mean overlaps by pair and module."""
        from mlx_rsgwm.audit.pool_audit import audit
        from mlx_rsgwm.converters import base_layers
        from mlx_rsgwm.core import files

        # What an earlier trial knows of the same files is no part of an audit.
        files._sha256_while.cache_clear()
        base_layers._layers_while.cache_clear()
        step = measured(lambda: audit(folders))
        pairs = step.pop("result").pairs
        step["overlaps"] = [{module.name: module.mean_overlap for module in pair.modules} for pair in pairs]
        return step


class GradienceSide:
    """Audits of one pair after the other, after a search for the best number of threads on the first."""

    def __init__(self, folders: Sequence[Path]) -> None:
        import torch
        from gradience.vnext.merge import merge_audit

        self._audit = merge_audit

        def once() -> None:
            merge_audit(str(folders[0]), str(folders[1]))

        tried = thread_seconds(once)
        torch.set_num_threads(min(tried, key=lambda threads: tried[threads]))
        self.facts = {"threads": torch.get_num_threads(), "tried": tried}

    def audit(self, folders: Sequence[Path]) -> dict[str, Any]:
        """As :meth:`OurSide.audit`."""
        step = measured(lambda: [self._audit(str(first), str(second)) for first, second in combinations(folders, 2)])
        step["overlaps"] = [
            {layer["layer_name"]: layer["metrics"]["mean_overlap"] for layer in report.layer_verdicts}
            for report in step.pop("result")
        ]
        return step


def peft_pool(folder: Path, shapes: Shapes, config: Mapping[str, Any], count: int) -> tuple[list[Path], list[Path]]:
    """``count`` random adapters for a base of that config, as PEFT's folders and as this project's."""
    base = write_hollow_base(folder / "base", config, shapes)
    plain = write_pool(folder / "plain", shapes, config["num_hidden_layers"], count, importance=False)
    return [to_peft(Adapter.load(path), str(base), folder / "peft" / path.name) for path in plain], plain


def against_gradience(folder: Path, trials: int) -> dict[str, Any]:
    """The ratios of the sides on TinyLlama's shapes, and every step."""
    peft, plain = peft_pool(folder, LINEAR, TINYLLAMA, COUNT)
    with (
        side_process("ours", OurSide, without_mlx=False) as mine,
        side_process("gradience", GradienceSide, peft) as peer,
    ):
        sides = {"ours": (mine, peft), "gradience": (peer, peft), "ours, own folders": (mine, plain)}
        require_same(*(side.call("audit", peft)["overlaps"] for side in (mine, peer)))
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for trial in range(trials):
            for name, (side, folders) in sorted(sides.items(), reverse=trial % 2 == 1):
                step = side.call("audit", folders)
                del step["overlaps"]
                steps[name].append(step)
                told = f"{step['seconds']:.3f} s, {step['cpu_seconds']:.3f} s of processors, {step['mb']:.0f} MB"
                print(f"{name:<17} {told}", flush=True)
    peers = steps["gradience"]
    return {
        "speedup_vs_gradience": round(ratio(peers, steps["ours"]), 2),
        "speedup_from_own_folders": round(ratio(peers, steps["ours, own folders"]), 2),
        "processor_seconds_ratio": round(ratio(peers, steps["ours"], "cpu_seconds", "cpu_seconds"), 2),
        "gradience": peer.facts,
        "steps": steps,
    }


def require_same(first: Sequence[dict[str, float]], second: Sequence[dict[str, float]]) -> None:
    """Both sides measured the same of every module of every pair; the second's names may have a prefix.

    Raises:
        RuntimeError: they did not.
    """
    for mine, peers in zip(first, second, strict=True):
        matched = [next(value for name, value in peers.items() if name.endswith(module)) for module in mine]
        if len(mine) != len(peers) or not np.allclose(list(mine.values()), matched, rtol=CLOSE, atol=0):
            raise RuntimeError("the sides disagree about overlaps")


def pairs_of_8b(folder: Path) -> dict[str, Any]:
    """Seconds and memory of a pair by its number of layers, in a process of its own that has audited the least one."""
    pools = {
        layers: peft_pool(folder / str(layers), WIDE, {**LLAMA_8B, "num_hidden_layers": layers}, 2)
        for layers in WIDE_LAYERS
    }
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for kind, name in enumerate(("peft", "own")):
        rows[name] = {}
        with side_process("ours", OurSide, without_mlx=False) as side:
            side.call("audit", pools[min(WIDE_LAYERS)][kind])
            for layers, pair in pools.items():
                step = side.call("audit", pair[kind])
                rows[name][layers] = {figure: round(step[figure], 3) for figure in ("seconds", "mb")}
                print(f"8B, {layers:>2} layers, {name}: {step['seconds']:.2f} s, {step['mb']:.0f} MB", flush=True)
    most = max(WIDE_LAYERS)
    return {
        "pair_seconds_8b": round(rows["peft"][most]["seconds"], 2),
        "memory_mb": round(rows["peft"][most]["mb"]),
        "pairs_8b": rows,
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON, every trial included, here too")
    options = parser.parse_args()
    result: dict[str, Any] = {"versions": versions(), "processor": processor(), "cores": os.cpu_count()}
    print(f"{result['processor']}, {result['cores']} cores", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        result |= against_gradience(Path(temporary) / "tinyllama", options.trials)
        result |= pairs_of_8b(Path(temporary) / "8b")
    shown = (
        "speedup_vs_gradience",
        "pair_seconds_8b",
        "memory_mb",
        "speedup_from_own_folders",
        "processor_seconds_ratio",
    )
    give_result(result, options.out, {name: result[name] for name in shown})


if __name__ == "__main__":
    main()
