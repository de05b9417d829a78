"""Merging: this project against PEFT's ``add_weighted_adapter``, against a forward pass, and as pools grow.

    python bench/merging.py [--trials 5] [--budget 120] [--plot growth.png] [--out results.json]

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
forward pass of 512 tokens, logits and all, through a random model of TinyLlama's shapes in float32, in turns.

``growth`` is time and peak memory of ``rsgwm`` and of ``linear`` (the exact mean, truncated) for T = 2 … 64 adapters of
rank 16 (q/k/v/o of six layers of TinyLlama's shapes, 1.2M parameters), and of 1M … 200M parameters (rank 16, all linear
modules of 8B-like layers, more and more layers, T = 4: one adapter under four names), each in a fresh process. Memory
includes the result. An exponent is the slope of a straight line through the logarithms.

The last line is JSON: these figures (``speedup``: seconds theirs / ours; ``memory``: ours / theirs), by method where
there are several.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.bench.shapes import TINYLLAMA
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.evaluation.report.figures import legend_below, write_figure
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

Shapes = Mapping[str, tuple[int, int]]  # module inside a block: (in, out)
ATTENTION: Shapes = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (2048, 256),
    "self_attn.v_proj": (2048, 256),
    "self_attn.o_proj": (2048, 2048),
}
WIDE: Shapes = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}
LAYERS, RANK, SCALE, COUNT, TOKENS = 22, 16, 2.0, 4, 512
METHODS = ("linear", "ties", "dare_ties", "svd")
DENSITY = 0.5
COMPARED = "model.layers.0.self_attn.q_proj"
GROWING_COUNTS = (2, 4, 8, 16, 32, 64)
GROWING_LAYERS = (1, 4, 16, 64, 152)  # 1.3M … 199M parameters
MB = 2**20


# --- pools ---------------------------------------------------------------------------------------------------------


def write_pool(folder: Path, shapes: Shapes, layers: int, count: int, importance: bool) -> list[Path]:
    """``count`` random adapters from one lora_a initialisation; it and an importance are kept with ``importance``."""
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()}
    mx.random.seed(0)
    init = {f"{name}.lora_a": mx.random.uniform(-1, 1, (rows, RANK)) / rows**0.5 for name, (rows, _) in modules.items()}
    mx.eval(init)
    written = []
    for index in range(count):
        weights = {}
        for name, (rows, columns) in modules.items():
            weights[f"{name}.lora_a"] = init[f"{name}.lora_a"] + 0.1 * mx.random.normal((rows, RANK)) / rows**0.5
            weights[f"{name}.lora_b"] = 0.02 * mx.random.normal((RANK, columns))
        recorded = {f"draft/{name}": mx.abs(mx.random.normal(value.shape)) for name, value in weights.items()}
        spec = LoraSpec(RANK, SCALE, 0.0, tuple(shapes), layers)
        adapter = Adapter(spec, weights, manifest={"kind": "trained"})
        if importance:
            adapter = replace(adapter, importance=recorded, init=init)
        written.append(adapter.save(folder / f"adapter-{index:02}"))
    return written


# --- memory --------------------------------------------------------------------------------------------------------


def resident() -> float:
    """This process's resident memory in MB; where the system does not say, its peak so far."""
    return _status("VmRSS") or _highest()


def forget_peak() -> None:
    """Let :func:`peak` count from now on, on Linux; elsewhere it is the peak of the whole process."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> float:
    """The highest resident memory since :func:`forget_peak`, in MB."""
    return _status("VmHWM") or _highest()


def _status(name: str) -> float:
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")), 0.0)


def _highest() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MB if sys.platform == "darwin" else 1024)


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of ``work`` on the wall and of the processors, the memory it added at its peak in MB, and its result."""
    forget_peak()
    before, busy, started = resident(), time.process_time(), time.perf_counter()
    result = work()
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return {"seconds": seconds, "cpu_seconds": busy, "mb": peak() - before, "before": before, "result": result}


# --- sides, each in a process of its own ---------------------------------------------------------------------------


def our_side(folders: Sequence[Path], method: str) -> Iterator[dict[str, Any]]:
    """A merge from the folders for every step."""
    while True:
        step = measured(lambda: merge(folders, _options(method, len(folders))))
        step["result_mb"] = sum(value.nbytes for value in step.pop("result").weights.values()) / MB
        yield step


