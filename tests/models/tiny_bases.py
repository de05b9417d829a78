"""Folders of a tiny random Llama, to be changed and broken, and what a refusal of one must be."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.safetensors_io import write_safetensors
from mlx_rsgwm.models.base import load_base

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_tiny_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(33, 126))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )
    wrapped.save_pretrained(folder)


def tiny_model(config=CONFIG):
    from mlx_lm.models import llama

    mx.random.seed(7)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model


def write_folder(folder, config=CONFIG, arrays=None):
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", config)
    write_safetensors(folder / "model.safetensors", arrays or dict(tree_flatten(tiny_model().parameters())))
    save_tiny_tokenizer(folder)
    return folder


def refused(name, *words):
    """Resolving or loading ``name`` ends in one line that holds all of ``words``."""
    with pytest.raises(RsgwmError) as caught:
        load_base(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def edit_config(folder, **changes):
    config = files.read_json_object(folder / "config.json")
    files.write_json(folder / "config.json", {**config, **changes})
