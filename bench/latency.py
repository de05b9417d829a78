"""A user's works, MLX against torch: prefill, decode, LoRA unfused and fused, a training step, a merge, draft–verify.

Each framework runs in a process of its own, with its own libraries: what is preloaded for MLX on Linux would make torch
two to four times slower than it is. Torch's threads, kind of attention and way of batching are the quickest of a short
search, and are printed. Both load the same base folder in the same dtype and see the same token ids. Prefill runs a
prompt through the model, fills the key–value cache and picks one next token. Decode then feeds one given token at a
time, picks a next token after each, and never stops at an end-of-sequence token; neither side waits for a pick before
the next step is issued, as in mlx-lm's own generation. ``bench/works.py`` says what the other works are. The clock
stops after ``mx.eval`` or ``torch.*.synchronize``.

Run as ``rsgwm bench latency``, or from a checkout as ``python bench/latency.py``; the last line is a JSON list of
``{work, mlx_ms, torch_ms, ratio, iqr}``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_rsgwm.bench.conditions import conditions
from mlx_rsgwm.bench.outcome import save_outcome, table
from mlx_rsgwm.bench.sides import side_process
from mlx_rsgwm.bench.works import Times, Trial
from mlx_rsgwm.converters.parity.torch import import_torch, torch_device
from mlx_rsgwm.core.dtypes import DTYPES, name_of
from mlx_rsgwm.core.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.core.machine import SLOW_GFLOPS, all_versions, blas_fix, examine_machine, matmul_gflops
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import Base, resolve_base

KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
WORKS = ("forward", "lora", "fused", "train", "merge", "loop")
ORDER = ("forward", "train", "merge", "loop", "lora", "fused")  # a model is bare first and fused at the end
ATTEMPTS = 3  # of draft–verify


@dataclass(frozen=True)
class LatencyConfig:
    """What to time: ``works`` are names of ``WORKS`` joined by commas.

    ``adapter`` is a folder, or empty for a seeded random one of ``rank`` on q, k, v and o. A training step has
    ``rows`` rows of ``prompt_tokens`` tokens; ``pool`` adapters are merged.
    """

    base: str = "smollm2-135m"
    adapter: str = ""
    works: str = ",".join(WORKS)
    prompt_tokens: int = 128
    new_tokens: int = 32
    rows: int = 2
    pool: int = 4
    trials: int = 5
    warmup: int = 1
    rank: int = 16
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 42

    def __post_init__(self) -> None:
        lowest = {"prompt_tokens": 2, "new_tokens": 1, "rows": 1, "pool": 2, "trials": 1, "warmup": 0, "rank": 1}
        problems = [
            f"{name} must be at least {low}, found {getattr(self, name)}"
            for name, low in lowest.items()
            if getattr(self, name) < low
        ]
        if self.dtype not in ("auto", *DTYPES):
            problems.append(f"dtype must be one of auto, {', '.join(DTYPES)}, found {self.dtype!r}")
        unknown = [name for name in self.chosen if name not in WORKS]
        if unknown or not self.chosen:
            problems.append(f"works must be some of {', '.join(WORKS)}, found {self.works!r}")
        raise_problems("bench latency", problems)

    @property
    def chosen(self) -> list[str]:
        """The names in ``works``, in their order."""
        return [name.strip() for name in self.works.split(",") if name.strip()]


def measure_latency(config: LatencyConfig, progress: Progress = SILENT) -> dict[str, Any]:
    """Time both frameworks; returns ``{"rows", "machine", "conditions", "config", "load_ms"}``, plain JSON values.

    A row is ``{work, mlx_ms, torch_ms, ratio, iqr}``: medians over the trials, ``ratio`` = torch / MLX (above 1 where
    MLX is faster), ``iqr`` the first and third quartile of each side. MLX and torch take turns within every trial, and
    the one that goes first alternates.

    Raises:
        RsgwmError: torch is not installed, or the base or device is not there.
        AdapterError: an adapter that is damaged or does not fit the base.
    """
    resolve_base(config.base, progress)  # first, for torch's import takes seconds
    if config.adapter:
        Adapter.load(Path(config.adapter), lazy=True)
    import_torch()
    device = bench_device(config.device)
    before = conditions()
    for warning in slow_machine():
        progress.message(f"warning: {warning}")
    from mlx_rsgwm.bench.latency_sides import MlxSide, TorchSide

    total = len(config.chosen) * (config.warmup + config.trials)
    settings: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rsgwm-bench-")))
        mlx = stack.enter_context(side_process("MLX", MlxSide, config, folder, without_mlx=False))
        torch = stack.enter_context(side_process("torch", TorchSide, config, device, mlx.facts))
        advance = stack.enter_context(progress.task("latency", total))
        for work in (work for work in ORDER if work in config.chosen):
            mlx.call("prepare", work)
            settings[work] = torch.call("prepare", work)
            times = interleave(lambda: mlx.call("trial"), lambda: torch.call("trial"), config, lambda: advance(1, ""))
            rows[work] = rows_of_times(names_of(work, config), *times)
        facts = {"mlx_blas": mlx.facts["blas"], "torch_settings": settings}
        load = {"mlx": mlx.facts["load_ms"], "torch": torch.facts["load_ms"]}
        dtype = mlx.facts["dtype"]
    return {
        "rows": [row for work in WORKS for row in rows.get(work, [])],
        "machine": {**describe_machine(device, dtype), **facts},
        "conditions": {"before": before, "after": conditions()},
        "config": asdict(config),
        "load_ms": load,
    }


def names_of(work: str, config: LatencyConfig) -> tuple[str, ...]:
    """What the rows of ``work`` are called, one for each of its parts."""
    forward = (f"prefill {config.prompt_tokens} tokens", f"decode {config.new_tokens} tokens")
    return {
        "forward": forward,
        "lora": tuple(f"{name} with adapter" for name in forward),
        "fused": tuple(f"{name} fused" for name in forward),
        "train": (f"train step {config.rows} × {config.prompt_tokens} tokens",),
        "merge": (f"merge {config.pool} adapters, TIES",),
        "loop": (f"draft–verify {ATTEMPTS} × {config.new_tokens} tokens",),
    }[work]


def bench_device(name: str) -> str:
    """``auto`` as MPS where there is one, else CUDA, else the CPU."""
    import torch

    return "cuda" if name == "auto" and torch.cuda.is_available() else torch_device(name)


# --- the inputs -------------------------------------------------------------------------------------------------


def token_ids(config: LatencyConfig, vocabulary: int) -> tuple[list[int], list[int]]:
    """Seeded token ids: the prompt, and those fed one by one in decode."""
    ids = np.random.default_rng(config.seed).integers(0, vocabulary, config.prompt_tokens + config.new_tokens)
    return ids[: config.prompt_tokens].tolist(), ids[config.prompt_tokens :].tolist()


def question_of(tokenizer: Any, tokens: int) -> str:
    """A question whose drafting prompt has ``tokens`` tokens or a few more."""
    question = "How many?"
    while len(TEMPLATES["plain"].draft_prompt(tokenizer, question)) < tokens:
        question = f"Ada has 3 pens. {question}"
    return question


def interleave(
    mlx: Trial, torch: Trial, config: LatencyConfig, advance: Callable[[], None]
) -> tuple[list[Times], list[Times]]:
    """Times of the trials after the warm-up; MLX goes first in even trials, torch in odd ones."""
    times_of: dict[str, list[Times]] = {"mlx": [], "torch": []}
    sides = [("mlx", mlx), ("torch", torch)]
    for number in range(config.warmup + config.trials):
        for name, trial in sides if number % 2 == 0 else sides[::-1]:
            times = trial()
            if number >= config.warmup:
                times_of[name].append(times)
        advance()
    return times_of["mlx"], times_of["torch"]


def rows_of_times(names: Sequence[str], mlx: Sequence[Times], torch: Sequence[Times]) -> list[dict[str, Any]]:
    """One row for each part of a work: medians, their ratio, quartiles."""
    rows = []
    for index, work in enumerate(names):
        quartiles = {
            side: [round(float(value), 3) for value in np.percentile([times[index] for times in trials], (25, 50, 75))]
            for side, trials in (("mlx_ms", mlx), ("torch_ms", torch))
        }
        medians = {side: values[1] for side, values in quartiles.items()}
        ratio = round(medians["torch_ms"] / medians["mlx_ms"], 3)
        spread = {side: [values[0], values[2]] for side, values in quartiles.items()}
        rows.append({"work": work, **medians, "ratio": ratio, "iqr": spread})
    return rows


# --- the adapter ------------------------------------------------------------------------------------------------


def bench_adapter(base: Base, config: LatencyConfig, dtype: str) -> Adapter:
    """The adapter to time, in the base's dtype."""
    adapter = Adapter.load(config.adapter) if config.adapter else random_adapter(base, config.rank, config.seed)
    if adapter.base_problem(base.name, base.fingerprint):
        raise AdapterError(f"{adapter.where} was not trained on {config.base}: the weights differ")
    return in_dtype(adapter, base, dtype)


