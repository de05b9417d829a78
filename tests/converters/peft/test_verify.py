"""The proof of a conversion: what is right passes, and every planted fault is caught with its first layer named."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.peft.convert import from_peft, to_peft
from mlx_rsgwm.converters.peft.verify import compare_folders, require_equal
from mlx_rsgwm.core.errors import CheckFailed
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

KEYS = ("self_attn.q_proj", "self_attn.v_proj")  # square, so that swapped factors have legal shapes; and not
RANK = 4


def make_adapter(dtype=mx.float32, layers=12, experts=False, dora=False):
    rng = np.random.default_rng(0)

    def random(*shape):
        return mx.array((0.2 * rng.standard_normal(shape)).astype(np.float32)).astype(dtype)

    weights = {}
    for layer in range(layers):
        for key, outputs in zip(KEYS, (16, 8), strict=True):
            module = f"model.layers.{layer}.{key}"
            weights |= {f"{module}.lora_a": random(16, RANK), f"{module}.lora_b": random(RANK, outputs)}
            if dora:
                weights[f"{module}.m"] = mx.abs(random(outputs)) + 1
        if experts:
            for name, inputs, outputs in (("gate", 16, 6), ("up", 16, 6), ("down", 6, 16)):
                module = f"model.layers.{layer}.mlp.switch_mlp.{name}_proj"
                weights |= {f"{module}.lora_a": random(3, RANK, inputs), f"{module}.lora_b": random(3, outputs, RANK)}
    spec = LoraSpec(RANK, 2.0, 0.0, KEYS, -1, "dora" if dora else "lora")
    return Adapter(spec, weights, manifest={"base": {"name": "b", "num_layers": layers}})


@pytest.fixture
def folders(tmp_path):
    make_adapter().save(tmp_path / "ours")
    return to_peft(Adapter.load(tmp_path / "ours"), "b", tmp_path / "peft"), tmp_path / "ours"


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": mx.bfloat16}, {"dtype": mx.float16}, {"experts": True}, {"dora": True}]
)
def test_a_right_conversion_passes(tmp_path, settings):
    adapter = make_adapter(layers=2, **settings)
    adapter.save(tmp_path / "ours")
    to_peft(adapter, "b", tmp_path / "peft")
    assert compare_folders(tmp_path / "peft", tmp_path / "ours") == (len(adapter.modules()), [])
    from_peft(tmp_path / "peft").save(tmp_path / "back")
    assert require_equal(tmp_path / "peft", tmp_path / "back") == len(adapter.modules())


# --- faults planted in the MLX folder ---------------------------------------------------------------------------


def edit(folder, change):
    path = folder / "adapters.safetensors"
    mx.save_safetensors(str(path), change(dict(mx.load(str(path)))), {"format": "mlx"})


def edit_config(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def set_scale(peft, ours, scale):
    parameters = {"rank": RANK, "scale": scale, "dropout": 0.0, "keys": list(KEYS)}
    edit_config(ours / "adapter_config.json", lora_parameters=parameters)


def changed(name, function):
    return lambda peft, ours: edit(ours, lambda arrays: {**arrays, name: function(arrays[name])})


def swap(arrays):
    """A where B belongs and the reverse, where shapes allow."""
    other = {"lora_a": "lora_b", "lora_b": "lora_a"}
    return {
        name: arrays[f"{name[:-6]}{other[name[-6:]]}"].T if "q_proj" in name else value
        for name, value in arrays.items()
    }


def without(part):
    return lambda peft, ours: edit(ours, lambda arrays: {n: v for n, v in arrays.items() if part not in n})


L10 = "model.layers.10.self_attn.v_proj"
FIRST = "model.layers.0.self_attn.q_proj"
FAULTS = {
    "missing transpose": (changed(f"{L10}.lora_a", lambda a: a.T.reshape(a.shape)), L10, "of their size"),
    "everything untransposed": (
        lambda peft, ours: edit(ours, lambda arrays: {n: v.T.reshape(v.shape) for n, v in arrays.items()}),
        FIRST,
        "of their size",
    ),
    "alpha for alpha/r": (lambda peft, ours: set_scale(peft, ours, 8.0), FIRST, "4 times that in PEFT"),
    "one layer dropped": (without("layers.10."), "model.layers.10.self_attn.q_proj", "only the PEFT folder"),
    "one layer too many": (
        lambda peft, ours: edit(
            ours, lambda a: a | {f"model.layers.2.mlp.up_proj.lora_{x}": mx.ones((4, 4)) for x in "ab"}
        ),
        "model.layers.2.mlp.up_proj",
        "only the MLX folder",
    ),
    "A and B swapped": (lambda peft, ours: edit(ours, swap), FIRST, "of their size"),
    "rsLoRA ignored": (
        lambda peft, ours: edit_config(peft / "adapter_config.json", use_rslora=True),
        FIRST,
        "0.5 times that in PEFT (scale 2 against 4)",
    ),
    "one NaN": (changed(f"{L10}.lora_b", lambda b: mx.where(mx.arange(8) == 3, mx.nan, b)), L10, "not finite in MLX"),
    "one zeroed module": (changed(f"{L10}.lora_b", mx.zeros_like), L10, "zero in MLX, not in PEFT"),
    "dtype truncated": (
        changed(f"{L10}.lora_a", lambda a: a.astype(mx.bfloat16)),
        L10,
        "of their size",
    ),
    "dtype widened": (
        lambda peft, ours: edit(ours, lambda arrays: {n: v.astype(mx.float16) for n, v in arrays.items()}),
        FIRST,
        "",
    ),
    "last bit": (
        changed(f"{L10}.lora_a", lambda a: mx.where(mx.arange(4) == 0, a * (1 + 2**-23), a)),
        L10,
        "not the same bits in lora_a",
    ),
    "two layers exchanged": (
        lambda peft, ours: edit(
            ours,
            lambda a: {n.replace(".3.", ".#.").replace(".4.", ".3.").replace(".#.", ".4."): v for n, v in a.items()},
        ),
        "model.layers.3.self_attn.q_proj",
        "of their size",
    ),
}


@pytest.mark.parametrize(("plant", "module", "what"), FAULTS.values(), ids=list(FAULTS))
def test_a_planted_fault_is_caught_and_its_first_layer_named(folders, plant, module, what):
    plant(*folders)
    _, differences = compare_folders(*folders)
    assert differences[0].module == module
    assert what in differences[0].what
    with pytest.raises(CheckFailed, match=rf"are not the same adapter: {module}: "):
        require_equal(*folders)


def test_a_magnitude_that_differs_is_named(tmp_path):
    adapter = make_adapter(layers=2, dora=True)
    to_peft(adapter, "b", tmp_path / "peft")
    adapter.weights["model.layers.1.self_attn.q_proj.m"] += 1
    adapter.save(tmp_path / "ours")
    found = compare_folders(tmp_path / "peft", tmp_path / "ours")[1]
    assert [str(one) for one in found] == ["model.layers.1.self_attn.q_proj: its m differs"]


def test_experts_in_another_order_are_caught(tmp_path):
    adapter = make_adapter(layers=1, experts=True)
    to_peft(adapter, "b", tmp_path / "peft")
    name = "model.layers.0.mlp.switch_mlp.up_proj.lora_b"
    adapter.weights[name] = adapter.weights[name][mx.array([0, 2, 1])]
    adapter.save(tmp_path / "ours")
    found = compare_folders(tmp_path / "peft", tmp_path / "ours")[1]
    assert found[0].module == "model.layers.0.mlp.switch_mlp.up_proj"
    assert "of expert 1" in found[0].what


def test_the_command_says_what_it_found(folders):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    peft, ours = map(str, folders)
    good = CliRunner().invoke(rsgwm, ["convert", "check", peft, ours, "--json"])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout.splitlines()[-1])["modules"] == 24
    set_scale(*folders, 3.0)
    manifest = folders[1] / "manifest.json"
    manifest.unlink()  # it would say that the folder was changed, which is another check
    bad = CliRunner().invoke(rsgwm, ["convert", "check", peft, ours])
    assert bad.exit_code == 3
    assert f"{FIRST}: the update in MLX is 1.5 times" in bad.stderr
