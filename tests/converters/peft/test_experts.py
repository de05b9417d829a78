"""PEFT adapters with a module for every expert, as transformers before version 5 names them, there and back."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.peft.convert import from_peft, to_peft
from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.models.adapter import Adapter

EXPERTS, RANK, HIDDEN, WIDE = 3, 2, 8, 12
# transformers' projection, mlx-lm's, (in, out)
PROJECTIONS = {
    "mixtral": {"w1": ("gate_proj", HIDDEN, WIDE), "w2": ("down_proj", WIDE, HIDDEN), "w3": ("up_proj", HIDDEN, WIDE)},
    "qwen3_moe": {
        "gate_proj": ("gate_proj", HIDDEN, WIDE),
        "down_proj": ("down_proj", WIDE, HIDDEN),
        "up_proj": ("up_proj", HIDDEN, WIDE),
    },
}
BLOCKS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}


@pytest.fixture(params=PROJECTIONS)
def model_type(request):
    return request.param


@pytest.fixture
def make_folder(model_type, tmp_path):
    """Maker of a PEFT folder with two blocks of experts; ``change`` may alter its arrays and its configuration."""

    def make(change=lambda arrays, config: None):
        rng = np.random.default_rng(5)
        arrays = {}
        for layer in range(2):
            for name, (_, inputs, outputs) in PROJECTIONS[model_type].items():
                for expert in range(EXPERTS):
                    module = f"base_model.model.model.layers.{layer}.{BLOCKS[model_type]}.experts.{expert}.{name}"
                    arrays[f"{module}.lora_A.weight"] = mx.array(rng.standard_normal((RANK, inputs), np.float32))
                    arrays[f"{module}.lora_B.weight"] = mx.array(rng.standard_normal((outputs, RANK), np.float32))
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": list(PROJECTIONS[model_type])}
        change(arrays, config)
        folder = tmp_path / "peft"
        folder.mkdir()
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def described(model_type):
    return {"name": "base", "model_type": model_type, "num_layers": 2, "fingerprint": None}


def test_experts_become_one_stack_and_experts_again(make_folder, model_type, tmp_path):
    folder = make_folder()
    before = mx.load(str(folder / "adapter_model.safetensors"))
    adapter = from_peft(folder, described(model_type))
    assert adapter.spec.scale == 3.0
    for layer in range(2):
        for name, (ours, _, _) in PROJECTIONS[model_type].items():
            block = f"model.layers.{layer}.{BLOCKS[model_type]}"
            a, b = (adapter.weights[f"{block}.switch_mlp.{ours}.{leaf}"] for leaf in ("lora_a", "lora_b"))
            for expert in range(EXPERTS):
                module = f"base_model.model.{block}.experts.{expert}.{name}"
                assert mx.array_equal(a[expert], before[f"{module}.lora_A.weight"])
                assert mx.array_equal(b[expert], before[f"{module}.lora_B.weight"])
    saved = Adapter.load(adapter.save(tmp_path / "ours"))
    after = mx.load(str(to_peft(saved, "base", tmp_path / "back") / "adapter_model.safetensors"))
    assert after.keys() == before.keys()
    assert all(mx.array_equal(value, after[name]) for name, value in before.items())
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(PROJECTIONS[model_type])


def without(expert, leaves):
    def change(arrays, config):
        for name in [name for name in arrays if f".layers.1.{name.split('.')[5]}.experts.{expert}." in name]:
            if name.endswith(leaves):
                del arrays[name]

    return change


def wider(arrays, config):
    name = next(name for name in arrays if ".layers.0." in name and ".experts.1." in name and "lora_A" in name)
    arrays[name] = mx.zeros((RANK, arrays[name].shape[1] + 1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without(1, ("lora_A.weight", "lora_B.weight")), "has no gate_proj of expert 1, only of others"),
        (without(2, ("lora_B.weight",)), "experts.2.* has no lora_B.weight"),
        (wider, "the experts' gate_proj differ in rank, scale, shape or dtype"),
        (lambda a, c: c.update(alpha_pattern={r"experts\.0\..*": 9}), "differ in rank, scale, shape or dtype"),
        (lambda a, c: c["target_modules"].pop(), "configuration does not select .*experts.0"),
    ],
    ids=["one missing", "half of one", "another shape", "another scale", "not selected"],
)
def test_experts_that_do_not_go_together_are_refused(make_folder, model_type, change, expected):
    with pytest.raises(AdapterError, match=expected) as caught:
        from_peft(make_folder(change), described(model_type))
    assert "\n" not in str(caught.value)
