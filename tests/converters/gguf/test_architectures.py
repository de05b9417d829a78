"""GGUF files of other architectures, written here as llama.cpp does, against the torch model they are made of."""

from __future__ import annotations

import json

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.gguf.architectures import ARCHITECTURES
from mlx_rsgwm.converters.gguf.read import convert_gguf
from mlx_rsgwm.converters.gguf.write import model_to_gguf
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base import load_base

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

METADATA = {  # of the file, beyond what every architecture has
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"attention.sliding_window": 64, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"attention.sliding_window": 8, "rope.freq_base": 1e6},
    "phi2": {"rope.dimension_count": 6},
    "phi3": {},
}
NORMS = ("norm.weight", "layernorm.weight")


def write(path, architecture, model, metadata=None):
    """As convert_hf_to_gguf.py: names by gguf's own table, norms of Gemma plus one."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "phi2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    found = {**METADATA[architecture], **(metadata or {})}
    if "rope.freq_base" not in found:
        found["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
    for key, value in found.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<pad>", "<s>", "</s>", *byte_alphabet(), "he"])
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = value.numpy()
        if architecture.startswith("gemma") and name.endswith(NORMS):
            values = values + np.float32(1)
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_alphabet():
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(extra)) for byte in range(256)]


@pytest.mark.parametrize("architecture", METADATA)
def test_logits_are_those_of_the_model_it_was_made_of(model_of, tmp_path, architecture):
    model = model_of(architecture)
    out = convert_gguf(write(tmp_path / "a.gguf", architecture, model), tmp_path / "out")
    ids = np.random.default_rng(1).integers(3, 260, (2, 19))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    base = load_base(str(out), dtype="float32")
    assert np.abs(expected).max() > 0.5
    # mlx-lm computes the first Gemma's GELU exactly, transformers its approximation by tanh.
    tolerance = 1e-2 if architecture == "gemma" else 1e-4
    assert np.abs(np.array(base.model(mx.array(ids))) - expected).max() < tolerance
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == ARCHITECTURES[architecture].model_type
    assert config["tie_word_embeddings"] is bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("architecture", METADATA)
def test_transformers_reads_the_folder_too(model_of, tmp_path, architecture):
    model = model_of(architecture)
    out = convert_gguf(write(tmp_path / "a.gguf", architecture, model), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    ids = torch.arange(3, 22)[None]
    with torch.no_grad():
        assert (again(ids).logits - model(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", METADATA)
def test_the_way_out_writes_the_file_that_came_in(model_of, tmp_path, architecture):
    source = write(tmp_path / "a.gguf", architecture, model_of(architecture))
    model_to_gguf(convert_gguf(source, tmp_path / "out"), tmp_path / "b.gguf")
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "b.gguf")
    found = {tensor.name: tensor for tensor in after.tensors}
    assert found.keys() == {tensor.name for tensor in before.tensors}
    for tensor in before.tensors:
        assert tensor.tensor_type == found[tensor.name].tensor_type
        # Gemma's norms lose their one and get it back.
        assert np.allclose(tensor.data, found[tensor.name].data, rtol=0, atol=2e-7 if "norm" in tensor.name else 0)
    for key, field in before.fields.items():
        if not key.startswith("GGUF.") and key != "tokenizer.ggml.pre":  # "default" there, which is GPT-2's rule here
            assert after.fields[key].contents() == field.contents(), key


def test_a_tensor_too_many_and_one_too_few_are_named(model_of, tmp_path):
    model = model_of("qwen3")
    state = model.state_dict()
    model.state_dict = lambda: {name: value for name, value in state.items() if "layers.3.self_attn.q_norm" not in name}
    with pytest.raises(RsgwmError, match=r"tensor blk.3.attn_q_norm.weight is missing"):
        convert_gguf(write(tmp_path / "a.gguf", "qwen3", model), tmp_path / "out")
    gemma = model_of("gemma")
    more = {**gemma.state_dict(), "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    gemma.state_dict = lambda: more
    with pytest.raises(RsgwmError, match=r"tensor blk.0.attn_q.bias is unknown"):
        convert_gguf(write(tmp_path / "b.gguf", "gemma", gemma), tmp_path / "out")


def test_experts_and_long_contexts_are_refused(model_of, tmp_path):
    path = write(tmp_path / "a.gguf", "qwen2", model_of("qwen2"), {"expert_count": 4})
    with pytest.raises(RsgwmError, match="mixture of experts"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.parametrize("dimensions", [5, 18])
def test_a_rotation_that_no_head_has_is_refused(model_of, tmp_path, dimensions):
    path = write(tmp_path / "a.gguf", "phi2", model_of("phi2"), {"rope.dimension_count": dimensions})
    with pytest.raises(RsgwmError, match=f"rope.dimension_count is {dimensions}, of a head's 16"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_partial_rotation_that_transformers_saved_is_heeded(model_of, tmp_path):
    """transformers 5 puts the factor into ``rope_parameters``, where mlx-lm does not look for it."""
    model = model_of("phi2")
    convert_gguf(write(tmp_path / "a.gguf", "phi2", model), tmp_path / "out")  # for a tokenizer
    model.save_pretrained(tmp_path / "out")
    assert "partial_rotary_factor" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = torch.arange(3, 22)[None]
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    found = load_base(str(tmp_path / "out"), dtype="float32").model(mx.array(ids.numpy()))
    assert np.abs(np.array(found) - expected).max() < 1e-4
