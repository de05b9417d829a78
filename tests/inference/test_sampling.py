"""Temperatures at the ends of what a float can be: as good as greedy, or uniform."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.inference.sampling import choose, choose_exact

LOGITS = mx.array(np.random.default_rng(4).standard_normal((3, 60)).astype(np.float32) * 4)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-39, 1e-12])
@pytest.mark.parametrize("how", [lambda *given: choose(*given)[0], choose_exact])
def test_the_coldest_is_greedy(temperature, how):
    for uniform in (0.0, 0.5, 0.999999):
        chosen = how(LOGITS, mx.full((3,), uniform), temperature, 0.9)
        assert chosen.tolist() == mx.argmax(LOGITS, axis=-1).tolist()


@pytest.mark.parametrize("temperature", [1e12, 1e30, 1e308])
def test_the_hottest_is_uniform(temperature):
    logits = mx.concatenate([LOGITS, mx.full((3, 4), -mx.inf)], axis=-1)  # tokens that are ruled out stay so
    drawn = [choose_exact(logits, mx.full((3,), (place + 0.5) / 60), temperature, 1.0).tolist() for place in range(60)]
    for row in zip(*drawn, strict=True):
        assert sorted(row) == list(range(60))
