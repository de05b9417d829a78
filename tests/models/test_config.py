"""What config.json means reaches mlx-lm, is corrected, or is refused: logits of tiny random models against torch."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.bench.architecture_sizes import SIZES as TINY
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models import config as config_module
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.base_folder import read_config
from mlx_rsgwm.models.config import open_model
from mlx_rsgwm.models.rope import KINDS, rotation_meant

pytestmark = pytest.mark.usefixtures("one_torch_thread")

IDS = [int(i) for i in np.random.default_rng(0).integers(2, 90, 24)]
SIZES = {**TINY, "vocab_size": 96, "tie_word_embeddings": False}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
DEEPSEEK = {**MLA, **ROUTED, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [2.0, 2.3, 3.0, 4.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LLAMA3 |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def save(folder, kind, model_class=None, rename=None, **fields):
    """A random torch model in ``folder``; ``rename`` edits config.json after the values were drawn."""
    import torch
    import transformers

    torch.manual_seed(0)
    merged = {**SIZES, **fields}
    if model_class:
        text = {key: value for key, value in merged.items() if key not in ("vision_config", "image_token_index")}
        outer = {key: merged[key] for key in ("vision_config", "image_token_index") if key in merged}
        config = transformers.AutoConfig.for_model(kind, text_config=text, tie_word_embeddings=False, **outer)
        model = getattr(transformers, model_class)(config)
    else:
        config = transformers.AutoConfig.for_model(kind, **merged)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    model.save_pretrained(folder)
    if rename:
        config_file = folder / "config.json"
        config_file.write_text(json.dumps(rename(json.loads(config_file.read_text()))))
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()


def error_of(folder, expected):
    """The largest difference of logits, of the largest logit; and what was told."""
    model, _, notes = open_model(folder)
    logits = np.array(model(mx.array([IDS]))[0].astype(mx.float32))
    return np.abs(logits - expected).max() / np.abs(expected).max(), notes


def older(config):
    """The file as transformers 4 wrote it."""
    table = config.pop("rope_parameters")
    theta, part = table.pop("rope_theta"), table.pop("partial_rotary_factor", None)
    scaling = table if table.get("rope_type", "default") != "default" else None
    return {**config, "rope_theta": theta, "rope_scaling": scaling} | ({"partial_rotary_factor": part} if part else {})


SUPPLIED = [
    # a theta, and scalings, under text_config.rope_parameters, where transformers 5 writes them
    ("mistral3", {"model_class": "Mistral3ForConditionalGeneration", "model_type": "mistral", "sliding_window": None,
                  "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}, "image_token_index": 90,
                  "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("mistral3", {"model_class": "Mistral3ForConditionalGeneration", "model_type": "mistral", "sliding_window": None,
                  "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}, "image_token_index": 90,
                  "rope_parameters": YARN}),
    ("llava", {"model_class": "LlavaForConditionalGeneration", "model_type": "mistral", "sliding_window": None,
               "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}, "image_token_index": 90,
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen2_vl", {"model_class": "Qwen2VLForConditionalGeneration", "vision_config": {"depth": 1, "embed_dim": 32,
                  "hidden_size": 32, "num_heads": 4, "patch_size": 14},
                  "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}}),
    # required by mlx-lm, not written by transformers 5
    ("gpt_neox", {"intermediate_size": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4,
                                                                 "partial_rotary_factor": 0.5}}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
                   "mlp_only_layers": [0], "norm_topk_prob": True}),
    ("glm4_moe", {**ROUTED, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    ("cohere2", {"tie_word_embeddings": True, "sliding_window": 5,
                 "layer_types": ["sliding_attention", "full_attention"]}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]}),
    ("exaone4", {"sliding_window": 5, "sliding_window_pattern": 2}),  # an int where mlx-lm has letters
    # no scaling at all in mlx-lm's model, or not this kind of it
    ("mixtral", {**MOE, "rope_parameters": LINEAR}),
    ("cohere", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("nemotron", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}),
    ("helium", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    ("qwen2", {"rope_parameters": {**YARN, "truncate": False}}),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS,
                                   "original_max_position_embeddings": 16}}),
    ("phi3", {"sliding_window": None, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS,
                                                          "original_max_position_embeddings": 32}}),
    # parts of a head
    ("glm", {"partial_rotary_factor": 0.5}),
    ("glm", {"partial_rotary_factor": 0.25, "head_dim": 16}),
    ("glm", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}),
    ("glm4", {"partial_rotary_factor": 0.5}),
    ("stablelm", {"partial_rotary_factor": 0.25, "rope_parameters": {**YARN, "partial_rotary_factor": 0.25}}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), SUPPLIED, ids=lambda value: value if isinstance(value, str) else "")
def test_settings_are_computed_with(tmp_path, kind, fields):
    expected = save(tmp_path, kind, **fields)
    error, notes = error_of(tmp_path, expected)
    assert error < (5e-4 if "2e-4" in " ".join(notes) else 1e-4)


@pytest.mark.parametrize("kind", ["glm", "llama", "qwen2", "cohere"])
@pytest.mark.parametrize("table", [LINEAR, YARN, LLAMA3], ids=lambda table: table["rope_type"])
def test_files_of_transformers_4_are_computed_with(tmp_path, kind, table):
    tied = kind == "cohere"
    part = {"partial_rotary_factor": 0.5} if kind == "glm" else {}
    expected = save(tmp_path, kind, rename=older, rope_parameters={**table, **part}, tie_word_embeddings=tied)
    assert "rope_parameters" not in read_config(tmp_path)
    assert error_of(tmp_path, expected)[0] < 1e-4


def test_a_correction_is_told(tmp_path):
    _, notes = error_of(tmp_path, save(tmp_path, "glm", partial_rotary_factor=0.5))
    assert notes == ["mlx-lm itself would run this model with 8 dimensions of a head rotated, not 4; corrected here"]


def test_a_corrected_model_decodes_with_a_cache(tmp_path):
    """Position by position, on both sides of the length from which longrope has other factors."""
    from mlx_lm.models.cache import make_prompt_cache

    table = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS, "original_max_position_embeddings": 64}
    expected = save(tmp_path, "llama", rope_parameters=table)
    model, _, _ = open_model(tmp_path)
    cache = make_prompt_cache(model)
    rows = [model(mx.array([[token]]), cache=cache)[0, 0] for token in IDS]
    assert np.abs(np.array(mx.stack(rows)) - expected).max() < 1e-4 * np.abs(expected).max()


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("qwen2", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("mixtral", {**MOE, "hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("cohere", {"hidden_act": "gelu", "tie_word_embeddings": True}, "hidden_act 'gelu'"),
    ("deepseek_v3", {**DEEPSEEK, "rope_interleave": False}, "rope_interleave False"),
    ("deepseek_v3", {**DEEPSEEK, "num_experts_per_tok": 1}, "num_experts_per_tok 1"),
    ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "multi_query": False},
     "multi_query False"),
    ("cohere2", {"tie_word_embeddings": True, "sliding_window": 5,
                 "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("exaone4", {"sliding_window": 5, "sliding_window_pattern": None,
                 "layer_types": ["full_attention", "full_attention"]}, "sliding_window 5"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_settings_that_mlx_lm_passes_over_are_refused(tmp_path, kind, fields, words):
    save(tmp_path, kind, **fields)
    with pytest.raises(RsgwmError) as caught:
        open_model(tmp_path)
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_model_whose_module_ends_the_process_is_refused(tmp_path, monkeypatch):
    """As mlx-lm's module of OLMo 1 does where ai2-olmo is not installed."""
    save(tmp_path, "llama")

    def leave(config):
        raise SystemExit(1)

    monkeypatch.setattr(config_module, "model_classes", leave)
    with pytest.raises(RsgwmError, match="needs a package that is not installed for mlx-lm's model 'llama'"):
        open_model(tmp_path)


