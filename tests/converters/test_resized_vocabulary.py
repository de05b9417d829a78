"""Vocabularies resized before training, embeddings saved on a packed base: kept, and fused as torch computes them."""

from __future__ import annotations

import json
import shutil
import warnings

import mlx.core as mx
import numpy as np
import pytest
from safetensors.torch import load_file

from mlx_rsgwm.bench.architecture_sizes import SIZES as TINY
from mlx_rsgwm.core.errors import AdapterError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.slots import AdapterSlots
from tests.converters.sides import invoke, mlx_logits, torch_base, torch_logits

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_torch_thread")
ROWS = 320
SIZES = {
    **TINY,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": ROWS,
}
BOTH = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
# name: (tied base, tokens added, rows after, PEFT's settings)
CASES = {
    "saved by PEFT itself, tied": (True, 3, 323, {"target_modules": ["q_proj"]}),
    "saved by PEFT itself": (False, 3, 323, {"target_modules": ["q_proj"]}),
    "both trained, tied": (True, 3, 384, BOTH),
    "both trained": (False, 3, 384, BOTH),
    "embedding trained, tied": (True, 1, 321, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "head trained, fewer rows": (False, 0, 300, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "fewer rows, tied": (True, 0, 300, {"target_modules": ["q_proj"]}),
    "padded alone": (False, 0, 384, {"target_modules": ["q_proj"]}),
    "LoRA on both, tied": (True, 3, 323, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "LoRA on the embedding, tied": (True, 3, 323, {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on both": (False, 3, 323, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, byte_level):
    made = {}

    def folder(tied):
        if tied not in made:
            torch.manual_seed(5)
            config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
            made[tied] = tmp_path_factory.mktemp("bases") / str(tied)
            transformers.LlamaForCausalLM(config).float().save_pretrained(made[tied])
            byte_level(made[tied])
        return made[tied]

    return folder


@pytest.fixture
def make(save_random_peft):
    def make(base, folder, rows, added, ids, **settings):
        """A random PEFT adapter on a resized base, with its tokenizer; torch's logits with what was saved."""
        options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_random_peft(torch_base(base, rows), folder, options)
            if added:
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(base))
                tokenizer.add_tokens([f"<|added {index}|>" for index in range(ROWS - len(tokenizer) + added)])
                tokenizer.eos_token = "<|added 0|>"
                tokenizer.save_pretrained(str(folder))
            return torch_logits(peft.PeftModel.from_pretrained(torch_base(base, rows), str(folder)), ids)

    return make


def largest(one, other):
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("name", CASES)
def test_a_resized_vocabulary_is_kept(make, name, bases, tmp_path):
    tied, added, rows, settings = CASES[name]
    base = bases(tied)
    ids = [1, 5, 9, 2, 33, 60, 41, 8, 255, 3, 17, min(rows, ROWS + added) - 1]
    expected = make(base, tmp_path / "peft", rows, added, ids, **settings)
    if name == "padded alone":
        transformers.AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(tmp_path / "peft"))
    converted = invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", base, "--verify")
    assert converted.exit_code == 0, converted.output
    assert f"{rows} rows" in converted.output
    fused = invoke("fuse", tmp_path / "mlx", "--out", tmp_path / "fused", "--base", base, "--quiet")
    assert fused.exit_code == 0, fused.output
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["vocab_size"] == rows
    assert largest(mlx_logits(tmp_path / "fused", ids), expected) < 1e-4
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "fused"), dtype=torch.float32)
    assert largest(torch_logits(loaded, ids), expected) < 1e-4
    if added:
        tokenizer = load_base(str(tmp_path / "fused"), "float32").tokenizer
        end = tokenizer.convert_tokens_to_ids("<|added 0|>")
        assert json.loads((tmp_path / "fused" / "config.json").read_text())["eos_token_id"] == [1, end]
        assert end in tokenizer.eos_token_ids
        assert max(tokenizer.get_vocab().values()) == ROWS + added - 1
    back = invoke("convert", "to-peft", tmp_path / "mlx", "--out", tmp_path / "back", "--base", base)
    assert back.exit_code == 0, back.output
    before, after = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "back" / "tokenizer.json").is_file() == (tmp_path / "peft" / "tokenizer.json").is_file()


def test_without_a_tokenizer_of_that_size_nothing_is_fused(make, bases, tmp_path):
    base = bases(False)
    make(base, tmp_path / "peft", 323, 0, [1], target_modules=["q_proj"])
    shutil.copytree(tmp_path / "peft", tmp_path / "old")
    transformers.AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(tmp_path / "old"))
    shutil.copytree(tmp_path / "peft", tmp_path / "many")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(base))
    tokenizer.add_tokens([f"<|added {index}|>" for index in range(ROWS - len(tokenizer) + 6)])
    tokenizer.save_pretrained(str(tmp_path / "many"))
    for name, text in (("peft", "no tokenizer.json"), ("old", "none of the added"), ("many", "has 326 tokens")):
        converted = invoke("convert", "from-peft", tmp_path / name, "--out", tmp_path / f"{name} mlx", "--base", base)
        assert converted.exit_code == 0, converted.output
        fused = invoke("fuse", tmp_path / f"{name} mlx", "--out", tmp_path / "fused", "--base", base)
        assert fused.exit_code == 2, fused.output
        assert text in fused.stderr
        assert not (tmp_path / "fused").exists()
    adapter = Adapter.load(tmp_path / "peft mlx")
    with pytest.raises(AdapterError, match="rsgwm fuse"):
        AdapterSlots(load_base(str(base), "float32")).load("a", adapter)
    parity = invoke("parity", tmp_path / "peft mlx", "--base", base)
    assert parity.exit_code == 2
    assert "rsgwm fuse" in parity.stderr


def test_a_head_that_was_not_saved_is_asked_for(make, bases, tmp_path):
    base = bases(False)
    make(base, tmp_path / "peft", 323, 0, [1], target_modules=["q_proj"])
    file = tmp_path / "peft" / "adapter_model.safetensors"
    arrays = {name: value for name, value in mx.load(str(file)).items() if "lm_head" not in name}
    mx.save_safetensors(str(file), arrays, {"format": "pt"})
    converted = invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", base)
    assert converted.exit_code == 2
    assert "without lm_head.weight" in converted.stderr
    assert "merge_and_unload" in converted.stderr
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(("tied", "rows"), [(True, ROWS), (False, ROWS), (False, 323)])
def test_an_embedding_saved_on_a_packed_base_is_dense_in_the_model(make, tied, rows, bases, tmp_path):
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    base = bases(tied)
    model, config = load_model(base)
    model, config = quantize_model(model, config, 32, 8)
    packed = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_model(packed, model)
    save_config(config, packed / "config.json")
    make(base, tmp_path / "peft", rows, rows - ROWS, [1], **BOTH)
    converted = invoke(
        "convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", packed, "--verify"
    )
    assert converted.exit_code == 0, converted.output
    fused = invoke("fuse", tmp_path / "mlx", "--out", tmp_path / "fused", "--base", packed, "--quiet", "--force")
    assert fused.exit_code == 0, fused.output
    arrays = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        dense = np.array(arrays[name].astype(mx.float32))
        assert np.array_equal(dense, saved[f"base_model.model.{name}"].numpy())
    assert "model.embed_tokens.scales" not in arrays
    assert "model.layers.0.mlp.up_proj.scales" in arrays
    assert load_base(str(tmp_path / "fused"), "float32").model(mx.array([[1, 5]])).shape[-1] == rows
