"""The CPU's quicker ways give the same values, and gradients, as the plain ones."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_rsgwm import cpu


@pytest.fixture(autouse=True)
def on_linux(monkeypatch):
    monkeypatch.setattr(cpu, "applies", lambda: True)


def test_model_is_the_same(tiny_base):
    from mlx_lm.utils import load_model

    ids = mx.array([[3, 4, 5, 200], [9, 8, 7, 6]])
    plain, quick = (load_model(tiny_base)[0] for _ in range(2))
    cpu.quicken(quick)
    assert type(quick.model.layers[0].mlp) is cpu.GatedMlp
    assert type(quick.model.layers[0].self_attn.q_proj) is cpu.FlatLinear
    assert mx.allclose(plain(ids), quick(ids), rtol=1e-5, atol=1e-5).item()
    assert plain.parameters().keys() == quick.parameters().keys()

    def loss(model):
        return mx.square(model(ids)).mean()

    for (name, expected), (same, found) in zip(gradients(plain, loss), gradients(quick, loss), strict=True):
        assert name == same
        assert mx.allclose(expected, found, rtol=1e-3, atol=1e-6).item()


def gradients(model, loss):
    from mlx.utils import tree_flatten

    return tree_flatten(nn.value_and_grad(model, loss)(model)[1])


def test_cross_entropy_and_its_gradient():
    logits = mx.random.normal((7, 50)) * 30
    targets = mx.array([0, 49, 3, 3, 7, 1, 2])
    for function in (
        lambda f: f(logits, targets).sum(),
        lambda f: mx.grad(lambda x: f(x, targets).sum())(logits).sum(),
    ):
        assert function(cpu.cross_entropy).item() == pytest.approx(function(nn.losses.cross_entropy).item(), abs=1e-3)
    ours, theirs = (
        mx.grad(lambda x, f=f: f(x, targets).sum())(logits) for f in (cpu.cross_entropy, nn.losses.cross_entropy)
    )
    assert mx.allclose(ours, theirs, atol=1e-5).item()


def test_exp_is_exp():
    x = mx.linspace(-80, 80, 1001)
    assert mx.allclose(cpu.exp(x), mx.exp(x), rtol=1e-5, atol=0).item()


def test_other_devices_are_left_alone(tiny_base, monkeypatch):
    from mlx_lm.utils import load_model

    monkeypatch.setattr(cpu, "applies", lambda: False)
    model = load_model(tiny_base)[0]
    cpu.quicken(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