def test_a_head_dim_that_transformers_derives_is_supplied(tmp_path):
    kinds = ["full_attention", "full_attention"]

    def without(config):
        config.pop("head_dim", None)
        return config

    expected = save(tmp_path, "exaone4", rename=without, sliding_window=None, layer_types=kinds)
    assert "head_dim" not in read_config(tmp_path)
    assert error_of(tmp_path, expected)[0] < 1e-4


@pytest.mark.parametrize("stored", ["with its prefix", "with prefix and head", "with masks", "without its prefix"])
def test_gpt2_under_either_of_its_names(stored, tmp_path):
    import transformers

    expected = save(tmp_path, "gpt2", n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=True)
    file = str(tmp_path / "model.safetensors")
    arrays = mx.load(file)
    assert all(name.startswith("transformer.") for name in arrays)
    if stored == "without its prefix":
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        model.transformer.save_pretrained(tmp_path / "inner")
        assert error_of(tmp_path / "inner", expected)[0] < 1e-4
        return
    if stored == "with prefix and head":
        arrays["lm_head.weight"] = arrays["transformer.wte.weight"]
    if stored == "with masks":
        arrays |= {
            "transformer.h.1.attn.bias": mx.ones((1, 1, 8, 8)),
            "transformer.h.1.attn.masked_bias": mx.array(-1e4),
        }
    mx.save_safetensors(file, arrays, {"format": "pt"})
    assert error_of(tmp_path, expected)[0] < 1e-4


