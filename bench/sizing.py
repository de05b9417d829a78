"""What bases of 135M to 70B, and pools of 4 to 1,000 adapters, need: counted from shapes, timed by measured curves.

    python bench/sizing.py [--growth bench/results/merging-growth-linux-2core.json] [--out sizing.json]

No weights are made: models of the published shapes are built lazily, quantised lazily, and asked for their bytes by the
estimate that ``rsgwm train`` makes before its first step (float16, 4-bit bases; batch of 4 rows of 512 tokens with
recomputation, all of them trained). An adapter has rank 16 on the seven linear modules of every block. Merge times are
the measured seconds per parameter and adapter of a default merge, times how many there are; its memory is one module's
factors of all adapters and what is made of them, and the result twice. The last line is JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.files import read_json_object
from mlx_rsgwm.training.memory import estimate

RANK, ROWS, LENGTH = 16, 4, 512
POOLS = (4, 64, 1000)
HELD = 1.5  # what a merge needs over one module's factors; 1.3 is MLX's peak at 64 adapters of TinyLlama's shapes
KEYS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# hidden, layers, intermediate, heads, key–value heads, vocabulary; embeddings tied or not. From the models' configs.
BASES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "135M (SmolLM2)": (576, 30, 1536, 9, 3, 49152, True),
    "1.1B (TinyLlama)": (2048, 22, 5632, 32, 4, 32000, False),
    "8B (Llama 3.1)": (4096, 32, 14336, 32, 8, 128256, False),
    "70B (Llama 3.1)": (8192, 80, 28672, 64, 8, 128256, False),
}


def lazy_model(shape: tuple[int, int, int, int, int, int, bool]) -> tuple[nn.Module, dict[str, Any]]:
    """A 4-bit model of a shape, none of whose arrays is ever evaluated, and its config."""
    from mlx_lm.models.llama import Model, ModelArgs

    hidden, layers, mlp, heads, groups, vocabulary, tied = shape
    config = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=64, bits=4)
    model.freeze()
    return model, config


def add_adapter(model: nn.Module) -> tuple[int, int]:
    """Factors for every linear module of the blocks; their number of parameters, and those of the largest module."""
    total = largest = 0
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and name.endswith(KEYS):
            outputs, inputs = module.weight.shape[0], module.weight.shape[1] * 32 // module.bits
            module.lora_a, module.lora_b = mx.zeros((inputs, RANK)), mx.zeros((RANK, outputs))
            module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
            total += RANK * (inputs + outputs)
            largest = max(largest, RANK * (inputs + outputs))
    return total, largest


def seconds_per_entry(growth: dict[str, Any]) -> float:
    """Of a default merge, for one parameter of one adapter: the largest measured pool."""
    rows = [row for row in growth["growth"]["parameters"] if row["method"] == "rsgwm"]
    last = max(rows, key=lambda row: row["size"])
    return float(last["seconds"] / (last["size"] * last["adapters"]))


def size(shape: tuple[int, int, int, int, int, int, bool], each: float) -> dict[str, Any]:
    """Memory of training and merging a model of these shapes; ``each``: seconds of a merge a parameter and adapter."""
    model, config = lazy_model(shape)
    parameters, largest = add_adapter(model)
    training = estimate(model, config, ROWS, LENGTH, ROWS * LENGTH, 1, recompute=True)
    rows = {}
    for count in POOLS:
        rows[count] = {
            "disk_gb": count * parameters * 4 * 4 / 1e9,  # weights; importance of all, draft and verify
            "merge_hours": count * parameters * each / 3600,
            "merge_gb": (HELD * count * largest * 4 + 2 * parameters * 4) / 1e9,
            "resident_gb": (training.weights + count * parameters * 4) / 1e9,
        }
    return {
        "base_gb": training.weights / 1e9,
        "adapter_parameters": parameters,
        "training_gb": training.total / 1e9,
        "training": {name: value / 1e9 for name, value in vars(training).items()},
        "pools": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", type=Path, default=Path("bench/results/merging-growth-linux-2core.json"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    each = seconds_per_entry(read_json_object(arguments.growth))
    sizes = {name: size(shape, each) for name, shape in BASES.items()}
    for name, row in sizes.items():
        print(
            f"{name}: base {row['base_gb']:.1f} GB, adapter {row['adapter_parameters'] / 1e6:.1f}M parameters, "
            f"training {row['training_gb']:.1f} GB"
        )
        for count, pool in row["pools"].items():
            print(
                f"  {count:>4} adapters: {pool['disk_gb']:.1f} GB on disk, merge {pool['merge_hours'] * 60:.1f} min "
                f"and {pool['merge_gb']:.1f} GB, all in slots {pool['resident_gb']:.1f} GB"
            )
    result = {"seconds_per_parameter_and_adapter": each, "bases": sizes}
    give_result(result, arguments.out)


if __name__ == "__main__":
    main()
