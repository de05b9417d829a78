"""PEFT folders: made by PEFT, read by us, written back; and made by us, loaded by PEFT. Bits and logits."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.converters.peft.convert import from_peft, from_peft_on, to_peft
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from tests.converters.peft.tiny_adapters import (
    DTYPES,
    LAYERS,
    SHAPES,
    make_adapter,
    make_peft,
    mlx_logits,
    raw,
    same_arrays,
    torch_logits,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_torch_thread")


CONFIGURATIONS = {
    "two modules": {},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]},
    "regex": {"target_modules": r".*\.(q_proj|gate_proj)$"},
    "all linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "last two layers": {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "one layer in the middle": {"layers_to_transform": [1]},
    "rank-stabilised": {"use_rslora": True, "r": 6},
    "dropout": {"lora_dropout": 0.1},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "fan in": {"fan_in_fan_out": False, "exclude_modules": ["v_proj"]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))
def test_peft_to_ours_to_peft_keeps_every_bit(torch_base, tmp_path, settings, dtype):
    theirs = make_peft(torch_base, tmp_path / "theirs", dtype, **settings)
    from_peft(theirs).save(tmp_path / "ours")
    back = to_peft(Adapter.load(tmp_path / "ours"), "some/base", tmp_path / "back")
    before, after = raw(theirs), raw(back)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype == getattr(torch, dtype)
        assert torch.equal(value, after[name]), name
    original = json.loads((theirs / "adapter_config.json").read_text())
    config = json.loads((back / "adapter_config.json").read_text())
    assert config == {**original, "base_model_name_or_path": "some/base"}


@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))
def test_what_peft_made_computes_the_same_in_mlx(base_folder, torch_base, tmp_path, settings):
    theirs = make_peft(torch_base, tmp_path / "theirs", **settings)
    from_peft_on(theirs, str(base_folder)).save(tmp_path / "ours")
    expected = torch_logits(peft.PeftModel.from_pretrained(torch_base(), str(theirs)).eval())
    assert np.abs(expected - torch_logits(torch_base())).max() > 0.05
    assert np.abs(mlx_logits(base_folder, tmp_path / "ours") - expected).max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_to_peft_to_ours_keeps_everything(tmp_path, dtype):
    manifest = {"kind": "trained", "base": {"name": "b", "fingerprint": "f", "num_layers": LAYERS}, "seed": 3}
    adapter = make_adapter(dtype=DTYPES[dtype], scale=1.7, rank=3, manifest=manifest)
    adapter.save(tmp_path / "ours")
    before = Adapter.load(tmp_path / "ours")
    to_peft(before, "b", tmp_path / "peft")
    from_peft(tmp_path / "peft").save(tmp_path / "back")
    after = Adapter.load(tmp_path / "back")
    for group in ("weights", "importance", "init"):
        same_arrays(getattr(before, group), getattr(after, group))
    assert after.spec == before.spec
    assert after.importance_metadata == before.importance_metadata
    drop = {"files"}
    assert {k: v for k, v in after.manifest.items() if k not in drop} == {
        k: v for k, v in before.manifest.items() if k not in drop
    }


SELECTIONS = {
    "every layer": {},
    "last two": {"layers": [1, 2]},
    "first only": {"layers": [0]},
    "mlp": {"keys": ("mlp.gate_proj", "mlp.down_proj")},
    "half precision": {"dtype": mx.float16},
    "odd scale": {"rank": 3, "scale": 0.1},
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=list(SELECTIONS))
@pytest.mark.parametrize("depth_known", [True, False])
def test_peft_loads_ours_and_computes_the_same(base_folder, torch_base, tmp_path, selection, depth_known):
    manifest = {"base": {"name": "b", "num_layers": LAYERS}} if depth_known else {}
    adapter = make_adapter(manifest=manifest, **selection)
    adapter.save(tmp_path / "ours")
    to_peft(adapter, "b", tmp_path / "peft")
    with warnings.catch_warnings(record=True) as caught:  # PEFT only warns where an array finds no module
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(torch_base(), str(tmp_path / "peft")).eval()
    assert not [one for one in caught if "adapter keys" in str(one.message)]
    adapted = [name for name, module in model.named_modules() if "default" in getattr(module, "lora_A", {})]
    assert sorted(name.removeprefix("base_model.model.") for name in adapted) == sorted(adapter.modules())
    expected = torch_logits(model)
    assert np.abs(expected - torch_logits(torch_base())).max() > 0.01
    assert np.abs(mlx_logits(base_folder, tmp_path / "ours") - expected).max() < 1e-4


def test_modules_that_differ_between_layers_are_named_in_full(torch_base, tmp_path):
    adapter = make_adapter()
    dropped = {"model.layers.1.self_attn.q_proj.lora_a", "model.layers.1.self_attn.q_proj.lora_b"}
    weights = {name: value for name, value in adapter.weights.items() if name not in dropped}
    adapter = Adapter(adapter.spec, weights)
    to_peft(adapter, "b", tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(torch_base(), str(tmp_path / "peft"))
    adapted = [name for name, module in model.named_modules() if "default" in getattr(module, "lora_A", {})]
    assert len(adapted) == 3 * 4 - 1
    assert sorted(name.removeprefix("base_model.model.") for name in adapted) == sorted(adapter.modules())


def test_manifest_of_a_converted_adapter(base_folder, torch_base, tmp_path):
    theirs = make_peft(torch_base, tmp_path / "theirs")
    adapter = from_peft_on(theirs, str(base_folder))
    assert adapter.manifest["kind"] == "converted"
    assert adapter.manifest["base"] == load_base(str(base_folder)).describe()
    assert adapter.spec.num_layers == LAYERS
    assert from_peft(theirs).manifest["base"]["name"] == str(base_folder)


def test_an_alias_is_published_as_its_hub_id(tmp_path):
    to_peft(make_adapter(), "smollm2-135m", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_tiny_base_has_the_shapes_the_tests_assume(base_folder):
    shapes = {name: value.shape for name, value in tree_flatten(load_base(str(base_folder)).model.parameters())}
    for module, shape in SHAPES.items():
        assert shapes[f"model.layers.0.{module}.weight"] == shape