def test_gpt2s_head_that_is_not_its_embedding_is_refused(tmp_path):
    save(tmp_path, "gpt2", n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=True)
    file = str(tmp_path / "model.safetensors")
    arrays = mx.load(file)
    mx.save_safetensors(file, {**arrays, "lm_head.weight": arrays["transformer.wte.weight"] + 1}, {"format": "pt"})
    with pytest.raises(RsgwmError, match=r"lm_head\.weight in the checkpoint differs"):
        open_model(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("change", ["equal", "one value", "dtype"])
def test_a_stored_head_must_be_the_embedding_that_the_config_ties_it_to(tmp_path, kind, change):
    expected = save(tmp_path, kind, tie_word_embeddings=True)
    file = str(tmp_path / "model.safetensors")
    arrays = mx.load(file)
    head = arrays["model.embed_tokens.weight"] + 0
    if change == "one value":
        head[-1, -1] += 1
    arrays["lm_head.weight"] = head.astype(mx.float16) if change == "dtype" else head
    mx.save_safetensors(file, arrays, {"format": "pt"})
    if change == "equal":
        error, notes = error_of(tmp_path, expected)
        assert error < (5e-4 if notes else 1e-4)
        return
    with pytest.raises(RsgwmError, match=r"lm_head\.weight in the checkpoint differs from model\.embed_tokens"):
        open_model(tmp_path)


def test_a_window_that_is_not_applied_is_told(tmp_path):
    save(tmp_path, "mistral", sliding_window=5)
    assert "window of 5 tokens" in " ".join(open_model(tmp_path)[2])
    save(tmp_path / "wide", "mistral", sliding_window=None)
    assert open_model(tmp_path / "wide")[2] == []


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"mrope", "proportional"}))
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_rotations_are_those_of_transformers(kind, part):
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size, longest = 16, 256
    table = {"default": {}, "dynamic": {"factor": 2.0}, "linear": LINEAR, "llama3": LLAMA3,
             "yarn": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.5},
             "longrope": {"short_factor": [1.0 + i for i in range(int(size * part) // 2)],
                          "long_factor": [2.0 + i for i in range(int(size * part) // 2)],
                          "original_max_position_embeddings": 64}}[kind]  # fmt: skip
    table = {**table, "rope_type": kind, "rope_theta": 5e4, "partial_rotary_factor": part}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=size, max_position_embeddings=longest, rope_parameters=table
    )
    meant = rotation_meant(table, size, longest)
    if kind == "default":
        angles, factor = 5e4 ** -(np.arange(0, size * part, 2) / (size * part)), 1.0
    else:
        angles, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=32)
    np.testing.assert_allclose(meant.angles, np.asarray(angles), rtol=2e-6)
    assert meant.factor == pytest.approx(factor)
    if kind == "longrope":
        angles, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=65)
        np.testing.assert_allclose(meant.long, np.asarray(angles), rtol=2e-6)


QUANTISED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
                     "bitsandbytes"),
    "unnamed": ({"load_in_8bit": True}, "bitsandbytes"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
    "hqq": ({"quant_method": "hqq"}, "HQQ"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "quanto": ({"quant_method": "quanto"}, "Quanto"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "GPTQ"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"AWQ \(4 bits, gemv\)"),
    "packed": ({"quant_method": "compressed-tensors", "format": "pack-quantized"},
               r"compressed-tensors \(pack-quantized\)"),
    "packed floats": ({"quant_method": "compressed-tensors", "format": "float-quantized"},
                      r"compressed-tensors \(float-quantized\)"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "name"), QUANTISED.values(), ids=QUANTISED)
def test_quantised_bases_are_named(tmp_path, tiny_base, settings, name):
    import shutil

    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    config = {**read_config(folder), "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    for attempt in (lambda: open_model(folder), lambda: load_base(str(folder))):
        with pytest.raises(RsgwmError, match=f"quantised by {name}, which MLX does not read; give the dense model"):
            attempt()
    result = CliRunner().invoke(rsgwm, ["base", "info", str(folder)])
    assert result.exit_code == 2
    assert re.search(f"quantised by {name}", result.output)
