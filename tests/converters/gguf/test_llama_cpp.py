"""What llama.cpp itself computes with the models and adapters written here, against MLX.

The wheel of xllamacpp holds llama.cpp; llama-cpp-python has no wheels.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.fuse.fuse import fuse
from mlx_rsgwm.converters.gguf.adapter import to_gguf
from mlx_rsgwm.converters.gguf.vocabulary import PROBES
from mlx_rsgwm.converters.gguf.write import model_to_gguf
from mlx_rsgwm.converters.parity.mlx import apply_adapter
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base

pytest.importorskip("xllamacpp")
pytest.importorskip("torch")

PROMPTS = [[5, 9, 33, 70, 41, 100, 7], [3, 4], [200, 100, 50, 9, 9, 9, 31]]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]


def tolerance(architecture):
    """llama.cpp takes Gemma's GELU from a table of float16."""
    return 1e-2 if architecture.startswith("gemma") else 1e-4


def tokenizer():
    """GPT-2's, trained on the probes, with an end of text and a beginning."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(PROBES, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def ask(model, adapter=None, texts=(), plain=68):
    job = {
        "model": str(model),
        "adapter": str(adapter) if adapter else None,
        "prompts": PROMPTS,
        "texts": list(texts),
        "vocabulary": 260,
        "plain": plain,
    }
    command = [sys.executable, str(Path(__file__).with_name("ask_llama_cpp.py")), json.dumps(job)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    return np.array(found["logprobs"]), found["tokens"]


def logprobs(model):
    rows = np.stack([np.array(model(mx.array([prompt]))[0, -1].astype(mx.float32)) for prompt in PROMPTS])
    rows = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def adapter_of(layers):
    """Rank 4 on every linear layer, the head too where it is one, and an embedding that is not the head."""
    rng = np.random.default_rng(0)
    chosen = {name: one for name, one in layers.layers.items() if not (one.kind == "embedding" and layers.tied)}
    weights = {}
    for name, one in chosen.items():
        for leaf, shape in (("lora_a", (one.inputs, 4)), ("lora_b", (4, one.outputs))):
            weights[f"{name}.{leaf}"] = mx.array((0.2 * rng.standard_normal(shape)).astype(np.float32))
    return Adapter(LoraSpec(4, 1.7, 0.0, tuple(chosen), -1), weights)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_computes_what_mlx_does(model_of, tmp_path, architecture):
    folder = tmp_path / "model"
    model_of(architecture).save_pretrained(folder)
    words = tokenizer()
    words.save_pretrained(folder)
    model_to_gguf(folder, tmp_path / "m.gguf")
    base, layers = load_base(str(folder), dtype="float32"), read_base_layers(str(folder), folder)
    bare = logprobs(base.model)
    plain = words.convert_tokens_to_ids("a")
    found, _ = ask(tmp_path / "m.gguf", plain=plain)
    assert np.abs(found - bare).max() < tolerance(architecture)

    adapter = adapter_of(layers)
    saved = adapter.save(tmp_path / "adapter")
    to_gguf(adapter, layers, tmp_path / "a.gguf")
    apply_adapter(base.model, Adapter.load(saved), architecture)
    adapted = logprobs(base.model)
    assert np.abs(adapted - bare).max() > 1.0
    found, _ = ask(tmp_path / "m.gguf", tmp_path / "a.gguf", plain=plain)
    assert np.abs(found - adapted).max() < tolerance(architecture)

    if architecture in ("llama", "gemma2"):  # one whose rows are permuted, one whose norms are moved
        fuse(saved, str(folder), tmp_path / "fused")
        model_to_gguf(tmp_path / "fused", tmp_path / "f.gguf")
        found, tokens = ask(tmp_path / "f.gguf", texts=PROBES, plain=plain)
        assert np.abs(found - adapted).max() < tolerance(architecture)
        assert tokens == [words.encode(text) for text in PROBES]
