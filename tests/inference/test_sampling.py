"""Draws at the ends: the coldest and the hottest temperatures, and tokens beyond the likeliest."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from scipy.stats import chisquare

from mlx_rsgwm.inference.sampling import CANDIDATES, choose, choose_exact

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


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_last_bits_of_logits_do_not_choose(top_p):
    # A batch or a cached prefix changes them; by inverse transform alone some of these draws would be others.
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((8, 49152)).astype(np.float32)
    other = logits * (1 + 1e-6 * rng.standard_normal(logits.shape).astype(np.float32))
    for _ in range(50):
        uniform = mx.array(rng.random(8, dtype=np.float32))
        drawn = [choose_exact(mx.array(each), uniform, 1.5, top_p).tolist() for each in (logits, other)]
        assert drawn[0] == drawn[1]


def test_beyond_the_likeliest_tokens_are_drawn_by_their_probabilities():
    logits = np.random.default_rng(1).standard_normal(2 * CANDIDATES).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    uniform = mx.array(np.random.default_rng(2).random(40_000, dtype=np.float32))
    drawn = np.array(choose_exact(mx.array(logits)[None], uniform, 1.0, 1.0, mx.zeros(40_000, dtype=mx.int32)))
    counts = np.bincount(drawn, minlength=len(logits))
    assert chisquare(counts, probabilities * counts.sum()).pvalue > 0.001
