"""InternLM2, whose embedding and head have names of their own: a Llama under other names is what torch computes.

transformers has it as custom code only, which is never run.
"""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mlx_rsgwm.bench.architecture_sizes import SIZES as TINY
from mlx_rsgwm.models.base import load_base
from tests.converters.sides import run

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_torch_thread")
IDS = [1, 5, 9, 2, 33, 60, 41, 8, 255, 3, 17]
ROWS, HEAD_DIM = 320, 8
SIZES = {**TINY, "num_hidden_layers": 1, "vocab_size": ROWS}
NAMES = {
    "o_proj": "wo",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "self_attn": "attention",
    "mlp": "feed_forward",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}
FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
TRAINED = {
    "LoRA on the head": (True, ROWS, {"target_modules": ["gate_proj", "lm_head"]}),
    "head saved": (True, ROWS, {"target_modules": ["gate_proj"], "modules_to_save": ["lm_head"]}),
    "both saved": (True, ROWS, {"target_modules": ["gate_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "LoRA on both, untied": (False, ROWS, {"target_modules": ["gate_proj", "embed_tokens", "lm_head"]}),
    "resized, tied": (True, 323, {"target_modules": ["gate_proj"]}),
    "resized": (False, 384, {"target_modules": ["gate_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}


def renamed(name):
    return ".".join(NAMES.get(part, part) for part in name.split("."))


def save_internlm2(llama, folder):
    """The arrays of ``llama`` as InternLM2 has them, in two shards: for every key head its queries, key and value."""
    arrays = load_file(llama / "model.safetensors")
    prefix = "model.layers.0.self_attn"
    query, key, value = (arrays.pop(f"{prefix}.{name}_proj.weight") for name in "qkv")
    heads = [matrix.view(2, -1, HEAD_DIM, 32) for matrix in (query, key, value)]
    made = {renamed(name): array for name, array in arrays.items()}
    made[f"{renamed(prefix)}.wqkv.weight"] = torch.cat(heads, 1).reshape(-1, 32).contiguous()
    folder.mkdir()
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(made))}
    for file in set(places.values()):
        save_file({name: made[name] for name in made if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = json.loads((llama / "config.json").read_text())
    kept = {name: config[name] for name in (*FIELDS, "rms_norm_eps", "vocab_size", "tie_word_embeddings")}
    kept |= {"model_type": "internlm2", "bias": False, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(kept))


def rename_adapter(folder):
    file = folder / "adapter_model.safetensors"
    save_file({renamed(name): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    for field in ("target_modules", "modules_to_save"):
        config[field] = config[field] and [renamed(name) for name in config[field]]
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", TRAINED)
def test_internlm2_is_converted_and_fused(name, byte_level, save_random_peft, tmp_path):
    tied, rows, settings = TRAINED[name]
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).float().save_pretrained(tmp_path / "llama")
    save_internlm2(tmp_path / "llama", tmp_path / "base")
    byte_level(tmp_path / "base")

    def torch_base():
        model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "llama"), dtype=torch.float32)
        if rows != ROWS:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model.eval()

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
        save_random_peft(torch_base(), tmp_path / "peft", options)
        adapted = peft.PeftModel.from_pretrained(torch_base(), str(tmp_path / "peft")).eval()
        expected = adapted(input_ids=torch.tensor([IDS])).logits[0].numpy()
    rename_adapter(tmp_path / "peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "base"))
    tokenizer.add_tokens([f"<|added {index}|>" for index in range(rows - len(tokenizer))])
    tokenizer.save_pretrained(str(tmp_path / "peft"))
    run("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", tmp_path / "base", "--verify")
    run("fuse", tmp_path / "mlx", "--out", tmp_path / "fused", "--base", tmp_path / "base", "--quiet")
    fused = load_base(str(tmp_path / "fused"), "float32").model(mx.array([IDS]))[0]
    assert float(np.abs(np.array(fused) - expected).max()) < 1e-4
    run("convert", "to-peft", tmp_path / "mlx", "--out", tmp_path / "back", "--base", tmp_path / "base")
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
