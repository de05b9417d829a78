"""Prefill and decode, MLX against torch, with and without a LoRA adapter: the same work, timed side by side.

Both frameworks load the same base folder in the same dtype and see the same token ids. Prefill runs a prompt through
the model, fills the key–value cache and picks one next token. Decode then feeds one given token at a time, picks a
next token after each, and never stops at an end-of-sequence token; neither side waits for a pick before the next
step is issued, as in mlx-lm's own generation. The clock stops after ``mx.eval`` or ``torch.*.synchronize``.

Run as ``rsgwm bench latency``, or from a checkout as ``python bench/latency.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_rsgwm.adapter import Adapter, LoraSpec
from mlx_rsgwm.base import Base, load_base
from mlx_rsgwm.converters.parity import apply_peft, import_torch, load_torch_base, torch_device
from mlx_rsgwm.converters.peft import to_peft
from mlx_rsgwm.doctor import SLOW_GFLOPS, all_versions, blas_fix, examine_machine, matmul_gflops
from mlx_rsgwm.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.progress import SILENT, Progress

DTYPES = ("auto", "float32", "float16", "bfloat16")
KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
Times = tuple[float, float]  # prefill and decode, in milliseconds
Trial = Callable[[], Times]


@dataclass(frozen=True)
class LatencyConfig:
    """What to time. ``adapter`` is a folder, or empty for a seeded random one of ``rank`` on q, k, v and o."""

    base: str = "smollm2-135m"
    adapter: str = ""
    prompt_tokens: int = 128
    new_tokens: int = 32
    trials: int = 5
    warmup: int = 1
    rank: int = 16
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 42

    def __post_init__(self) -> None:
        lowest = {"prompt_tokens": 2, "new_tokens": 1, "trials": 1, "warmup": 0, "rank": 1}
        problems = [
            f"{name} must be at least {low}, found {getattr(self, name)}"
            for name, low in lowest.items()
            if getattr(self, name) < low
        ]
        if self.dtype not in DTYPES:
            problems.append(f"dtype must be one of {', '.join(DTYPES)}, found {self.dtype!r}")
        raise_problems("bench latency", problems)


def measure_latency(config: LatencyConfig, progress: Progress = SILENT) -> dict[str, Any]:
    """Time both frameworks and return ``{"rows", "machine", "config", "load_ms"}``, all plain JSON values.

    A row is ``{work, adapter, mlx_ms, torch_ms, ratio, iqr}``: medians over the trials, ``ratio`` = torch / MLX (above
    1 where MLX is faster), ``iqr`` the first and third quartile of each side. MLX and torch take turns within every
    trial, and the one that goes first alternates.

    Raises:
        RsgwmError: torch is not installed, or the base or device is not there.
        AdapterError: an adapter that is damaged or does not fit the base.
    """
    import_torch()
    device = torch_device(config.device)
    for warning in slow_machine():
        progress.message(f"warning: {warning}")
    base, mlx_load = _timed(lambda: load_base(config.base, dtype=config.dtype, progress=progress))
    dtype = floating_dtype(base.model)
    theirs, torch_load = _timed(lambda: load_torch_base(base.path, device, dtype, attention="sdpa"))
    prompt, forced = token_ids(config, int(base.describe()["vocab_size"]))
    total = 2 * (config.warmup + config.trials)
    with tempfile.TemporaryDirectory(prefix="rsgwm-bench-") as temporary, progress.task("latency", total) as advance:
        adapter = bench_adapter(base, config, dtype)
        folder = adapter.save(Path(temporary) / "mlx")
        peft_folder = to_peft(adapter, config.base, Path(temporary) / "peft")
        rows = []
        for label, adapted in (("", False), (" with adapter", True)):
            if adapted:
                apply_mlx(base, folder)
                theirs = apply_peft(theirs, peft_folder, widen=False)
            times = interleave(
                mlx_trial(base.model, prompt, forced),
                torch_trial(theirs, device, prompt, forced),
                config,
                lambda: advance(1, ""),
            )
            rows += summarise(label, adapted, config, *times)
    return {
        "rows": rows,
        "machine": describe_machine(device, dtype),
        "config": asdict(config),
        "load_ms": {"mlx": mlx_load, "torch": torch_load},
    }


# --- the work ---------------------------------------------------------------------------------------------------


def token_ids(config: LatencyConfig, vocabulary: int) -> tuple[list[int], list[int]]:
    """Seeded token ids: the prompt, and those fed one by one in decode."""
    ids = np.random.default_rng(config.seed).integers(0, vocabulary, config.prompt_tokens + config.new_tokens)
    return ids[: config.prompt_tokens].tolist(), ids[config.prompt_tokens :].tolist()


def mlx_trial(model: nn.Module, prompt: Sequence[int], forced: Sequence[int]) -> Trial:
    """One timed prefill and decode in MLX, as mlx-lm generates: prompt less its last token first, then steps."""
    from mlx_lm.models.cache import make_prompt_cache

    body, last = mx.array([prompt[:-1]]), mx.array([prompt[-1:]])
    tokens = [mx.array([[one]]) for one in forced]
    mx.eval(body, last, tokens)

    def step(token: mx.array, cache: list[Any]) -> mx.array:
        return mx.argmax(model(token, cache=cache)[:, -1], axis=-1)

    def trial() -> Times:
        cache = make_prompt_cache(model)
        mx.synchronize()
        started = time.perf_counter()
        model(body, cache=cache)  # its logits are never asked for, so the head is not computed
        mx.eval([one.state for one in cache])
        mx.eval(step(last, cache))
        filled = time.perf_counter()
        picked = []
        for token in tokens:
            picked.append(step(token, cache))
            mx.async_eval(picked[-1])
        mx.eval(picked)
        mx.synchronize()
        return _milliseconds(started, filled, time.perf_counter())

    return trial


def torch_trial(model: Any, device: str, prompt: Sequence[int], forced: Sequence[int]) -> Trial:
    """The same in torch, with transformers' ``DynamicCache`` and logits of the last position only."""
    import torch
    from transformers import DynamicCache

    whole = torch.tensor([list(prompt)], device=device)
    tokens = [torch.tensor([[one]], device=device) for one in forced]
    synchronize = {"mps": torch.mps.synchronize, "cuda": torch.cuda.synchronize}.get(device, lambda: None)

    def step(token: Any, cache: Any) -> Any:
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1)

    def trial() -> Times:
        with torch.inference_mode():
            cache = DynamicCache()
            synchronize()
            started = time.perf_counter()
            step(whole, cache)
            synchronize()
            filled = time.perf_counter()
            picked = [step(token, cache) for token in tokens]
            synchronize()
            ended = time.perf_counter()
        assert len(picked) == len(tokens)
        return _milliseconds(started, filled, ended)

    return trial


