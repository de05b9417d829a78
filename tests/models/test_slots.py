"""Slots: the same outputs as mlx-lm's own loading, constant-time switching, nothing silently unapplied."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.fit_check import find_module
from mlx_rsgwm.models.slots import AdapterSlots

IDS = [[5, 9, 200, 31, 7, 7, 80]]


@pytest.mark.parametrize("quantised", [False, True])
def test_outputs_equal_mlx_lm(base, tiny_base, make_adapter, tmp_path, quantised):
    from mlx_lm.tuner.utils import load_adapters

    adapter = make_adapter(1)
    adapter.save(tmp_path / "a")
    other = load_base(str(tiny_base), dtype="float32")
    if quantised:
        for model in (base.model, other.model):
            nn.quantize(model, group_size=32, bits=8)
    load_adapters(other.model, str(tmp_path / "a"))
    other.model.eval()
    slots = AdapterSlots(base)
    bare = slots.model(mx.array(IDS))
    slots.load("one", adapter)
    slots.load("two", make_adapter(2))
    assert mx.array_equal(slots.model(mx.array(IDS)), bare).item()
    slots.use("one")
    assert mx.array_equal(slots.model(mx.array(IDS)), other.model(mx.array(IDS))).item()
    slots.use("two")
    assert not mx.allclose(slots.model(mx.array(IDS)), other.model(mx.array(IDS))).item()
    slots.unload("two")
    assert slots.active is None
    assert mx.array_equal(slots.model(mx.array(IDS)), bare).item()


@pytest.mark.parametrize("of_a_sum", [False, True])
def test_an_adapter_forgets_what_was_in_its_slot(base, make_adapter, of_a_sum):
    slots = AdapterSlots(base)
    slots.load("first" if of_a_sum else "x", make_adapter(1))
    if of_a_sum:
        slots.add("x", {"first": 2.0})
    slots.load("x", make_adapter(2, keys=("self_attn.k_proj",)))
    slots.load("y", make_adapter(2, keys=("self_attn.k_proj",)))
    assert slots.sums() == []
    with slots.using("x"):
        first = slots.model(mx.array(IDS))
    with slots.using("y"):
        assert mx.array_equal(slots.model(mx.array(IDS)), first).item()


def test_using_restores_after_an_error(base, make_adapter):
    slots = AdapterSlots(base)
    slots.load("x", make_adapter(1))
    with pytest.raises(ZeroDivisionError), slots.using("x"):
        raise ZeroDivisionError
    assert slots.active is None


def test_what_does_not_fit_is_refused_and_changes_nothing(base, make_adapter):
    slots = AdapterSlots(base)
    foreign = make_adapter(1)
    foreign.manifest["base"] = {**foreign.manifest["base"], "fingerprint": "0" * 64, "name": "elsewhere"}
    with pytest.raises(AdapterError, match="was made for elsewhere"):
        slots.load("x", foreign)
    dead = make_adapter(1)
    dead.weights = {name: value * (name.endswith("lora_a")) for name, value in dead.weights.items()}
    with pytest.raises(AdapterError, match="would change nothing"):
        slots.load("x", dead)
    misshapen = make_adapter(1)
    misshapen.weights["model.layers.7.self_attn.q_proj.lora_a"] = mx.zeros((32, 4))
    misshapen.weights["model.layers.7.self_attn.q_proj.lora_b"] = mx.zeros((4, 32))
    misshapen.weights["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((31, 4))
    with pytest.raises(AdapterError) as caught:
        slots.load("x", misshapen)
    assert "no module model.layers.7.self_attn.q_proj" in str(caught.value)
    assert "31→32" in str(caught.value)
    assert slots.names() == []
    with pytest.raises(RsgwmError, match="no adapter named 'x'"):
        slots.use("x")


def test_new_slots_take_the_model_over(base, make_adapter):
    """Once, two sets of slots on one base left the second one's adapters silently unapplied."""
    first = AdapterSlots(base)
    bare = first.model(mx.array(IDS))
    first.load("x", make_adapter(1))
    first.use("x")
    applied = first.model(mx.array(IDS))
    second = AdapterSlots(base)
    assert mx.array_equal(second.model(mx.array(IDS)), bare).item()
    second.load("x", make_adapter(1))
    second.use("x")
    assert mx.array_equal(second.model(mx.array(IDS)), applied).item()
    with pytest.raises(RuntimeError, match="these slots were replaced"):
        first.use("x")
    with pytest.raises(RuntimeError, match="these slots were replaced"):
        first.load("y", make_adapter(2))


