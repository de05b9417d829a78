"""Pools of known kinds for the audit."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture
def unlike(make_adapter):
    """Six adapters of ranks 4 to 64 whose norms are up to 900-fold apart; the last two share most of their updates,
    the same way and the opposite way, with the first."""
    sizes = {4: 0.1, 8: 3.0, 16: 0.02, 64: 0.5}
    adapters = [
        make_adapter(seed, rank=rank, keys=KEYS, init_seed=seed, scale=2.0 / (seed + 1), size=size)
        for seed, (rank, size) in enumerate(sizes.items())
    ]
    for sign in (1.0, -1.0):
        rng = np.random.default_rng(int(sign) + 9)
        weights = {
            name: value * (sign if name.endswith("lora_b") else 1.0)
            + mx.array(0.01 * rng.standard_normal(value.shape).astype(np.float32))
            for name, value in adapters[0].weights.items()
        }
        adapters.append(replace(adapters[0], weights=weights))
    return adapters