def interleave(
    mlx: Trial, torch: Trial, config: LatencyConfig, advance: Callable[[], None]
) -> tuple[list[Times], list[Times]]:
    """Times of the trials after the warm-up; MLX goes first in even trials, torch in odd ones."""
    found: dict[str, list[Times]] = {"mlx": [], "torch": []}
    sides = [("mlx", mlx), ("torch", torch)]
    for number in range(config.warmup + config.trials):
        for name, trial in sides if number % 2 == 0 else sides[::-1]:
            times = trial()
            if number >= config.warmup:
                found[name].append(times)
        advance()
    return found["mlx"], found["torch"]


def summarise(
    label: str, adapted: bool, config: LatencyConfig, mlx: Sequence[Times], torch: Sequence[Times]
) -> list[dict[str, Any]]:
    """One row for prefill and one for decode: medians, their ratio, quartiles."""
    works = (f"prefill {config.prompt_tokens} tokens{label}", f"decode {config.new_tokens} tokens{label}")
    rows = []
    for index, work in enumerate(works):
        quartiles = {
            side: [round(float(one), 3) for one in np.percentile([times[index] for times in trials], (25, 50, 75))]
            for side, trials in (("mlx_ms", mlx), ("torch_ms", torch))
        }
        medians = {side: values[1] for side, values in quartiles.items()}
        rows.append(
            {
                "work": work,
                "adapter": adapted,
                **medians,
                "ratio": round(medians["torch_ms"] / medians["mlx_ms"], 3),
                "iqr": {side: [values[0], values[2]] for side, values in quartiles.items()},
            }
        )
    return rows


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, round((time.perf_counter() - started) * 1e3, 1)


def _milliseconds(started: float, filled: float, ended: float) -> Times:
    return (filled - started) * 1e3, (ended - filled) * 1e3


# --- the adapter ------------------------------------------------------------------------------------------------


def bench_adapter(base: Base, config: LatencyConfig, dtype: str) -> Adapter:
    """The adapter to time, its arrays in the base's dtype so that both frameworks compute in it throughout."""
    adapter = Adapter.load(config.adapter) if config.adapter else random_adapter(base, config.rank, config.seed)
    if adapter.base_fingerprint and adapter.base_fingerprint != base.fingerprint:
        raise AdapterError(f"{adapter.where} was not trained on {config.base}: the weights differ")
    weights = {name: value.astype(getattr(mx, dtype)) for name, value in adapter.weights.items()}
    return Adapter(adapter.spec, weights, manifest={"kind": "bench", "base": base.describe()})


def random_adapter(base: Base, rank: int, seed: int, keys: Sequence[str] = KEYS) -> Adapter:
    """A LoRA adapter with both factors drawn at random, on ``keys`` of every block: nonzero, meaning nothing."""
    key = mx.random.key(seed)
    weights = {}
    for name, module in base.model.named_modules():
        if name.startswith("model.layers.") and name.endswith(tuple("." + one for one in keys)):
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
    dtypes = {str(value.dtype).rpartition(".")[2] for value in norms}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise RsgwmError(f"the base model computes in {', '.join(sorted(dtypes)) or 'no known dtype'}; give --dtype")
    return dtypes.pop()


def describe_machine(device: str, dtype: str) -> dict[str, Any]:
    """What the numbers depend on: chip, system, memory, devices, threads, dtype, versions."""
    import torch

    facts = asdict(examine_machine(Path.cwd()))
    return {
        **{name: facts[name] for name in ("system", "chip", "memory")},
        "cores": os.cpu_count(),
        "mlx_device": facts["device"],
        "torch_device": device,
        "torch_threads": torch.get_num_threads(),
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


def table(result: Mapping[str, Any]) -> str:
    """The rows as text for people."""
    lines = [f"{'':36}{'MLX ms':>10}{'torch ms':>10}{'torch/MLX':>11}"]
    lines += [
        f"{row['work']:36}{row['mlx_ms']:10.1f}{row['torch_ms']:10.1f}{row['ratio']:11.2f}" for row in result["rows"]
    ]
    machine = result["machine"]
    lines.append(
        f"{machine['dtype']}, MLX on {machine['mlx_device']}, torch on {machine['torch_device']} "
        f"({machine['torch_threads']} threads), {machine['chip']}, medians of {result['config']['trials']} trials"
    )
    return "\n".join(lines)


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
    """Time what the arguments say; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for one in fields(LatencyConfig):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    with _one_line_errors():
        result = measure_latency(LatencyConfig(**vars(parser.parse_args())), _Lines())
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
