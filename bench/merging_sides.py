"""The sides that bench/merging.py times, each in a process of its own: this project's merges, PEFT's, a forward pass.

A process makes a step for every line of its standard input and answers with the figures as a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.bench.random_pools import ATTENTION, LAYERS
from mlx_rsgwm.bench.resident_memory import MB, measured
from mlx_rsgwm.bench.shapes import TINYLLAMA
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter

DENSITY = 0.5
COMPARED = "model.layers.0.self_attn.q_proj"
TOKENS = 512


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

    from mlx_rsgwm.models.quicken import quicken

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
    command = [sys.executable, __file__, side, method, *map(str, folders)]
    dropped = ("LD_PRELOAD", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if side == "peft" else ()
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
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
                    figures: dict[str, Any] = json.loads(line)
                    return figures
            raise RuntimeError(f"the {side} side of {method} ended; see its error above")

        yield step
        asking.close()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], [Path(folder) for folder in sys.argv[3:]])
