"""A model of rounded weights: it computes what the stored one will, and learns as if nothing were rounded."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import LoraSpec
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.models.rounded_weights import rounded_bytes, rounded_formats, rounded_output, rounded_weights
from mlx_rsgwm.training.layers import lora_layers, trainable

FORMATS = [QuantFormat(4, 32), QuantFormat(2, 32), QuantFormat(3, mode="symmetric"), QuantFormat(4, mode="mxfp4")]
LORA = LoraSpec(4, 2.0, 0.0, ("self_attn.q_proj", "self_attn.v_proj"), -1)
IDS = mx.array([[3, 9, 40, 41, 7, 99, 200, 12]])


def lora(bias, dropout=0.0):
    mx.random.seed(4)
    linear = nn.Linear(64, 24, bias=bias)
    layer = LoRALinear.from_base(linear, r=4, dropout=dropout, scale=1.5)
    layer.lora_b = 0.3 * mx.random.normal((4, 24))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_a_layer_and_its_gradients_are_those_of_float64(quant, bias):
    """y = x Q(W + ΔW)ᵀ; dL/d(W + ΔW) = gᵀ x, handed straight through Q, and on to A and B by the chain rule."""
    layer = lora(bias)
    rng = np.random.default_rng(5)
    x, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 64), (5, 24)))

    def loss(a, b, x):
        layer.lora_a, layer.lora_b = a, b
        return (rounded_output(layer, x, quant) * mx.array(g)).sum()

    a, b = layer.lora_a, layer.lora_b
    y = np.array(rounded_output(layer, mx.array(x), quant))
    gradients = [np.array(each) for each in mx.grad(loss, argnums=(0, 1, 2))(a, b, mx.array(x))]
    layer.lora_a, layer.lora_b = a, b
    a, b = (np.array(each).astype(np.float64) for each in (a, b))
    fused = layer.linear.weight + 1.5 * (layer.lora_b.T @ layer.lora_a.T)
    rounded = np.array(quant.round_trip(fused)).astype(np.float64)
    offset = np.array(layer.linear.bias) if bias else 0.0
    np.testing.assert_allclose(y, x.astype(np.float64) @ rounded.T + offset, rtol=1e-5, atol=1e-5)
    of_weight = g.T.astype(np.float64) @ x
    expected = (1.5 * of_weight.T @ b.T, 1.5 * a.T @ of_weight.T, g @ rounded)
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-4)
    assert np.abs(rounded - np.array(fused)).max() > 1e-3


def test_dropout_is_noise_beside_the_rounded_layer():
    quant, layer, x = QuantFormat(4, 32), lora(False, dropout=0.5), mx.ones((400, 64))
    dropped = rounded_output(layer, x, quant)
    layer.eval()
    still = rounded_output(layer, x, quant)
    assert not mx.allclose(dropped, still).item()
    assert mx.array_equal(still[0], still[1]).item()
    scale = mx.abs(layer.scale * (x @ layer.lora_a) @ layer.lora_b).max().item()
    assert mx.abs(dropped.mean(axis=0) - still[0]).max().item() < 0.5 * scale


@pytest.mark.parametrize("quant", [QuantFormat(4, 32), QuantFormat(2, 32), QuantFormat(4, mode="mxfp4")], ids=str)
def test_it_computes_what_the_quantised_model_does(base, quant):
    before = dict(tree_flatten(base.model.parameters()))
    with rounded_weights(base.model, quant):
        rounded = np.array(base.model(IDS))
    dense = np.array(base.model(IDS))
    assert all(value is before[name] for name, value in tree_flatten(base.model.parameters()))
    with lora_layers(base.model, LORA, 0), rounded_weights(base.model, quant):
        base.model.eval()
        np.testing.assert_array_equal(np.array(base.model(IDS)), rounded)  # lora_b is zero
    nn.quantize(base.model, quant.group_size, quant.bits, mode=quant.mode)
    np.testing.assert_allclose(np.array(base.model(IDS)), rounded, rtol=2e-3, atol=2e-3)
    assert np.abs(rounded - dense).max() > 0.05


def test_all_comes_back_after_an_error(base):
    former = dict(tree_flatten(base.model.parameters()))
    kinds = [type(module) for module in base.model.modules()]
    rounded = rounded_weights(base.model, QuantFormat(2, 32))
    with pytest.raises(ZeroDivisionError), lora_layers(base.model, LORA, 0), rounded:
        raise ZeroDivisionError
    assert kinds == [type(module) for module in base.model.modules()]
    assert all(value is former[name] for name, value in tree_flatten(base.model.parameters()))


def test_without_a_format_nothing_is_rounded(base):
    former = type(base.model.layers[0].mlp.up_proj)
    with rounded_weights(base.model, None):
        assert type(base.model.layers[0].mlp.up_proj) is former


def test_what_is_rounded_is_what_mlx_lm_quantises(base, monkeypatch):
    quant = QuantFormat(4, 64)  # the tiny base has 32 columns but for its down_proj
    assert set(rounded_formats(base.model, quant)) == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    assert rounded_bytes(base.model, quant) == 2 * 64 * 32 * 4
    every = rounded_formats(base.model, QuantFormat(4, 32))
    with lora_layers(base.model, LORA, 0):
        assert set(rounded_formats(base.model, QuantFormat(4, 32))) == set(every)

    def predicate(path, module):
        return {"bits": 8, "group_size": 32} if path.endswith("up_proj") else "self_attn" in path

    monkeypatch.setattr(type(base.model), "quant_predicate", property(lambda model: predicate), raising=False)
    chosen = rounded_formats(base.model, QuantFormat(4, 32))
    assert chosen["model.layers.1.mlp.up_proj"] == QuantFormat(8, 32)
    assert chosen["model.layers.1.self_attn.q_proj"] == QuantFormat(4, 32)
    assert "model.embed_tokens" not in chosen


@pytest.mark.parametrize(
    ("changes", "quant", "reason"),
    [
        ({}, QuantFormat(4, 64), "the group does not divide the 32 columns of model.layers.*, and of 3 more layers"),
        ({"keys": ("model.embed_tokens",)}, QuantFormat(4, 32), "model.embed_tokens is a LoRAEmbedding"),
    ],
)
def test_layers_that_cannot_be_rounded(base, changes, quant, reason):
    layers = lora_layers(base.model, replace(LORA, **changes), 0)
    with layers, pytest.raises(RsgwmError, match=reason), rounded_weights(base.model, quant):
        pass


def test_a_quantised_base(base):
    nn.quantize(base.model, 32, 8)
    refused = pytest.raises(RsgwmError, match=r"quantised already \(8 bits\).*dense.*--dequantize")
    with refused, rounded_weights(base.model, QuantFormat(4, 32)):
        pass


def test_gradients_of_a_model_do_not_reach_what_is_rounded_once(base):
    with lora_layers(base.model, LORA, 0), rounded_weights(base.model, QuantFormat(4, 32)):
        base.model.train()
        _, gradients = nn.value_and_grad(base.model, lambda model: model(IDS).square().mean())(base.model)
        names = {name for name, _ in tree_flatten(gradients)}
        assert names == set(trainable(base.model))
