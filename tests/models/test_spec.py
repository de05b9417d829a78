"""mlx-lm's configurations of every age: read with the meaning they had, or asked about where they mean two things."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.parity.mlx import apply_adapter
from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.spec import LoraSpec

OLD = {"lora_layers": 16, "lora_parameters": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "scale": 10.0}}


def run(*arguments):
    return CliRunner().invoke(rsgwm, [str(one) for one in arguments])


def write(folder, config):
    """An mlx-lm folder of the tiny base's queries with this configuration."""
    rng = np.random.default_rng(0)
    weights = {}
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.q_proj"
        weights[f"{module}.lora_a"] = mx.array(rng.normal(size=(32, 8)).astype(np.float32))
        weights[f"{module}.lora_b"] = mx.array(rng.normal(size=(8, 32)).astype(np.float32))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def parameters(**fields):
    return {"rank": 8, "scale": 10.0, "keys": ["self_attn.q_proj"], **fields}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_layers": 2, "lora_parameters": parameters()}, (10.0, 0.0, 2, "lora")),  # no dropout
        ({"lora_parameters": parameters(dropout=0.1)}, (10.0, 0.1, -1, "lora")),  # no number of layers
        ({"lora_layers": 4, "lora_parameters": parameters()}, (10.0, 0.0, 4, "lora")),  # 0.14.2 to 0.18
        ({"lora_layers": 4, "use_dora": True, "lora_parameters": parameters()}, (10.0, 0.0, 4, "dora")),
        ({"lora_layers": 4, "use_dora": False, "lora_parameters": parameters(alpha=8)}, (10.0, 0.0, 4, "lora")),
        ({"num_layers": 4, "lora_parameters": parameters(alpha=16)}, (10.0, 0.0, 4, "lora")),  # alpha left in a YAML
        ({"num_layers": 4, "fine_tune_type": "full", "lora_parameters": None}, (1.0, 0.0, 4, "full")),
    ],
)
def test_a_configuration_has_the_meaning_it_had(config, expected):
    spec = LoraSpec.from_config(config, "adapter_config.json")
    assert (spec.scale, spec.dropout, spec.num_layers, spec.fine_tune_type) == expected


@pytest.mark.parametrize("alpha", [16.0, 4, 32])
def test_an_alpha_of_an_old_version_is_asked_about(alpha):
    config = {"lora_layers": 16, "lora_parameters": parameters(alpha=alpha)}
    older = 10 * alpha / 8
    with pytest.raises(AdapterError, match=rf"{older:g}, later versions by scale = 10.*--scale {older:g} \(or 10\)"):
        LoraSpec.from_config(config, "old/adapter_config.json")
    assert LoraSpec.from_config(config, "x", older).scale == older
    assert LoraSpec.from_config(config, "x", 10).scale == 10
    with pytest.raises(AdapterError, match=f"{older:g} or 10, not 7"):
        LoraSpec.from_config(config, "x", 7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_layers": 16, "lora_parameters": {"rank": 8, "alpha": 16}},
        {"lora_layers": 16, "lora_parameters": parameters(alpha="16 or so")},
        {"lora_layers": 16, "lora_parameters": parameters(alpha=16, rank=0)},
        {"lora_layers": None, "lora_parameters": parameters()},
        {"lora_layers": "all", "lora_parameters": parameters()},
        {"lora_layers": 16, "lora_parameters": parameters(alpha=[16])},
        {"lora_layers": 16, "lora_parameters": parameters(scale=True)},
        {"num_layers": 2, "lora_parameters": [8, 10.0]},
        {"num_layers": 2, "fine_tune_type": "ia3", "lora_parameters": parameters()},
    ],
)
def test_a_wrong_configuration_is_one_line_with_its_file(wrong):
    with pytest.raises(AdapterError, match=r"^here\.json: [^\n]*$"):
        LoraSpec.from_config(wrong, "here.json")


