"""Arrays on their way into a safetensors file."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.stream import write_arrays
from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.core.safetensors_io import read_safetensors


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_value_of_two_bytes_is_known_as_finite_or_not(tmp_path, dtype):
    every = mx.arange(2**16, dtype=mx.uint16).view(dtype)
    finite = np.array(mx.isfinite(every))
    bits = np.array(every.view(mx.uint16))
    write_arrays(tmp_path / "finite", {"x": mx.array(bits[finite]).view(dtype)}, {})
    assert np.array_equal(np.array(read_safetensors(tmp_path / "finite")[0]["x"].view(mx.uint16)), bits[finite])
    for one in bits[~finite][:: 97 if dtype == mx.float16 else 7]:
        with pytest.raises(AdapterError, match="x has values that are not finite"):
            write_arrays(tmp_path / "not", {"x": mx.array(np.array([0, one, 3], np.uint16)).view(dtype)}, {})
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_values_of_four_bytes(tmp_path, bad):
    largest = float(np.finfo(np.float32).max)
    extremes = [largest, -largest, 1e-45, 0.0]
    write_arrays(tmp_path / "finite", {"x": mx.array(extremes), "y": mx.zeros((0,)), "z": mx.array([2**30])}, {})
    with pytest.raises(AdapterError, match="x has values that are not finite"):
        write_arrays(tmp_path / "not", {"x": mx.array([*extremes, bad])}, {})
