"""What the base, or whoever trained it, alone could say of an adapter of PEFT: refused where it is known, else told."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.peft.convert import convert_from_peft, to_peft
from mlx_rsgwm.converters.peft.fit import size_problems
from mlx_rsgwm.converters.peft.layout import PeftReading
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.models.adapter_sources import load_adapter


@pytest.fixture
def theirs(make_adapter, tiny_base, tmp_path):
    """A folder of PEFT alone, without what we put beside."""
    folder = to_peft(
        make_adapter(1, keys=("self_attn.q_proj", "self_attn.o_proj")), str(tiny_base), tmp_path / "theirs"
    )
    for file in (folder / "mlx_rsgwm").iterdir():
        file.unlink()
    (folder / "mlx_rsgwm").rmdir()
    return folder


def change_arrays(folder, change):
    file = folder / "adapter_model.safetensors"
    arrays = {name: change(name, mx.array(value)) for name, value in mx.load(str(file)).items()}
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, {"format": "pt"})


def set_keys(folder, **keys):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def notes(theirs, tiny_base, out, strict=False):
    reading = PeftReading(strict=strict)
    convert_from_peft(theirs, read_base_layers(str(tiny_base), tiny_base), out, reading)
    return reading.notes


def test_a_sound_one_is_told_nothing_of(theirs, tiny_base, tmp_path):
    assert not [note for note in notes(theirs, tiny_base, tmp_path / "ours") if "zero" in note or "saved" in note]


def test_a_name_that_saved_nothing_is_told_or_refused(theirs, tiny_base, tmp_path):
    set_keys(theirs, modules_to_save=["score"])
    assert [note for note in notes(theirs, tiny_base, tmp_path / "ours") if "score, of which nothing was saved" in note]
    with pytest.raises(RsgwmError, match="modules_to_save names score, and nothing of it was saved"):
        notes(theirs, tiny_base, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("saved", [[], ["model.layers.0.input_layernorm"]])
def test_a_saved_module_that_is_not_in_the_file_is_refused(theirs, tiny_base, tmp_path, saved):
    """PEFT asks for every module whose name ends so; what it held nobody could say."""
    arrays = mx.load(str(theirs / "adapter_model.safetensors"))
    parameters = mx.load(str(tiny_base / "model.safetensors"))
    arrays |= {f"base_model.model.{name}.weight": parameters[f"{name}.weight"] * 1.5 for name in saved}
    mx.eval(arrays)
    mx.save_safetensors(str(theirs / "adapter_model.safetensors"), arrays, {"format": "pt"})
    set_keys(theirs, modules_to_save=["norm"])
    with pytest.raises(
        RsgwmError, match=r"model\.norm was trained whole \(modules_to_save\), and is not in the file"
    ) as told:
        notes(theirs, tiny_base, tmp_path / "ours")
    assert ("layers.0.input_layernorm was" in str(told.value)) is not bool(saved)
    assert "layers.1.input_layernorm was" in str(told.value)
    assert not (tmp_path / "ours").exists()


def test_a_saved_module_that_is_the_bases_own_is_there(theirs, tiny_base, tmp_path):
    arrays = mx.load(str(theirs / "adapter_model.safetensors"))
    parameters = mx.load(str(tiny_base / "model.safetensors"))
    arrays["base_model.model.model.norm.weight"] = parameters["model.norm.weight"]
    mx.eval(arrays)
    mx.save_safetensors(str(theirs / "adapter_model.safetensors"), arrays, {"format": "pt"})
    set_keys(theirs, modules_to_save=["model.norm"])
    assert any("no change: model.norm.weight" in note for note in notes(theirs, tiny_base, tmp_path / "ours", True))


def test_a_lora_b_of_zeros_is_told(theirs, tiny_base, tmp_path):
    change_arrays(theirs, lambda name, value: value * 0 if "lora_B" in name else value)
    assert "it changes nothing: every lora_b is zero" in notes(theirs, tiny_base, tmp_path / "ours")


@pytest.mark.parametrize(
    ("factor", "told"), [(1.0, ", and its magnitudes are the base's"), (1.1, "; its magnitudes may")]
)
def test_dora_before_its_training_is_told(theirs, tiny_base, tmp_path, factor, told):
    """Magnitudes that are the norms of the base's rows: that they change nothing only the base can tell."""
    parameters = mx.load(str(tiny_base / "model.safetensors"))
    arrays = {}
    for name, value in mx.load(str(theirs / "adapter_model.safetensors")).items():
        arrays[name] = value * 0 if "lora_B" in name else value
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        norms = mx.linalg.norm(parameters[f"{module}.weight"].astype(mx.float32), axis=1)
        arrays[name.partition(".lora_")[0] + ".lora_magnitude_vector"] = norms * factor
    mx.eval(arrays)
    mx.save_safetensors(str(theirs / "adapter_model.safetensors"), arrays, {"format": "pt"})
    set_keys(theirs, use_dora=True)
    assert f"it changes nothing: every lora_b is zero{told}" in notes(theirs, tiny_base, tmp_path / "ours")