@pytest.mark.parametrize("name", ["rank", "scale", "dropout"])
@pytest.mark.parametrize("value", [None, [8], {}, True, "eight", "nan"])
def test_what_is_no_number_is_told_by_name(name, value):
    config = {"num_layers": 2, "lora_parameters": {**parameters(), name: value}}
    with pytest.raises(AdapterError, match=rf"^a\.json: {name} must be a number, found {re.escape(repr(value))}$"):
        LoraSpec.from_config(config, "a.json")
    with pytest.raises(AdapterError, match=r"^a\.json: num_layers must be a number, found None$"):
        LoraSpec.from_config({"num_layers": None, "lora_parameters": parameters()}, "a.json")


@pytest.mark.parametrize("alpha", [0, float("nan"), "inf"])
def test_an_alpha_that_no_version_could_train_with_is_not_offered(alpha):
    assert LoraSpec.from_config({"lora_layers": 16, "lora_parameters": parameters(alpha=alpha)}, "x").scale == 10


def test_the_command_that_is_named_can_be_pasted():
    with pytest.raises(AdapterError, match=r"from-mlx 'my adapters/old' OUT"):
        LoraSpec.from_config({"lora_parameters": parameters(alpha=2)}, "my adapters/old/adapter_config.json")


@pytest.mark.parametrize("value", [4.5, "4.5", 0.5])
def test_whole_numbers_are_not_cut_off(value):
    for config in (
        {"num_layers": 2, "lora_parameters": {**parameters(), "rank": value}},
        {"num_layers": value, "lora_parameters": parameters()},
    ):
        with pytest.raises(
            AdapterError, match=rf"^a\.json: (rank|num_layers) must be a whole number, found {value!r}$"
        ):
            LoraSpec.from_config(config, "a.json")
    written = {"num_layers": "2", "lora_parameters": {**parameters(), "rank": 8.0}}
    assert LoraSpec.from_config(written, "a.json").rank == 8


def test_every_command_asks_and_from_mlx_answers(tiny_base, tmp_path):
    old = write(tmp_path / "old", {**OLD, "lora_parameters": {**OLD["lora_parameters"], "keys": ["self_attn.q_proj"]}})
    out = tmp_path / "out"
    for command in (
        ("convert", "to-peft", old, "--out", out, "--base", tiny_base),
        ("convert", "to-gguf", old, "--out", out, "--base", tiny_base),
        ("convert", "from-mlx", old, "--out", out),
        ("fuse", old, "--out", out, "--base", tiny_base),
        ("parity", old, "--base", tiny_base),
        ("merge", old, old, "--method", "linear", "--out", out),
    ):
        result = run(*command)
        assert result.exit_code == 2, (command, result.output)
        assert "--scale 20 (or 10)" in result.output
        assert not out.exists()
    result = run("convert", "from-mlx", old, "--out", out, "--scale", 20)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    }
    before, after = (mx.load(str(folder / "adapters.safetensors")) for folder in (old, out))
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert run("convert", "to-peft", out, "--out", tmp_path / "peft", "--base", tiny_base).exit_code == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 160


@pytest.mark.parametrize("config", [{"num_layers": 2}, {"lora_layers": 2}, {}])
def test_fields_that_mlx_lm_needs_today_are_supplied(config, tiny_base, tmp_path):
    """mlx-lm's own loading fails without num_layers or dropout; the logits are those of W + 10 (A B)ᵀ."""
    folder = write(tmp_path / "adapter", {**config, "lora_parameters": parameters()})
    base = load_base(str(tiny_base), "float32")
    adapter = Adapter.load(folder)
    ids = mx.array([[3, 9, 40, 41, 7]])
    expected = load_base(str(tiny_base), "float32").model
    for layer, block in enumerate(expected.layers):
        a, b = (adapter.weights[f"model.layers.{layer}.self_attn.q_proj.lora_{side}"] for side in "ab")
        block.self_attn.q_proj.weight = block.self_attn.q_proj.weight + 10 * (a @ b).T
    apply_adapter(base.model, adapter, "tiny")
    assert mx.allclose(base.model(ids), expected(ids), rtol=1e-4, atol=1e-4)
    assert run("fuse", folder, "--out", tmp_path / "out", "--base", tiny_base).exit_code == 0
