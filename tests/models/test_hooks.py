"""Looking into layers and changing them, against the blocks run by hand, on every kind of layer a model may have."""

import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import LoraSpec
from mlx_rsgwm.models.hooks import (
    block_names,
    calls_wrapped,
    inputs_seen,
    modules_replaced,
    outputs_changed,
)
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.training.layers import lora_layers

IDS = mx.array([[5, 9, 3, 70, 8, 12], [1, 2, 3, 4, 5, 6]])
Q_PROJ = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(params=["plain", "lora", "dora", "4-bit lora", "slots"])
def model(request, base, make_adapter):
    """The tiny model with layers of one kind; what the adapters add is not zero."""
    if request.param.startswith("4-bit"):
        nn.quantize(base.model, group_size=32, bits=4)
    if request.param == "slots":
        slots = AdapterSlots(base)
        slots.load("a", make_adapter(1, keys=("self_attn.q_proj", "mlp.down_proj")))
        with slots.using("a"):
            yield base.model
    elif request.param == "plain":
        yield base.model
    else:
        kind = request.param.split()[-1]
        spec = LoraSpec(4, 2.0, 0.0, ("self_attn.q_proj", "mlp.down_proj"), 2, kind)
        with lora_layers(base.model, spec, 0):
            for name, module in base.model.named_modules():
                if hasattr(module, "lora_b"):
                    module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name)))
            yield base.model


def same(one, other):
    return np.testing.assert_array_equal(np.array(one), np.array(other))


def raise_interrupt():
    raise KeyboardInterrupt


def by_hand(model, ids, middle=lambda h: h, upper=lambda block, h: block(h, mask="causal", cache=None)):
    """Logits from the two blocks called one by one, with ``middle`` between them."""
    h = middle(model.layers[0](model.model.embed_tokens(ids), mask="causal", cache=None))
    return model.model.embed_tokens.as_linear(model.model.norm(upper(model.layers[1], h)))


def test_inputs_are_those_of_the_blocks_run_by_hand(model):
    seen = {}
    with inputs_seen(model, [Q_PROJ, "model.layers.1"], lambda name, x: seen.setdefault(name, x)):
        logits = model(IDS)
    same(logits, model(IDS))
    first = model.layers[0](model.model.embed_tokens(IDS), mask="causal", cache=None)
    same(seen["model.layers.1"], first)
    same(seen[Q_PROJ], model.layers[1].input_layernorm(first))


def test_changed_outputs_are_those_of_the_blocks_run_by_hand(model):
    plain = model(IDS)
    same(by_hand(model, IDS), plain)
    with outputs_changed(model, ["model.layers.0"], lambda name, x, y: 0.5 * y + x):
        changed = model(IDS)
    embedded = model.model.embed_tokens(IDS)
    same(changed, by_hand(model, IDS, lambda h: 0.5 * h + embedded))
    with outputs_changed(model, [DOWN], lambda name, x, y: mx.zeros_like(y)):  # only the attention is left
        changed = model(IDS)
    alone = by_hand(model, IDS, upper=lambda block, h: h + block.self_attn(block.input_layernorm(h), "causal", None))
    assert mx.allclose(changed, alone, rtol=1e-5, atol=1e-5).item()
    assert not mx.allclose(changed, plain, rtol=1e-3, atol=1e-3).item()
    same(model(IDS), plain)


def test_a_hooked_module_keeps_kind_and_parameters_and_is_itself_again_after_an_error(model):
    module = dict(model.named_modules())[DOWN]
    kind, names = type(module), [name for name, _ in tree_flatten(model.parameters())]

    def fail(name, x):
        assert isinstance(dict(model.named_modules())[name], kind)
        assert [name for name, _ in tree_flatten(model.parameters())] == names
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), inputs_seen(model, [DOWN], fail):
        model(IDS)
    assert type(module) is kind


def test_hooks_nest_and_a_name_that_is_not_there_hooks_nothing(base):
    model, seen = base.model, []
    module = dict(model.named_modules())[DOWN]
    kind = type(module)
    with (
        outputs_changed(model, [DOWN], lambda name, x, y: 2 * y),
        outputs_changed(model, [DOWN], lambda name, x, y: seen.append(y) or y),
        outputs_changed(model, [DOWN], lambda name, x, y: seen.append(x) or y),
    ):
        model(IDS)
    same(seen[0], 2 * module(seen[1]))
    unknown = [DOWN, "model.layers.7", "nothing"]
    with (
        pytest.raises(RsgwmError, match=r"the model has no module model\.layers\.7, nothing"),
        inputs_seen(model, unknown, lambda name, x: None),
    ):
        pass
    with pytest.raises(KeyError), calls_wrapped(model, [DOWN, Q_PROJ], lambda name, call: {DOWN: call}[name]):
        pass
    assert type(module) is kind
    assert block_names(model) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("model", ["lora"], indirect=True)
def test_a_function_compiled_inside_computes_what_is_changed(model):
    plain = model(IDS)
    with outputs_changed(model, block_names(model), lambda name, x, y: 0.5 * y):
        changed, compiled = model(IDS), mx.compile(lambda ids: model(ids))(IDS)
    assert mx.allclose(compiled, changed, rtol=1e-5, atol=1e-5).item()
    assert not mx.allclose(changed, plain, rtol=1e-3, atol=1e-3).item()


def test_gradients_go_through_hooks(base):
    model = base.model
    with lora_layers(model, LoraSpec(4, 2.0, 0.0, ("self_attn.q_proj",), 2), 0):
        gradients = nn.value_and_grad(model, lambda model: model(IDS).square().mean())
        _, plain = gradients(model)
        with outputs_changed(model, [Q_PROJ], lambda name, x, y: y):
            _, looked = gradients(model)
        with outputs_changed(model, [Q_PROJ], lambda name, x, y: mx.stop_gradient(y)):
            _, stopped = gradients(model)
    plain, looked, stopped = (dict(tree_flatten(found)) for found in (plain, looked, stopped))
    for name, value in plain.items():
        same(value, looked[name])
    assert mx.abs(plain[f"{Q_PROJ}.lora_b"]).max().item() > 0
    assert mx.abs(stopped[f"{Q_PROJ}.lora_b"]).max().item() == 0


def test_replaced_modules_compute_and_go_again(base):
    model, plain = base.model, base.model(IDS)
    former = dict(model.named_modules())[DOWN]
    other = nn.Linear(64, 32, bias=False)
    changed = []
    with pytest.raises(KeyboardInterrupt), modules_replaced(model, {DOWN: other}):
        changed.append(model(IDS)) or raise_interrupt()
    weight, former.weight = former.weight, other.weight
    same(changed[0], model(IDS))
    former.weight = weight
    assert dict(model.named_modules())[DOWN] is former
    same(model(IDS), plain)


def test_what_a_hook_holds_is_let_go_with_it(base):
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)
    gc.disable()
    try:
        with outputs_changed(base.model, [Q_PROJ], lambda name, x, y, held=held: y):
            base.model(IDS)
        del held
        assert gone() is None
    finally:
        gc.enable()
