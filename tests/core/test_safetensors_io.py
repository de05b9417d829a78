"""Files of arrays."""

from __future__ import annotations

import random

import mlx.core as mx

from mlx_rsgwm.core.safetensors_io import write_safetensors


def test_the_order_of_arrays_does_not_change_the_bytes(tmp_path):
    names = [f"model.layers.{n}.self_attn.q_proj.{leaf}" for n in range(40) for leaf in ("lora_a", "lora_b")]
    arrays = {name: mx.full((3,), place) for place, name in enumerate(names)}
    written = set()
    for seed in range(3):
        random.Random(seed).shuffle(names)
        write_safetensors(tmp_path / "a.safetensors", {name: arrays[name] for name in names})
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1
