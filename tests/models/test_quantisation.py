"""Rounding to few bits: MLX's own bits, and what any rounding must keep."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.quantisation import QuantFormat

AFFINE = [QuantFormat(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
NEWER = [QuantFormat(4, 32, "mxfp4"), QuantFormat(8, 32, "mxfp8"), QuantFormat(4, 16, "nvfp4")]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("quant", AFFINE + NEWER, ids=str)
def test_it_has_the_bits_of_what_mlx_stores(quant):
    weight = mx.array(random(24, 384) * np.float32(0.3))
    options = {"group_size": quant.group_size, "bits": quant.bits, "mode": quant.mode}
    expected = mx.dequantize(*mx.quantize(weight, **options), **options).astype(mx.float32)
    rounded = quant.round_trip(weight)
    assert rounded.dtype == mx.float32
    assert mx.array_equal(rounded, expected).item()
    assert not mx.array_equal(rounded, weight).item()


@pytest.mark.parametrize("quant", AFFINE, ids=str)
def test_a_group_has_few_values_and_each_is_near(quant):
    weight = random(6, 256, seed=1)
    rounded = np.array(quant.round_trip(mx.array(weight)))
    groups = weight.reshape(-1, quant.group_size).astype(np.float64)
    values = rounded.reshape(-1, quant.group_size)
    assert max(len(np.unique(group)) for group in values) <= 2**quant.bits
    step = (groups.max(axis=1) - groups.min(axis=1)) / (2**quant.bits - 1)
    # MLX moves a group's grid so that its outer end is a multiple of the step: up to half a step more.
    assert (np.abs(values - groups) <= 1.01 * step[:, None]).all()
    assert np.abs(values - groups).mean() < 0.5 * step.mean()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_rows_are_the_papers(bits):
    weight = random(7, 50, seed=2)
    weight[3] = 0
    top = 2 ** (bits - 1) - 1
    scale = np.abs(weight.astype(np.float64)).max(axis=1, keepdims=True) / top
    expected = np.clip(np.rint(weight / np.where(scale == 0, 1, scale)), -top - 1, top) * scale
    rounded = np.array(QuantFormat(bits, mode="symmetric").round_trip(mx.array(weight)))
    np.testing.assert_allclose(rounded, expected, rtol=2e-7, atol=0)
    assert (rounded[3] == 0).all()


def test_scales_are_kept_in_the_type_of_the_model():
    weight, quant = mx.array(random(8, 64, seed=3)), QuantFormat(4, 32)
    packed, scales, biases = mx.quantize(weight, 32, 4)
    halves = [part.astype(mx.bfloat16).astype(mx.float32) for part in (scales, biases)]
    expected = mx.dequantize(packed, *halves, 32, 4)
    assert mx.array_equal(quant.round_trip(weight, mx.bfloat16), expected).item()
    assert not mx.array_equal(quant.round_trip(weight), expected).item()


@pytest.mark.parametrize(
    ("text", "quant"),
    [
        ("4", QuantFormat(4, 64)),
        ("3,32", QuantFormat(3, 32)),
        ("4,32,mxfp4", QuantFormat(4, 32, "mxfp4")),
        ("4, nvfp4", QuantFormat(4, 16, "nvfp4")),
        ("3,symmetric", QuantFormat(3, 0, "symmetric")),
        ("2,affine,128", QuantFormat(2, 128)),
    ],
)
def test_written_formats(text, quant):
    assert QuantFormat.parse(text) == quant


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("7", "MLX has no 7 bits in groups of 64: .*supported bits are"),
        ("4,33", "MLX has no 4 bits in groups of 33: .*supported group sizes are"),
        ("3,mxfp4", "MLX has no 3 bits in groups of 32 .mxfp4.: "),
        ("9,symmetric", "symmetric takes 2 to 8 bits"),
        ("1,symmetric", "symmetric takes 2 to 8 bits"),
        ("4,32,symmetric", "and no groups"),
        ("4,q4_k", "mode 'q4_k' is unknown; there are affine, "),
        ("four", "is not BITS"),
        ("4,32,64", "is not BITS"),
        ("", "is not BITS"),
        ("4,", "is not BITS"),
    ],
)
def test_what_is_no_format(text, reason):
    with pytest.raises(RsgwmError, match=reason):
        QuantFormat.parse(text)