def our_side_thrice(folders: Sequence[Path], method: str) -> Iterator[dict[str, Any]]:
    """A merge from the folders, one of loaded adapters, and one without diagnosis, for every step; ``norm`` is of one
    merged product.
    """
    options = _options(method, len(folders))
    first = measured(lambda: merge(folders, options))  # before anything is held, for its memory
    del first["result"]
    held = [replace(Adapter.load(folder), path=None) for folder in folders]
    while True:
        from_disk = measured(lambda: merge(folders, options))["seconds"]
        diagnosed = measured(lambda: merge(held, options))["seconds"]
        step = measured(lambda: merge(held, options, diagnosed=False))
        merged: Adapter = step.pop("result")
        a, b = (merged.weights[f"{COMPARED}.{leaf}"] for leaf in ("lora_a", "lora_b"))
        norm = mx.sqrt(((a.T @ a) * (b @ b.T)).sum()) * merged.spec.scale
        step |= {"norm": norm.item(), "from_disk": from_disk, "diagnosed": diagnosed, "mb": first["mb"]}
        del merged, a, b
        yield step


def _options(method: str, count: int) -> MergeOptions:
    parameters = {"density": DENSITY} if "ties" in method else {}
    return MergeOptions(method, parameters=parameters, weights=(1 / count,) * count)


def peft_side(folders: Sequence[Path], method: str) -> Iterator[dict[str, Any]]:
    """An ``add_weighted_adapter`` for every step, on bare Linear layers with the adapters attached (PEFT's folders)."""
    import peft
    import torch

    config = peft.LoraConfig.from_pretrained(str(folders[0]))
    config.task_type = None  # bare layers are no language model
    bare = bare_layers()
    loading = measured(lambda: attached(bare, folders, config))
    model = loading["result"]
    names, weights = [str(index) for index in range(len(folders))], [1 / len(folders)] * len(folders)
    first = bare.get_submodule(COMPARED)

    def merged() -> None:
        model.base_model.add_weighted_adapter(names, weights, "merged", method, density=DENSITY)

    def once() -> None:
        if method == "svd":  # a merge is 88 of these, and takes a minute or two
            torch.linalg.svd(torch.randn(first.out_features, first.in_features))
        else:
            merged()
            model.delete_adapter("merged")

    # Memory is the first merge's; where that takes so long, the first after the search, which leaves little behind.
    fresh = None if method == "svd" else measured(once)
    tried = thread_seconds(once)
    torch.set_num_threads(min(tried, key=lambda threads: tried[threads]))
    while True:
        step = measured(merged)
        step |= {"threads": torch.get_num_threads(), "tried": tried}
        # From before the adapters came: the peak of loading them, or of merging on top of them.
        peak_step = fresh or step
        step["mb_with_adapters"] = max(loading["mb"], peak_step["before"] + peak_step["mb"] - loading["before"])
        a, b = (getattr(first, leaf)["merged"].weight.detach() for leaf in ("lora_A", "lora_B"))
        step["norm"] = torch.linalg.norm(b @ a).item() * first.scaling["merged"]
        step["from_disk"] = loading["seconds"] + step["seconds"]
        del step["result"], a, b
        model.delete_adapter("merged")
        yield step


def thread_seconds(work: Callable[[], None]) -> dict[int, float]:
    """Seconds of ``work`` by torch's number of threads, 1, 2, 4 … and all cores: the better of two runs each."""
    import torch

    cores = os.cpu_count() or 1
    seconds = {}
    for threads in sorted({*(2**power for power in range(cores.bit_length())), cores}):
        torch.set_num_threads(threads)
        seconds[threads] = min(measured(work)["seconds"] for _ in range(2))
    return seconds


def attached(bare: Any, folders: Sequence[Path], config: Any) -> Any:
    """PEFT's model of ``bare`` with the adapters loaded under the names 0, 1, …"""
    import peft

    model = peft.PeftModel.from_pretrained(bare, folders[0], adapter_name="0", config=config)
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(index))
    return model


def bare_layers() -> Any:
    """The Linear layers that the adapters are for. Their weights are never written, so they take no memory."""
    import torch

    root = torch.nn.Module()
    root.model = torch.nn.Module()
    root.model.layers = torch.nn.ModuleList()
    for _ in range(LAYERS):
        block = torch.nn.Module()
        block.self_attn = torch.nn.Module()
        for name, (rows, columns) in ATTENTION.items():
            layer = torch.nn.utils.skip_init(torch.nn.Linear, rows, columns, bias=False)
            block.self_attn.add_module(name.rpartition(".")[2], layer)
        root.model.layers.append(block)
    return root