def dora(adapter, base):
    """The adapter as DoRA: with magnitudes near, but not at, the norms of the base's rows."""
    spec = LoraSpec(**{**vars(adapter.spec), "fine_tune_type": "dora"})
    weights = dict(adapter.weights)
    layers = dict(base.model.named_modules())
    for position, module in enumerate(adapter.modules()):
        layer = getattr(layers[module], "linear", layers[module])
        out = layer.weight.shape[0]
        weights[f"{module}.m"] = 1 + 0.1 * mx.arange(out, dtype=mx.float32) / out + position
    return Adapter(spec, weights, manifest=adapter.manifest)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_equals_mlx_lm(base, tiny_base, make_adapter, tmp_path, bits, bias):
    from mlx_lm.tuner.utils import load_adapters

    other = load_base(str(tiny_base), dtype="float32")
    for model in (base.model, other.model):
        if bias:
            for layer in model.layers:
                layer.self_attn.q_proj.bias = mx.linspace(-1, 1, layer.self_attn.q_proj.weight.shape[0])
        if bits:
            nn.quantize(model, group_size=32, bits=bits)
    adapter = dora(make_adapter(1), base)
    adapter.save(tmp_path / "a")
    load_adapters(other.model, str(tmp_path / "a"))
    other.model.eval()
    slots = AdapterSlots(base)
    slots.load("one", adapter)
    slots.use("one")
    assert mx.allclose(slots.model(mx.array(IDS)), other.model(mx.array(IDS)), rtol=1e-4, atol=1e-4).item()
    slots.use(None)
    assert not mx.allclose(slots.model(mx.array(IDS)), other.model(mx.array(IDS)), atol=1e-2).item()


@pytest.mark.parametrize("bits", [None, 4])
def test_dora_that_changes_nothing_is_refused(base, make_adapter, bits):
    """As PEFT and mlx-lm begin it: lora_b zero and the magnitudes those of the base, which only the base can tell."""
    if bits:
        nn.quantize(base.model, group_size=32, bits=bits)
    adapter, layers = dora(make_adapter(1), base), dict(base.model.named_modules())
    weights = {name: value * 0 if name.endswith("lora_b") else value for name, value in adapter.weights.items()}
    for module in adapter.modules():
        layer = layers[module]
        dense = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, bits) if bits else layer.weight
        weights[f"{module}.m"] = mx.linalg.norm(dense.astype(mx.float32), axis=1)
    slots = AdapterSlots(base)
    with pytest.raises(AdapterError, match=r"would change nothing: .*magnitudes are the base's"):
        slots.load("still", replace(adapter, weights=weights))
    module = adapter.modules()[-1]
    slots.load("moved", replace(adapter, weights={**weights, f"{module}.m": weights[f"{module}.m"] * 1.01}))
    assert "still" not in slots.nbytes()


