"""Pools of random adapters for merge benchmarks: on TinyLlama's attention, or all linear modules of 8B-like layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

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
LAYERS, RANK, SCALE, COUNT = 22, 16, 2.0, 4


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