def forward_side(folders: Sequence[Path], method: str) -> Iterator[dict[str, Any]]:
    """A forward pass of 512 tokens through a random float32 model of TinyLlama's shapes for every step."""
    from mlx_lm.models.llama import Model, ModelArgs

    from mlx_rsgwm.models.linux_cpu import quicken

    model = Model(ModelArgs.from_dict(TINYLLAMA))
    mx.eval(model.parameters())
    quicken(model)
    ids = mx.random.randint(0, TINYLLAMA["vocab_size"], (1, TOKENS))
    while True:
        step = measured(lambda: mx.eval(model(ids)))
        del step["result"]
        yield step


SIDES: Mapping[str, Callable[[Sequence[Path], str], Iterator[dict[str, Any]]]] = {
    "ours": our_side,
    "ours thrice": our_side_thrice,
    "peft": peft_side,
    "forward": forward_side,
}


def serve(side: str, method: str, folders: Sequence[Path]) -> None:
    """The process of one side: a step for every line of standard input, its figures as one line of JSON."""
    steps = SIDES[side](folders, method)
    for _ in sys.stdin:
        print(json.dumps(next(steps)), flush=True)


@contextmanager
def process_of(side: str, method: str, folders: Sequence[Path]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Starts a side; the function it gives asks for one step."""
    command = [sys.executable, __file__, "--serve", side, method, *map(str, folders)]
    ours = ("LD_PRELOAD", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if side == "peft" else ()
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asking, answers = process.stdin, process.stdout

        def step() -> dict[str, Any]:
            asking.write("\n")
            asking.flush()
            for line in answers:
                if line.startswith("{"):
                    found: dict[str, Any] = json.loads(line)
                    return found
            raise RuntimeError(f"the {side} side of {method} ended; see its error above")

        yield step
        asking.close()


# --- the comparison ------------------------------------------------------------------------------------------------


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
    return statistics.median(one[first] / other[second] for one, other in zip(over, under, strict=True))


def against_peft(folder: Path, trials: int, budget: float) -> dict[str, Any]:
    """Every method on both sides, and that both come to the same."""
    folders = write_pool(folder / "plain", ATTENTION, LAYERS, COUNT, importance=False)
    converted = [to_peft(Adapter.load(path), "none", folder / "peft" / path.name) for path in folders]
    rows: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        with (
            process_of("ours thrice", f"peft:{method}", folders) as ours,
            process_of("peft", method, converted) as peft,
        ):
            steps = in_turns({"ours": ours, "peft": peft}, trials, budget)
        mine, theirs = steps["ours"], steps["peft"]
        # Random masks differ between the sides: 1 % is what that leaves of a norm at these sizes.
        if not math.isclose(mine[0]["norm"], theirs[0]["norm"], rel_tol=0.01 if method.startswith("dare") else 1e-4):
            raise RuntimeError(f"{method}: the sides disagree, norms {mine[0]['norm']} and {theirs[0]['norm']}")
        rows[method] = {
            "speedup_vs_peft": ratio(theirs, mine),
            "speedup_vs_peft_diagnosed": ratio(theirs, mine, "seconds", "diagnosed"),
            "speedup_vs_peft_from_disk": ratio(theirs, mine, "from_disk", "from_disk"),
            "memory_vs_peft": mine[0]["mb"] / theirs[0]["mb_with_adapters"],
            "peft_threads": theirs[0]["threads"],
            "steps": steps,
        }
        print(
            f"{method:<10} ours {_seconds(mine)} s, diagnosed {_seconds(mine, 'diagnosed')} s, from disk "
            f"{_seconds(mine, 'from_disk')} s, {mine[0]['mb']:.0f} MB; PEFT {_seconds(theirs)} s, from disk "
            f"{_seconds(theirs, 'from_disk')} s, {theirs[0]['mb_with_adapters']:.0f} MB, {theirs[0]['threads']} threads"
            f" (tried: {', '.join(f'{threads} {seconds:.2f} s' for threads, seconds in theirs[0]['tried'].items())})",
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
    """A default merge by importance over one forward pass, after one unmeasured step of each."""
    folders = write_pool(folder / "important", ATTENTION, LAYERS, COUNT, importance=True)
    with process_of("ours", "rsgwm", folders) as ours, process_of("forward", "", ()) as forward:
        ours(), forward()
        steps = in_turns({"rsgwm": ours, "forward": forward}, trials, budget)
    print(f"rsgwm {_seconds(steps['rsgwm'])} s; forward {_seconds(steps['forward'])} s", flush=True)
    return {"rsgwm_over_forward": round(ratio(steps["rsgwm"], steps["forward"]), 4), "forward_steps": steps}


# --- growth --------------------------------------------------------------------------------------------------------


def grow(folder: Path) -> dict[str, Any]:
    """Time and peak memory of two methods as the number of adapters grows, and as the adapters do."""
    rows: dict[str, list[dict[str, Any]]] = {"adapters": [], "parameters": []}
    many = write_pool(folder / "many", ATTENTION, 6, max(GROWING_COUNTS), importance=True)
    for count in GROWING_COUNTS:
        rows["adapters"] += [_growing(method, many[:count], count) for method in ("rsgwm", "linear")]
    for layers in GROWING_LAYERS:
        (one,) = write_pool(folder / f"layers-{layers}", WIDE, layers, 1, importance=True)
        names = [folder / f"layers-{layers}" / f"name-{index}" for index in range(COUNT)]
        for name in names:
            name.symlink_to(one, target_is_directory=True)
        parameters = layers * RANK * sum(map(sum, WIDE.values()))
        rows["parameters"] += [_growing(method, names, parameters) for method in ("rsgwm", "linear")]
    exponents = {
        f"{what}, {method}, {figure}": round(_slope([r for r in rows[what] if r["method"] == method], figure), 3)
        for what in rows
        for method in ("rsgwm", "linear")
        for figure in ("seconds", "mb")
    }
    return {**rows, "exponents": exponents}


def _growing(method: str, folders: Sequence[Path], size: int) -> dict[str, Any]:
    with process_of("ours", method, folders) as step:
        found = step()
    row = {"method": method, "size": size, "adapters": len(folders)}
    row |= {name: round(found[name], 3) for name in ("seconds", "mb", "result_mb")}
    print(row, flush=True)
    return row


def _slope(rows: Sequence[Mapping[str, Any]], figure: str) -> float:
    x, y = ([math.log(row[name]) for row in rows] for name in ("size", figure))
    return statistics.linear_regression(x, y).slope


def plot(growth: Mapping[str, Any], path: Path) -> None:
    """Four panels: seconds and MB over the number of adapters and over their size; PNG or SVG."""
    write_figure(path, partial(_draw, growth=growth), (9, 6), dpi=120)


def _draw(figure: Any, growth: Mapping[str, Any]) -> None:
    axes = figure.subplots(2, 2)
    labels = {"seconds": "seconds", "mb": "peak memory, MB"}
    for column, (what, label) in enumerate(
        {"adapters": "adapters (1.2M each)", "parameters": "parameters (4 adapters)"}.items()
    ):
        for row, name in enumerate(labels):
            panel = axes[row][column]
            for method, marker in (("rsgwm", "o"), ("linear", "s")):
                points = [point for point in growth[what] if point["method"] == method]
                panel.plot([p["size"] for p in points], [p[name] for p in points], marker=marker, label=method)
            if name == "mb":
                points = [point for point in growth[what] if point["method"] == "rsgwm"]
                panel.plot(
                    [p["size"] for p in points], [p["result_mb"] for p in points], "k:", label="the result itself"
                )
            panel.set(xscale="log", yscale="log", xlabel=label, ylabel=labels[name])
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
            if what == "adapters":
                panel.set_xticks(GROWING_COUNTS, list(map(str, GROWING_COUNTS)))
                panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
    legend_below(figure, axes[1][0], 3)


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
    parser.add_argument("--plot", type=Path, help="write the growth as a PNG here")
    parser.add_argument("--out", type=Path, help="write the JSON, every trial included, here too")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        side, method, *folders = options.serve
        serve(side, method, [Path(folder) for folder in folders])
        return
    result: dict[str, Any] = {"versions": versions(), "processor": processor(), "cores": os.cpu_count()}
    print(f"{result['processor']}, {result['cores']} cores", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.only in (None, "peft"):
            result |= against_peft(folder, options.trials, options.budget)
        if options.only in (None, "forward"):
            result |= over_forward(folder, options.trials, options.budget)
        if options.only in (None, "growth"):
            result["growth"] = grow(folder)
            if options.plot:
                plot(result["growth"], options.plot)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if not name.endswith("steps")}))


if __name__ == "__main__":
    main()
