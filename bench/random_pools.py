"""Pools of random adapters for merge benchmarks: on TinyLlama's attention or all
its linear modules, or on those of 8B-like layers; and folders of the bases that those are for, without weights.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rsgwm.linalg.gram import test_matrix
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

Shapes = Mapping[str, tuple[int, int]]  # module inside a block: (in, out)
ATTENTION: Shapes = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (2048, 256),
    "self_attn.v_proj": (2048, 256),
    "self_attn.o_proj": (2048, 2048),
}
LINEAR: Shapes = {
    **ATTENTION,
    "mlp.gate_proj": (2048, 5632),
    "mlp.up_proj": (2048, 5632),
    "mlp.down_proj": (5632, 2048),
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
LAYERS, RANK, SCALE, COUNT = 22, 16, 2.0, 4
# Sketches of the default size, of so many random tokens; a block's projections to queries, keys and values share one.
COLUMNS, TOKENS = 64, 128
SHARED = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}


def random_directions(shapes: Shapes, layers: int) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Sketches of random inputs of role draft, and what such a file says of itself."""
    arrays, shared = {}, {}
    for layer in range(layers):
        for name, (rows, _) in shapes.items():
            module = f"model.layers.{layer}.{name}"
            if name in SHARED:
                shared[module] = f"model.layers.{layer}.{SHARED[name]}"
                continue
            x = mx.random.normal((TOKENS, rows)) * 0.99 ** mx.arange(rows)
            arrays[f"draft/{module}.sketch"] = x.T @ (x @ test_matrix(rows, COLUMNS, 0)) / TOKENS
            arrays[f"draft/{module}.diagonal"] = mx.square(x).mean(axis=0)
            mx.eval(arrays)
    about = {"k": str(COLUMNS), "seed": "0", "tokens/draft": str(TOKENS), "shared": json.dumps(shared)}
    return arrays, about


def write_pool(
    folder: Path, shapes: Shapes, layers: int, count: int, importance: bool, directions: bool = False
) -> list[Path]:
    """``count`` random adapters from one lora_a initialisation; it and an importance are kept with ``importance``,
    sketches of their inputs with ``directions``.
    """
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
        if directions:
            arrays, about = random_directions(shapes, layers)
            adapter = replace(adapter, directions=arrays, directions_metadata=about)
        written.append(adapter.save(folder / f"adapter-{index:02}"))
    return written


def write_hollow_base(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> Path:
    """A base of Llama's architecture whose weights are a hole in a file and whose tokenizer knows one word: enough for
    what reads configs and headers.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    parameters = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        parameters |= {f"{block}.{name}": (columns, rows) for name, (rows, columns) in shapes.items()}
        parameters |= {f"{block}.{name}": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    header, end = {}, 0
    for name, shape in parameters.items():
        size = 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + size)}
        end += size
    described = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    Tokenizer(WordLevel({"word": 0}, unk_token="word")).save(str(folder / "tokenizer.json"))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(described)) + described)
        file.truncate(8 + len(described) + end)
    return folder
