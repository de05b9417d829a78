"""Converting an adapter of TinyLlama's shapes to PEFT, from PEFT and back, against copying its bytes.

    python bench/converting.py [--trials 7] [--out results.json]

The adapter is random: rank 16, all seven linear modules of 22 layers, 12.6M parameters, in float32 and in bfloat16. A
copy is its weights' bytes read, written and synced to disk, as a conversion's are; all take turns. Inside the clock of
a conversion are its checks: SHA-256 of what it reads against the manifest and of what it writes, names, shapes, every
value finite. Nothing is cached between trials but what the system keeps of the files.

The last line is JSON: medians in seconds, by dtype, and their ratios to the copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.converters.base_layers import BaseLayer, BaseLayers
from mlx_rsgwm.converters.peft.convert import convert_from_peft, convert_to_peft
from mlx_rsgwm.converters.peft.sidecar import SIDECAR_FOLDER
from mlx_rsgwm.models.adapter import WEIGHTS_FILE, Adapter, LoraSpec

SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (2048, 256),
    "self_attn.v_proj": (2048, 256),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (2048, 5632),
    "mlp.up_proj": (2048, 5632),
    "mlp.down_proj": (5632, 2048),
}
LAYERS, RANK = 22, 16


def tinyllama() -> BaseLayers:
    """The layers of the base; its weights are not needed."""
    layers = {
        f"model.layers.{i}.{key}": BaseLayer("linear", *shape) for i in range(LAYERS) for key, shape in SHAPES.items()
    }
    described = {"name": "base", "fingerprint": None, "model_type": "llama", "num_layers": LAYERS}
    return BaseLayers("base", Path("base"), "llama", described, layers, {}, tied=False)


def random_adapter(base: BaseLayers, dtype: mx.Dtype) -> Adapter:
    """An adapter of normal values on every layer of ``base``."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, layer in base.layers.items():
        for leaf, shape in (("lora_a", (layer.inputs, RANK)), ("lora_b", (RANK, layer.outputs))):
            weights[f"{name}.{leaf}"] = mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)
    spec = LoraSpec(RANK, 2.0, 0.0, tuple(SHAPES), LAYERS)
    return Adapter(spec, weights, manifest={"base": base.description})


def copy(source: Path, target: Path) -> None:
    """Copy a file and wait until the disk has it: what conversions are compared with."""
    data = source.read_bytes()
    with open(target, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def measure(dtype: mx.Dtype, trials: int) -> dict[str, Any]:
    """Median seconds of a copy and of the conversions, one after the other in every trial, the first left out."""
    base = tinyllama()
    seconds: dict[str, list[float]] = {"copy": [], "to_peft": [], "from_peft": [], "back": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = random_adapter(base, dtype).save(folder / "adapter")
        plain = folder / "plain"
        convert_to_peft(source, "base", plain)
        shutil.rmtree(plain / SIDECAR_FOLDER)
        for trial in range(trials + 1):
            copied, there, imported, back = (folder / f"{name}-{trial}" for name in ("copied", "there", "ours", "back"))
            work: dict[str, Callable[[], Any]] = {
                "copy": partial(copy, source / WEIGHTS_FILE, copied),
                "to_peft": partial(convert_to_peft, source, "base", there),
                "from_peft": partial(convert_from_peft, plain, base, imported),
                "back": partial(convert_from_peft, there, base, back),
            }
            for name, run in work.items():
                started = time.perf_counter()
                run()
                if trial:
                    seconds[name].append(time.perf_counter() - started)
        size = (source / WEIGHTS_FILE).stat().st_size
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "megabytes": size / 1e6,
        "seconds": medians,
        **{f"{name}_over_copy": medians[name] / medians["copy"] for name in seconds if name != "copy"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {name: measure(getattr(mx, name), arguments.trials) for name in ("float32", "bfloat16")}
    for name, row in result.items():
        shown = ", ".join(f"{key} {value * 1e3:.0f} ms" for key, value in row["seconds"].items())
        ratios = ", ".join(f"{row[f'{step}_over_copy']:.2f}" for step in ("to_peft", "from_peft", "back"))
        print(f"{name}, {row['megabytes']:.0f} MB: {shown}; over the copy {ratios}")
    give_result(result, arguments.out)


if __name__ == "__main__":
    main()