def in_dtype(adapter: Adapter, base: Base, dtype: str) -> Adapter:
    """The adapter with its arrays in ``dtype``, so that both frameworks compute in the base's throughout."""
    weights = {name: value.astype(getattr(mx, dtype)) for name, value in adapter.weights.items()}
    return Adapter(adapter.spec, weights, manifest={"kind": "bench", "base": base.describe()})


def random_adapter(base: Base, rank: int, seed: int, keys: Sequence[str] = KEYS) -> Adapter:
    """A LoRA adapter with both factors drawn at random, on ``keys`` of every block: nonzero, meaning nothing."""
    key = mx.random.key(seed)
    weights = {}
    for name, module in base.model.named_modules():
        if name.startswith("model.layers.") and name.endswith(tuple("." + ending for ending in keys)):
            out_dims, in_dims = module.weight.shape
            if isinstance(module, nn.QuantizedLinear):
                in_dims = in_dims * 32 // module.bits
            key, for_a, for_b = mx.random.split(key, 3)
            weights[f"{name}.lora_a"] = mx.random.normal((in_dims, rank), scale=in_dims**-0.5, key=for_a)
            weights[f"{name}.lora_b"] = mx.random.normal((rank, out_dims), scale=0.02, key=for_b)
    if not weights:
        raise RsgwmError(f"base {base.name} has none of the modules {', '.join(keys)}; give --adapter")
    return Adapter(LoraSpec(rank, 2.0, 0.0, tuple(keys), num_layers=-1), weights)


