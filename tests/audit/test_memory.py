"""An audit streams: its memory is that of a few modules, however many there are."""

from __future__ import annotations

import tracemalloc

import mlx.core as mx

from mlx_rsgwm.audit.pool_audit import audit
from mlx_rsgwm.bench.random_pools import LINEAR, write_hollow_base
from mlx_rsgwm.bench.shapes import TINYLLAMA
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.cpu_threads import cores

KEY = "self_attn.q_proj"
SIDE, RANK = 2048, 16
FACTOR = SIDE * RANK * 4  # bytes of one factor in float32


def peak(tmp_path, layers, base=None):
    """The most bytes that MLX and NumPy hold during an audit of two adapters; of a ``base``, from PEFT's folders."""
    folders = []
    for seed in range(2):
        mx.random.seed(seed)
        weights = {}
        for layer in range(layers):
            weights[f"model.layers.{layer}.{KEY}.lora_a"] = mx.random.normal((SIDE, RANK))
            weights[f"model.layers.{layer}.{KEY}.lora_b"] = mx.random.normal((RANK, SIDE))
        adapter = Adapter(LoraSpec(RANK, 1.0, 0.0, (KEY,), layers), weights, manifest={"kind": "trained"})
        folder = tmp_path / f"{layers}-{seed}"
        folders.append(adapter.save(folder) if base is None else to_peft(adapter, str(base), folder))
    del weights, adapter
    mx.clear_cache()
    tracemalloc.start()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try:
        audit(folders)
        return mx.get_peak_memory() - before + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_modules(tmp_path):
    peak(tmp_path, 2)  # imports
    few, many = peak(tmp_path, 6), peak(tmp_path, 48)
    at_once = 4 * FACTOR * (cores() + 1)  # what threads hold, which may overlap in one run and not in another
    assert many < few + at_once  # 42 modules more hold 168 factors more


def test_nor_from_the_folders_of_peft(tmp_path):
    """Headers and names grow with modules, arrays do not."""
    config = {**TINYLLAMA, "num_hidden_layers": 48}
    base = write_hollow_base(tmp_path / "base", config, {**LINEAR, KEY: (SIDE, SIDE)})
    peak(tmp_path, 2, base)
    few, many = peak(tmp_path, 6, base), peak(tmp_path, 48, base)
    assert many < few + 4 * FACTOR * (cores() + 1)
