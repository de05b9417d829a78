"""Runs that begin with weights, score a test file, or adapt head and embedding, as mlx_lm.lora does."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.mlx_lm_rows import load_examples
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.training.layers import lora_layers, trainable
from mlx_rsgwm.training.loop import train
from mlx_rsgwm.training.losses import held_out_loss
from mlx_rsgwm.training.warm_start import WarmStart


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "train.jsonl"
    said = [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in said))
    return load_examples(path, True)


def test_a_run_begins_with_the_weights_and_is_scored_on_the_test_rows(base, config, rows, tmp_path):
    first = train(base, rows, config(steps=3, learning_rate=1e-2), rows)
    folder = first.save(tmp_path / "first")
    for place in (folder, folder / "adapters.safetensors"):
        again = train(
            base, rows, config(steps=1, learning_rate=1e-9), rows, warm_start=WarmStart.load(place), test=rows
        )
        assert again.manifest["held_out_loss"]["before"] == first.manifest["held_out_loss"]["after"]
        assert again.manifest["test_loss"]["draft"] == pytest.approx(first.manifest["held_out_loss"]["after"]["draft"])
        assert again.manifest["warm_start"]["hash"] == again.manifest["warm_start"]["hash"] != ""
        assert not again.init
        for name, value in again.weights.items():
            assert mx.allclose(value, first.weights[name], atol=1e-6)


def test_weights_that_do_not_fit_are_refused_and_layers_without_any_are_told(base, config, rows, tmp_path):
    folder = train(base, rows, config(steps=1)).save(tmp_path / "first")
    begin = WarmStart.load(folder)
    with pytest.raises(RsgwmError, match=r"v_proj.lora_a belongs to no layer that this run trains"):
        train(base, rows, config(steps=1, keys=("self_attn.q_proj",)), warm_start=begin)
    with pytest.raises(RsgwmError, match=r"has the shape \(32, 4\), the layer \(32, 2\)"):
        train(base, rows, config(steps=1, rank=2, alpha=4.0), warm_start=begin)
    with pytest.raises(RsgwmError, match=r"trained with scale 2, and this run has 4"):
        train(base, rows, config(steps=1, alpha=16.0), warm_start=begin)
    settings = config(keys=("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"))
    with lora_layers(base.model, settings.spec(), 1):
        assert "2 layers are not in it and start anew" in begin.put_into(base.model, settings.scale)[-1]
    for path, message in ((tmp_path / "none", "do not exist"), (tmp_path / "train.jsonl", "no .safetensors file")):
        with pytest.raises(RsgwmError, match=message):
            WarmStart.load(path)
    mx.save_safetensors(str(tmp_path / "nan.safetensors"), {"x.lora_a": mx.array([float("nan")])})
    with pytest.raises(RsgwmError, match=r"x\.lora_a has values that are not finite"):
        WarmStart.load(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("key", ["model.embed_tokens", "lm_head"])
def test_head_and_embedding_are_trained_as_mlx_lm_loads_them(config, rows, tmp_path, tiny_base, key):
    import shutil

    from mlx_lm.tuner.utils import load_adapters

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    settings = json.loads((folder / "config.json").read_text())
    if key == "lm_head":
        (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
        weights = mx.load(str(folder / "model.safetensors"))
        head = mx.array(np.random.default_rng(0).normal(0, 0.1, (320, 32)).astype(np.float32))
        mx.save_safetensors(str(folder / "model.safetensors"), {**weights, "lm_head.weight": head}, {"format": "pt"})
    base = load_base(str(folder), dtype="float32")
    chosen = config(steps=4, learning_rate=1e-2, keys=("self_attn.q_proj", key), num_layers=1)
    adapter = train(base, rows, chosen, rows)
    assert f"{key}.lora_a" in adapter.weights
    assert mx.abs(adapter.weights[f"{key}.lora_b"]).max().item() > 0
    assert adapter.manifest["held_out_loss"]["after"]["draft"] < adapter.manifest["held_out_loss"]["before"]["draft"]
    saved = adapter.save(tmp_path / "adapter")
    ids = mx.array([[5, 6, 7, 8]])
    slots = AdapterSlots(base)
    slots.load("a", Adapter.load(saved))
    slots.use("a")
    ours = base.model(ids)
    other = load_base(str(folder), dtype="float32")
    load_adapters(other.model, str(saved))
    other.model.eval()
    assert mx.allclose(ours, other.model(ids), atol=1e-5)
    token_rows, _ = rows.token_rows(base.tokenizer, 512, "drop")
    loss = held_out_loss(other.model, token_rows, 4)["draft"]
    assert loss == pytest.approx(adapter.manifest["held_out_loss"]["after"]["draft"], rel=1e-4)


def test_what_cannot_be_adapted_is_refused_by_name(base, config):
    for settings, message in (
        (config(keys=("lm_head",)), "no layer has a module lm_head; there are .*model.embed_tokens"),
        (config(keys=("model.embed_tokens",), fine_tune_type="dora"), "is an embedding; DoRA there cannot"),
        (config(keys=("model.norm",)), "model.norm is a RMSNorm"),
    ):
        with pytest.raises(RsgwmError, match=message), lora_layers(base.model, settings.spec(), 1):
            pass


def test_the_start_of_an_embedding_is_mlx_lms(base, config):
    with lora_layers(base.model, replace(config(keys=("model.embed_tokens",))).spec(), 1):
        shapes = {name: value.shape for name, value in trainable(base.model).items()}
    assert shapes == {"model.embed_tokens.lora_a": (320, 4), "model.embed_tokens.lora_b": (4, 32)}
    assert not any("lora" in name for name, _ in tree_flatten(base.model.parameters()))
