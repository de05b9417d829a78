"""Merged modules are given out one by one, and what they were merged from is let go."""

from __future__ import annotations

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.linalg.gram import SketchedGram
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging import compressed
from mlx_rsgwm.merging.layer import Layer

INPUTS, COLUMNS, COUNT = 512, 128, 3
SKETCHES = INPUTS * COLUMNS * COUNT * 8  # bytes of one module's


def module(number, columns):
    rng = np.random.default_rng(number)
    factors = [
        Factors(*(mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in ((INPUTS, 4), (4, 32))))
        for _ in range(COUNT)
    ]
    grams = [SketchedGram(rng.standard_normal((INPUTS, columns)), np.ones(INPUTS), 0.5) for _ in range(COUNT)]
    parameters = {"balance": "equal", "ridge": 1e-3, "truncate": "metric", "off_diagonal": 1.0, "source": "directions"}
    return Layer(
        f"layer-{number}", tuple(factors), (1.0,) * COUNT, (1.0,) * COUNT, mx.random.key(0), grams=grams,
        parameters=parameters, method="regmean",
    )  # fmt: skip


def peak(count, columns):
    """The most bytes that NumPy holds while so many modules are merged, and the bytes at the end."""
    tracemalloc.start()
    try:
        for merged, result in compressed.compressed_modules((module(n, columns) for n in range(count)), 4, True):
            mx.eval(result.factors.a, merged.notes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("columns", [COLUMNS, 2 * COLUMNS], ids=["sketched", "multiplied out"])
def test_of_several_modules_one_is_in_memory(monkeypatch, columns):
    monkeypatch.setattr(compressed, "THREADED_ENTRIES", 0)
    peak(1, columns)  # what is made once
    assert peak(4, columns) < peak(1, columns) + SKETCHES / 4
