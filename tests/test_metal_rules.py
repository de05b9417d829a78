"""The guards of conftest.py do bite: a suite that only seems guarded is worse than one that is not."""

import mlx.core as mx
import numpy as np
import pytest


def test_linalg_needs_the_cpu_stream():
    matrix = mx.array(np.eye(3, dtype=np.float32))
    with pytest.raises(AssertionError, match=r"mx\.linalg\.svd needs stream=mx\.cpu"):
        mx.linalg.svd(matrix)
    values = mx.linalg.svd(matrix, stream=mx.cpu)[1]
    assert values.tolist() == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["zeros", "ones"])
def test_float64_is_refused(name):
    with pytest.raises(AssertionError, match="float64 does not exist on Metal"):
        getattr(mx, name)((2,), dtype=mx.float64)
    assert getattr(mx, name)((2,)).dtype == mx.float32