def test_rows_of_a_batch_take_their_own_adapters(base, make_adapter):
    slots = AdapterSlots(base)
    slots.load("one", make_adapter(1))
    slots.load("two", dora(make_adapter(2, rank=3, keys=("self_attn.k_proj",)), base))
    rows = ["two", None, "one", "one", "two"]
    batch = mx.array([[5, 9, 200 + row, 31] for row in range(len(rows))])
    with slots.using_rows(rows):
        assert slots.active is None
        found = slots.model(batch)
    for row, name in enumerate(rows):
        with slots.using(name):
            assert mx.allclose(found[row], slots.model(batch[row : row + 1])[0], rtol=1e-4, atol=1e-4).item()
    with pytest.raises(RsgwmError, match="no adapter named 'three'"), slots.using_rows(["one", "three"]):
        pass
    with slots.using("one"), slots.using_rows(["two"]):
        assert slots.active == "two"


def test_an_adapted_embedding_equals_mlx_lm(base):
    from mlx_lm.tuner.lora import LoRAEmbedding

    table = base.model.model.embed_tokens
    a, b = mx.random.normal((table.weight.shape[0], 3)), mx.random.normal((3, table.weight.shape[1]))
    peer = LoRAEmbedding.from_base(table, r=3, scale=0.5)
    peer.lora_a, peer.lora_b = a, b
    slots = AdapterSlots(base)
    weights = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    slots.load("one", Adapter(LoraSpec(3, 0.5, 0.0, ("embed_tokens",), -1), weights))
    states = mx.random.normal((1, 4, table.weight.shape[1]))
    with slots.using("one"):
        layer = base.model.model.embed_tokens
        assert mx.allclose(layer(mx.array(IDS)), peer(mx.array(IDS)), atol=1e-5).item()
        assert mx.allclose(layer.as_linear(states), peer.as_linear(states), rtol=1e-4, atol=1e-4).item()


def test_the_memory_account(base, make_adapter):
    slots = AdapterSlots(base)
    before = slots.memory()["base"]
    adapter = make_adapter(1)
    slots.load("one", adapter)
    account = slots.memory()
    assert account["base"] == before
    assert account["adapters"] == {"one": sum(value.nbytes for value in adapter.weights.values())}


def weights_of(adapter, scale):
    """The change of every weight of the base that an adapter makes, (out, in) float64, times ``scale``."""
    return {
        module: scale * adapter.spec.scale * (np.array(a, np.float64) @ np.array(b, np.float64)).T
        for module, a, b in adapter.factors()
    }


def test_a_sum_of_adapters_computes_the_base_with_all_their_changes(base, make_adapter):
    first, second = make_adapter(1), make_adapter(2, rank=2, keys=("self_attn.q_proj", "mlp.up_proj"))
    slots = AdapterSlots(base)
    slots.load("first", first)
    slots.load("second", second)
    slots.add("sum", {"first": 0.5, "second": -1.25})
    assert slots.sums() == ["sum"]
    assert set(slots.modules("sum")) == {*first.modules(), *second.modules()}
    with slots.using_rows(["second", "sum", None, "first"]):
        rows = slots.model(mx.array(IDS * 4))
    with slots.using("sum"):
        logits = slots.model(mx.array(IDS))[0]
    assert mx.allclose(rows[1], logits, atol=1e-5).item()
    slots.unload("first")  # what is added up stays
    with slots.using("sum"):
        assert mx.array_equal(slots.model(mx.array(IDS))[0], logits).item()
    with pytest.raises(RsgwmError, match="filled already"):
        slots.add("second", {"sum": 1.0})
    slots.unload("sum")
    assert slots.sums() == []

    for changes in (weights_of(first, 0.5), weights_of(second, -1.25)):
        for module, change in changes.items():
            layer = find_module(base.model, module).bare
            layer.weight = mx.array((np.array(layer.weight, np.float64) + change).astype(np.float32))
    assert mx.allclose(slots.model(mx.array(IDS))[0], logits, atol=2e-5).item()


def test_doras_are_not_added(base, make_adapter):
    slots = AdapterSlots(base)
    slots.load("one", make_adapter(2))
    slots.load("two", dora(make_adapter(1), base))
    with pytest.raises(AdapterError, match="is a DoRA"):
        slots.add("sum", {"one": 1.0, "two": 1.0})
    assert slots.sums() == []