def test_the_direct_way_tells_the_same(theirs, tiny_base):
    """merge, ask and eval read a PEFT folder without converting it first."""
    said = []

    class Told(Progress):
        def message(self, text):
            said.append(text)

    set_keys(theirs, modules_to_save=["lm_head"])
    change_arrays(theirs, lambda name, value: value * 0 if "lora_B" in name else value)
    load_adapter(theirs, str(tiny_base), progress=Told())
    assert [text for text in said if "modules_to_save names lm_head, of which nothing was saved" in text]
    assert [text for text in said if "changes nothing, every lora_b is zero" in text]
    said.clear()
    load_adapter(theirs, str(tiny_base), lazy=True, progress=Told())  # as merge does
    assert [text for text in said if "modules_to_save names lm_head, of which nothing was saved" in text]


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_transposed_factor_is_refused(theirs, tiny_base, tmp_path, factor):
    """It has another shape unless the rank is the layer's width; a product transposed has transposed factors."""
    change_arrays(theirs, lambda name, value: mx.contiguous(value.T) if factor in name else value)
    with pytest.raises(RsgwmError, match="does not have rank"):
        notes(theirs, tiny_base, tmp_path / "ours")


def test_factors_of_other_sizes_than_the_base_has_are_not_written(make_adapter, tiny_base, tmp_path):
    """PEFT would refuse them; a damaged adapter of mlx-lm can have them."""
    adapter = replace(make_adapter(1), importance={}, init={})
    name = "model.layers.0.self_attn.q_proj.lora_a"
    adapter.weights[name] = adapter.weights[name][:-1]
    with pytest.raises(RsgwmError, match=r"q_proj: adapter is 31→32, the base's layer 32→32"):
        to_peft(adapter, str(tiny_base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_embeddings_factor_may_have_more_rows_than_the_base_and_none_less(make_adapter, tiny_base, tmp_path):
    layer = read_base_layers(str(tiny_base), tiny_base).layers["model.embed_tokens"]
    for rows, refused in ((layer.inputs - 1, True), (layer.inputs, False), (layer.inputs + 3, False)):
        adapter = replace(make_adapter(1), importance={}, init={})
        adapter.weights["model.embed_tokens.lora_a"] = mx.ones((rows, 4))
        adapter.weights["model.embed_tokens.lora_b"] = mx.ones((4, layer.outputs))
        assert bool(size_problems(adapter, read_base_layers(str(tiny_base), tiny_base))) is refused
        adapter.weights["model.embed_tokens.lora_b"] = mx.ones((4, layer.outputs + 1))
        assert size_problems(adapter, read_base_layers(str(tiny_base), tiny_base))


def test_magnitudes_of_another_size_than_the_outputs_are_refused(make_adapter):
    adapter = replace(make_adapter(1), importance={}, init={})
    adapter.spec = replace(adapter.spec, fine_tune_type="dora")
    outputs = {module: adapter.weights[f"{module}.lora_b"].shape[1] for module in adapter.modules()}
    adapter.weights |= {f"{module}.m": mx.ones(size) for module, size in outputs.items()}
    assert adapter.shape_problems() == []
    name = "model.layers.0.self_attn.v_proj"
    adapter.weights[f"{name}.m"] = mx.ones(15)
    assert adapter.shape_problems() == [f"{name}: m has shape (15,), and lora_b (4, 16)"]
