"""Rounding by error feedback: against a slow float64 reference, and packed as MLX packs."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.fuse.error_feedback import DAMPING, Packed, round_by_feedback
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.quantisation import QuantFormat

FORMATS = [QuantFormat(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)]


def layer(outputs=12, inputs=128, seed=0, tokens=400):
    """A weight, and the second moment of inputs that lie in few directions."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    x = rng.standard_normal((tokens, 20)) @ rng.standard_normal((20, inputs)) + 0.1 * rng.standard_normal(
        (tokens, inputs)
    )
    return weight, x.T @ x / tokens


def reference(weight, gram, quant):
    """Column by column with the inverse of what is left of H, taken anew each time (arXiv 2210.17323, equation 2)."""
    left = weight.astype(np.float64).copy()
    damped = gram + np.eye(len(gram)) * DAMPING * np.diagonal(gram).mean()
    rounded = np.zeros_like(left)
    for column in range(left.shape[1]):
        if column % quant.group_size == 0:
            group = mx.array(left[:, column : column + quant.group_size].astype(np.float32))
            _, scale, bias = mx.quantize(group, quant.group_size, quant.bits)
            step, offset = (np.array(part).astype(np.float64)[:, 0] for part in (scale, bias))
        code = np.clip(np.rint((left[:, column] - offset) / step), 0, 2**quant.bits - 1)
        rounded[:, column] = code * step + offset
        inverse = np.linalg.inv(damped[column:, column:])
        lost = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, column:] -= np.outer(lost, inverse[0])
    return rounded


def lost(weight, rounded, gram):
    error = weight.astype(np.float64) - rounded
    return np.einsum("oi,ij,oj->", error, gram, error)


@pytest.mark.parametrize("quant", [QuantFormat(3, 32), QuantFormat(4, 64)], ids=str)
def test_it_is_the_slow_reference(quant):
    weight, gram = layer()
    rounded = np.array(round_by_feedback(mx.array(weight), gram, quant).dense())
    np.testing.assert_allclose(rounded, reference(weight, gram, quant), atol=1e-4)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_it_loses_less_of_the_output_than_plain_rounding(quant):
    weight, gram = layer(seed=1)
    rounded = np.array(round_by_feedback(mx.array(weight), gram, quant).dense())
    plain = np.array(quant.round_trip(mx.array(weight)))
    assert lost(weight, rounded, gram) < 0.7 * lost(weight, plain, gram)
    assert np.square(rounded - weight).sum() > np.square(plain - weight).sum()  # which is not what it aims at


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_codes_are_packed_as_mlx_packs_them(quant):
    weight = mx.array(np.random.default_rng(2).standard_normal((6, 128)).astype(np.float32))
    packed, scales, biases = mx.quantize(weight, quant.group_size, quant.bits)
    steps, offsets = (np.repeat(np.array(part), quant.group_size, axis=1) for part in (scales, biases))
    dense = np.array(mx.dequantize(packed, scales, biases, quant.group_size, quant.bits))
    codes = np.rint((dense - offsets) / steps).astype(np.uint8)
    assert mx.array_equal(Packed(codes, scales, biases, quant).weight(), packed).item()


def test_inputs_that_are_alike_leave_plain_rounding():
    weight, quant = layer(seed=3)[0], QuantFormat(4, 32)
    rounded = round_by_feedback(mx.array(weight), np.eye(128), quant)
    np.testing.assert_allclose(np.array(rounded.dense()), np.array(quant.round_trip(mx.array(weight))), atol=1e-5)


def test_inputs_that_are_never_met_and_a_weight_of_zeros():
    weight, gram = layer(seed=4)
    gram[:, 40:70] = gram[40:70] = 0
    for values, moments in ((weight, gram), (0 * weight, gram), (weight, 0 * gram)):
        rounded = np.array(round_by_feedback(mx.array(values), moments, QuantFormat(4, 32)).dense())
        assert np.abs(rounded - values).max() < 2.0


def test_scales_are_kept_in_the_type_of_the_model():
    weight, gram = layer(seed=5)
    packed = round_by_feedback(mx.array(weight), gram, QuantFormat(4, 32), mx.bfloat16)
    assert packed.scales.dtype == packed.biases.dtype == mx.bfloat16
    plain = np.array(QuantFormat(4, 32).round_trip(mx.array(weight), mx.bfloat16))
    assert lost(weight, np.array(packed.dense()), gram) < lost(weight, plain, gram)


def test_formats_without_offsets_are_refused():
    with pytest.raises(RsgwmError, match="takes an affine format"):
        round_by_feedback(mx.zeros((4, 64)), np.eye(64), QuantFormat(4, 32, "mxfp4"))
    with pytest.raises(RsgwmError, match="takes an affine format"):
        round_by_feedback(mx.zeros((4, 96)), np.eye(96), QuantFormat(4, 64))
