"""Models of text and images whose vocabulary was resized, or whose head was trained apart: vocab_size stands inside."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from safetensors.torch import load_file

from mlx_rsgwm.bench.architecture_sizes import SIZES as TINY
from mlx_rsgwm.bench.architecture_sizes import VISION
from tests.converters.sides import mlx_logits, run, torch_base, torch_logits

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_torch_thread")
AUTO_CLASS, ROWS = "AutoModelForImageTextToText", 320
TEXT = {**TINY, "num_hidden_layers": 1, "vocab_size": ROWS}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# class: (text_config, vision_config); the second has other names for the language model than mlx-lm, the third a
# vocab_size of its own in mlx-lm
KINDS = {
    "Qwen3VL": ({**TEXT, **MROPE}, {**VISION, "deepstack_visual_indexes": []}),
    "Qwen2VL": (
        {**{key: value for key, value in TEXT.items() if key != "head_dim"}, **MROPE},
        {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14},
    ),
    "Gemma3": (
        {**TEXT, "num_hidden_layers": 6, "sliding_window": 32, "query_pre_attn_scalar": 8},
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
}
QUERIES = r".*language_model.*q_proj"
# what was trained: (rows after, PEFT's settings)
TRAINED = {
    "resized": (323, {"target_modules": QUERIES}),
    "resized and both trained": (384, {"target_modules": QUERIES, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "head apart": (ROWS, {"target_modules": QUERIES + "|lm_head"}),
}
CASES = [*((kind, "resized") for kind in KINDS), ("Qwen2VL", "resized and both trained"), ("Qwen2VL", "head apart")]


def save_base(kind, folder, byte_level):
    text, vision = KINDS[kind]
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "tie_word_embeddings": True}, vision_config=vision, tie_word_embeddings=True
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float()
    model.save_pretrained(folder, max_shard_size="40KB")
    byte_level(folder)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_vocabulary_inside_text_config(kind, name, byte_level, save_random_peft, tmp_path):
    base, (rows, settings) = tmp_path / "base", TRAINED[name]
    save_base(kind, base, byte_level)
    assert "vocab_size" not in json.loads((base / "config.json").read_text())
    ids = [1, 5, 9, 2, 33, 60, 41, 8, 255, rows - 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
        save_random_peft(
            torch_base(base, rows, AUTO_CLASS), tmp_path / "peft", options, save_embedding_layers=rows != ROWS
        )
        expected = torch_logits(
            peft.PeftModel.from_pretrained(torch_base(base, rows, AUTO_CLASS), str(tmp_path / "peft")), ids
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(base))
    tokenizer.add_tokens([f"<|added {index}|>" for index in range(rows - len(tokenizer))])
    tokenizer.save_pretrained(str(tmp_path / "peft"))
    run("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", base, "--verify")
    run("fuse", tmp_path / "mlx", "--out", tmp_path / "fused", "--base", base, "--quiet")
    # mlx-lm rounds Gemma 3's embedding scale to bfloat16: its bare base is that far from torch already.
    bound = (
        1e-4
        if kind != "Gemma3"
        else 2 * largest(mlx_logits(base, ids[:-1]), torch_logits(torch_base(base, kind=AUTO_CLASS), ids[:-1]))
    )
    assert bound < 5e-3
    assert largest(mlx_logits(tmp_path / "fused", ids), expected) < bound
    assert largest(torch_logits(torch_base(tmp_path / "fused", kind=AUTO_CLASS), ids), expected) < 1e-4
    run("convert", "to-peft", tmp_path / "mlx", "--out", tmp_path / "back", "--base", base)
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def largest(values, expected):
    return float(np.abs(values - expected).max())
