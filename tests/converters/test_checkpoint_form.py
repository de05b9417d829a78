"""A fused model is a checkpoint as its base is one: torch computes with it what mlx-lm does."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.checkpoint_form import save_checkpoint
from mlx_rsgwm.converters.fuse.fuse import fuse
from mlx_rsgwm.converters.peft.convert import convert_from_peft
from mlx_rsgwm.models.adapter import Adapter

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from mlx_rsgwm.bench import architectures as sweep  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.filterwarnings("ignore")]
# Renamed and transposed; single experts; multiplied; shifted norms; stacked experts that mlx-lm splits in two.
TRAINED = {
    "gpt2": {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj", "ln_f"], "fan_in_fan_out": True},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "falcon_h1": {"target_modules": ["in_proj", "o_proj", "gate_proj"], "modules_to_save": ["lm_head"]},
    "qwen3_next": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "input_layernorm"]},
    "deepseek_v3": {"target_modules": ["q_a_proj", "o_proj", "down_proj"]},
    "granitemoe": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
}


def make_adapter(base, folder, **settings):
    """A random adapter of PEFT's and ours; torch's logits with it."""
    expected = sweep.random_peft(sweep.load_torch_base(base, "cpu", "float32"), folder / "peft", **settings)
    convert_from_peft(folder / "peft", read_base_layers(str(base), base), folder / "ours")
    return expected


def torch_logits(folder):
    return sweep.torch_logits(sweep.load_torch_base(folder, "cpu", "float32"))


def difference(one, other):
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("name", TRAINED)
def test_torch_computes_what_mlx_does(name, base_of, tmp_path):
    expected = make_adapter(base_of(name), tmp_path, **TRAINED[name])
    result = fuse(tmp_path / "ours", str(base_of(name)), tmp_path / "fused")
    assert result["form"] == "transformers"
    assert difference(sweep.mlx_logits(tmp_path / "fused"), expected) < 1e-5
    assert difference(torch_logits(tmp_path / "fused"), expected) < 1e-5
    assert difference(torch_logits(base_of(name)), expected) > 0.01
    before, after = (mx.load(str(one / "model.safetensors")) for one in (base_of(name), tmp_path / "fused"))
    assert before.keys() == after.keys()
    same = [key for key in before if mx.array_equal(before[key], after[key]).item()]
    assert len(same) > len(before) / 3  # what is not adapted is the base's own


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_another_float_type(target, base_of, tmp_path):
    expected = make_adapter(base_of("mixtral"), tmp_path, **TRAINED["mixtral"])
    fuse(tmp_path / "ours", str(base_of("mixtral")), tmp_path / "fused", target=target)
    arrays = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert {value.dtype for value in arrays.values()} == {getattr(mx, target)}
    assert difference(torch_logits(tmp_path / "fused"), expected) < 0.05


@pytest.mark.parametrize(
    ("name", "form"), [("mixtral", "transformers"), ("gpt2", "transformers"), ("falcon_h1", "mlx-lm")]
)
@pytest.mark.parametrize("bits", [0, 8])
def test_a_base_that_mlx_lm_saved(name, form, bits, base_of, tmp_path):
    """Its own checkpoint is not here: its names are undone, but nothing is divided or subtracted."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(base_of(name), model_config={"rope_theta": 1e11} if name == "falcon_h1" else None)
    if bits:
        model, config = quantize_model(model, config, 32, bits)
    save_model(tmp_path / "mlx", model)
    save_config(config, tmp_path / "mlx" / "config.json")
    for file in base_of(name).glob("tokenizer*"):
        (tmp_path / "mlx" / file.name).write_bytes(file.read_bytes())
    settings = {key: value for key, value in TRAINED[name].items() if key != "modules_to_save"}
    make_adapter(base_of(name), tmp_path, **settings)
    (tmp_path / "ours" / "manifest.json").unlink()  # of the same base in another form
    result = fuse(tmp_path / "ours", str(tmp_path / "mlx"), tmp_path / "fused", target="float32" if bits else "keep")
    assert result["form"] == form, result
    assert ("multiplied" in result.get("form_reason", "")) == (form == "mlx-lm")
    expected = sweep.mlx_logits(tmp_path / "mlx", tmp_path / "ours")
    assert difference(sweep.mlx_logits(tmp_path / "fused"), expected) < 1e-4
    if form == "transformers":
        assert difference(torch_logits(tmp_path / "fused"), expected) < 1e-4


def test_what_mlx_lm_has_no_use_for_stays(base_of, tmp_path):
    """The tower of a model of images, and its part of config.json."""
    make_adapter(base_of("qwen3_5"), tmp_path, target_modules=["q_proj"])
    fuse(tmp_path / "ours", str(base_of("qwen3_5")), tmp_path / "fused")
    before, after = (mx.load(str(one / "model.safetensors")) for one in (base_of("qwen3_5"), tmp_path / "fused"))
    assert before.keys() == after.keys()
    assert any("visual" in name for name in after)
    before, after = (json.loads((one / "config.json").read_text()) for one in (base_of("qwen3_5"), tmp_path / "fused"))
    assert after["vision_config"] == before["vision_config"]


def test_a_stored_copy_of_the_embedding_does_not_survive_as_a_head(base_of, tmp_path):
    import shutil

    base = shutil.copytree(base_of("qwen3"), tmp_path / "base")
    arrays = mx.load(str(base / "model.safetensors"))
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    mx.save_safetensors(str(base / "model.safetensors"), arrays, {"format": "pt"})
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    expected = make_adapter(base, tmp_path, **settings)
    assert list(Adapter.load(tmp_path / "ours").full) == ["model.embed_tokens.weight"]
    fuse(tmp_path / "ours", str(base), tmp_path / "fused")
    assert difference(sweep.mlx_logits(tmp_path / "fused"), expected) < 1e-5
    assert difference(torch_logits(tmp_path / "fused"), expected) < 1e-5


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    import mlx_lm.utils

    monkeypatch.setattr(mlx_lm.utils, "make_shards", lambda arrays: [{name: value} for name, value in arrays.items()])
    save_checkpoint({"a": mx.arange(3.0), "b": mx.arange(5.0)}, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 32
    for name, size in (("a", 3), ("b", 5)):
        assert mx.load(str(tmp_path / index["weight_map"][name]))[name].shape == (size,)