def apply_mlx(base: Base, folder: Path) -> None:
    """Put the adapter in ``folder`` on the base, in place, as mlx-lm does."""
    from mlx_lm.tuner.utils import load_adapters

    try:
        load_adapters(base.model, str(folder))
    except ValueError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise AdapterError(f"the adapter does not fit {base.name}: {reason}") from error
    base.model.eval()


# --- the machine ------------------------------------------------------------------------------------------------


def floating_dtype(model: nn.Module) -> str:
    """Name of the dtype the model's norms are in, which is what it computes in."""
    from mlx.utils import tree_flatten

    norms = [value for name, value in dict(tree_flatten(model.parameters())).items() if "norm" in name]
    dtypes = {name_of(value.dtype) for value in norms}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise RsgwmError(f"the base model computes in {', '.join(sorted(dtypes)) or 'no known dtype'}; give --dtype")
    return dtypes.pop()


def describe_machine(device: str, dtype: str) -> dict[str, Any]:
    """What the numbers depend on: chip, system, memory, devices, cores, dtype, versions."""
    facts = asdict(examine_machine(Path.cwd()))
    return {
        **{name: facts[name] for name in ("system", "chip", "memory")},
        "cores": os.cpu_count(),
        "mlx_device": facts["device"],
        "torch_device": device,
        "dtype": dtype,
        "versions": all_versions(),
    }


def slow_machine() -> Iterator[str]:
    """One line where MLX's CPU back end multiplies slowly, for then the times say little of MLX."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return
    gflops = matmul_gflops()
    if gflops < SLOW_GFLOPS:
        preloaded = "openblas" in os.environ.get("LD_PRELOAD", "")
        advice = "other programs keep the processor busy" if preloaded else f"a slow BLAS; first: {blas_fix()}"
        yield f"MLX multiplies matrices at {gflops:.0f} GFLOP/s here: {advice}"


# --- as a script ------------------------------------------------------------------------------------------------


class _Lines(Progress):
    def message(self, text: str) -> None:
        print(text, file=sys.stderr)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except RsgwmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def main() -> None:
    """Time what the arguments say; the last line is the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for setting in fields(LatencyConfig):
        parser.add_argument(f"--{setting.name.replace('_', '-')}", type=type(setting.default), default=setting.default)
    parser.add_argument("--out", type=Path, help="JSON file to write; the table and the plot go beside it.")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    with _one_line_errors():
        result = measure_latency(LatencyConfig(**arguments), _Lines())
        if out is not None:
            save_outcome(result, out)
    print(table(result))
    print(json.dumps(result["rows"]))


if __name__ == "__main__":
    main()
