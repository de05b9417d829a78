"""PEFT folders as people's tools leave them: more keys, fewer arrays, copies of the base; MLX's logits are torch's."""

from __future__ import annotations

import json
import shutil
import warnings

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mlx_rsgwm.bench.architecture_sizes import SIZES as TINY
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.slots import AdapterSlots

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_torch_thread")
IDS = [1, 5, 9, 2, 33, 60, 41, 8, 55, 3, 17]
SIZES = {**TINY, "vocab_size": 320}
UNTIED = {"tie_word_embeddings": False}
GEMMA = {"sliding_window": 32, "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": ("Llama", UNTIED),
    "qwen2": ("Qwen2", UNTIED),
    "qwen3": ("Qwen3", UNTIED),
    "mistral": ("Mistral", {**UNTIED, "sliding_window": None}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, save_torch_model, byte_level):
    """Base folders by family, made when asked for."""
    made = {}

    def folder(family):
        if family not in made:
            kind, extra = FAMILIES[family]
            made[family] = tmp_path_factory.mktemp("bases") / family
            save_torch_model(kind, {**SIZES, **extra}, made[family])
            byte_level(made[family])
        return made[family]

    return folder


def torch_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits[0].float().numpy()


@pytest.fixture
def make(save_random_peft):
    def make(base, folder, save=None, resize=0, **settings):
        """A random PEFT adapter of ``base``, and torch's logits with it."""
        model = torch_base(base)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        options = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            **settings,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = save_random_peft(model, folder, options, **(save or {}))
        return torch_logits(model)

    return make


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def convert(folder, base, *extra):
    """The command's exit code, its output and the new folder."""
    out = folder.with_name(f"{folder.name}-mlx")
    shutil.rmtree(out, ignore_errors=True)
    result = CliRunner().invoke(
        rsgwm, ["convert", "from-peft", str(folder), "--out", str(out), "--base", str(base), *map(str, extra)]
    )
    return result, out


def mlx_logits(base, adapter=None):
    from mlx_lm.tuner.utils import load_adapters

    model = load_base(str(base), "float32").model
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
    return np.array(model(mx.array([IDS]))[0])


def fused_logits(base, adapter, out):
    result = CliRunner().invoke(rsgwm, ["fuse", str(adapter), "--out", str(out), "--base", str(base), "--quiet"])
    assert result.exit_code == 0, result.output
    return mlx_logits(out), torch_logits(torch_base(out))


def largest(one, other):
    return float(np.abs(one - other).max())


# --- configurations ---------------------------------------------------------------------------------------------

FOREIGN = {
    "unsloth": {"unsloth_training_method": "qlora", "unsloth_load_in_4bit": True, "unsloth_version": "2025.1"},
    "transformers": {"_from_model_config": True, "transformers_version": "4.33.1"},
    "ms-swift": {"lora_dtype": "AUTO", "lorap_emb_lr": 1e-06, "lorap_lr_ratio": 16.0, "group_size": 8},
    "peft 0.2": {"enable_lora": None, "merge_weights": True},
    "axolotl": {"loraplus_lr_embedding": 1e-6, "peft_use_rslora": False, "wandb": {"project": "x"}},
    "torchtune": {"adapter_type": "lora"},
    "of this PEFT": {"peft_version": "0.21.2@abc", "my_notes": "second try"},
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_keys_that_peft_ignores_are_told_and_ignored(make, tool, bases, tmp_path):
    expected = make(bases("llama"), tmp_path / "adapter")
    edit(tmp_path / "adapter", **FOREIGN[tool])
    if tool == "torchtune":  # writes five fields and no more
        kept = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        config = {name: config[name] for name in kept} | FOREIGN[tool]
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    result, out = convert(tmp_path / "adapter", bases("llama"), "--verify")
    assert result.exit_code == 0, result.output
    told = [name for name, value in FOREIGN[tool].items() if value not in (None, False)]
    told = [name for name in told if name not in ("peft_version", "merge_weights")]
    assert ("note: ignored, as PEFT does" in result.output) == bool(told)
    assert all(name in result.output for name in told)
    assert largest(mlx_logits(bases("llama"), out), expected) < 1e-4


def test_a_long_regular_expression_that_lists_modules(make, bases, tmp_path):
    """ms-swift and VLM trainers write one alternative a module; Unsloth nests groups with lazy gaps."""
    names = [f"model.layers.{layer}.self_attn.{key}_proj" for layer in range(120) for key in "qkvo"]
    swift = "^(" + "|".join(name.replace(".", r"\.") for name in names) + ")$"
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:q_proj|k_proj|v_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
        r"feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))"
    )
    assert len(swift) > 4000
    for index, pattern in enumerate((swift, unsloth)):
        folder = tmp_path / str(index)
        expected = make(bases("llama"), folder, target_modules=pattern)
        result, out = convert(folder, bases("llama"), "--verify")
        assert result.exit_code == 0, result.output
        assert "8 modules" in result.output
        assert largest(mlx_logits(bases("llama"), out), expected) < 1e-4


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_selected_module_without_arrays_stays_as_it_is(make, family, bases, tmp_path):
    folder = tmp_path / "adapter"
    make(bases(family), folder)
    arrays = load_file(folder / "adapter_model.safetensors")
    arrays = {name: value for name, value in arrays.items() if "layers.0.self_attn.q_proj" not in name}
    save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch_logits(peft.PeftModel.from_pretrained(torch_base(bases(family)), str(folder)))
    result, out = convert(folder, bases(family), "--verify")
    assert result.exit_code == 0, result.output
    assert "left as in the base: model.layers.0.self_attn.q_proj" in result.output
    assert largest(mlx_logits(bases(family), out), expected) < 1e-4
    strict, out = convert(folder, bases(family), "--strict")
    assert strict.exit_code == 2
    assert "selects model.layers.0.self_attn.q_proj, but there are no arrays for it" in strict.stderr
    assert not out.exists()
    edit(folder, init_lora_weights=False)
    noisy, out = convert(folder, bases(family))
    assert noisy.exit_code == 2
    assert "PEFT would fill them with noise" in noisy.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-tied", "gemma2"])
def test_saved_copies_of_the_base_are_no_change(make, family, dtype, bases, tmp_path):
    """save_embedding_layers, or modules_to_save that were never trained; in the base's type or a wider one."""
    base, folder = bases(family), tmp_path / "adapter"
    expected = make(base, folder, save={"save_embedding_layers": True})
    assert any("embed_tokens" in name for name in load_file(folder / "adapter_model.safetensors"))
    if dtype == "bfloat16":  # the base's values fit into 16 bits, the adapter has them in 32
        base = shutil.copytree(base, tmp_path / "base")
        weights = load_file(base / "model.safetensors")
        rounded = {name: value.bfloat16() for name, value in weights.items()}
        save_file(rounded, base / "model.safetensors", {"format": "pt"})
        expected = make(base, folder, save={"save_embedding_layers": True})
    result, out = convert(folder, base, "--verify")
    assert result.exit_code == 0, result.output
    assert "saved with the base's own values, no change: model.embed_tokens.weight" in result.output
    adapter = Adapter.load(out)
    assert not adapter.full
    assert largest(mlx_logits(base, out), expected) < 1e-4
    loaded = load_base(str(base), "float32")
    slots = AdapterSlots(loaded)
    slots.load("x", adapter)
    with slots.using("x"):
        assert largest(np.array(loaded.model(mx.array([IDS]))[0]), expected) < 1e-4


def test_what_was_trained_of_the_saved_modules_still_counts(make, bases, tmp_path):
    base, folder = bases("llama"), tmp_path / "adapter"
    make(base, folder, modules_to_save=["lm_head", "embed_tokens"])
    arrays = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    arrays[name] = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    result, out = convert(folder, base, "--verify")
    assert result.exit_code == 0, result.output
    assert list(Adapter.load(out).full) == ["lm_head.weight"]
    assert "replaces parameters of the base (lm_head.weight), which only rsgwm fuse can apply" in result.output
    assert "mlx_lm.generate and mlx_lm.fuse cannot use this folder" in result.output
    again = CliRunner().invoke(rsgwm, ["convert", "from-mlx", str(out), "--out", str(tmp_path / "again")])
    assert "mlx_lm.generate and mlx_lm.fuse cannot use this folder" in again.output


# --- models of images and text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral3(tmp_path_factory, byte_level):
    folder = tmp_path_factory.mktemp("bases") / "mistral3"
    text = {**SIZES, "rope_theta": 1e4, "model_type": "mistral", "sliding_window": None}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "pixtral", "head_dim": 8}
    torch.manual_seed(5)
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=90, tie_word_embeddings=False
    )
    transformers.Mistral3ForConditionalGeneration(config).float().save_pretrained(folder)
    byte_level(folder)
    return folder


def vision_model(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager"
    )


def test_parity_loads_a_wrapped_base_by_its_own_class(make, mistral3, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[__name__], "torch_base", vision_model)
    expected = make(mistral3, tmp_path / "adapter", target_modules=r".*language_model.*(q_proj|down_proj)")
    result, out = convert(tmp_path / "adapter", mistral3, "--verify")
    assert result.exit_code == 0, result.output
    assert largest(mlx_logits(mistral3, out), expected) < 1e-4
    parity = CliRunner().invoke(rsgwm, ["parity", str(out), "--base", str(mistral3), "--quiet"])
    assert parity.exit_code == 0, parity.output
    assert "passed" in parity.output
    adapter = Adapter.load(out)
    adapter.manifest.pop("source")  # as trained here: names come from the base, not from the file it came in
    adapter.save(tmp_path / "own")
    own = CliRunner().invoke(rsgwm, ["parity", str(tmp_path / "own"), "--base", str(mistral3), "--quiet"])
    assert own.exit_code == 0, own.output


def test_the_language_part_of_an_adapter_that_also_trains_the_tower(make, mistral3, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[__name__], "torch_base", vision_model)
    expected = make(mistral3, tmp_path / "adapter", target_modules="all-linear")  # text alone never runs the tower
    refused, out = convert(tmp_path / "adapter", mistral3)
    assert refused.exit_code == 2
    assert "also trains the tower for images or sound" in refused.stderr
    assert "--language-only converts the language model's part" in refused.stderr
    assert not out.exists()
    result, out = convert(tmp_path / "adapter", mistral3, "--language-only", "--verify")
    assert result.exit_code == 0, result.output
    assert "left out, for mlx-lm has the language model alone: model." in result.output
    assert "14 modules" in result.output
    assert largest(mlx_logits(mistral3, out), expected) < 1e-4
    back = CliRunner().invoke(
        rsgwm, ["convert", "to-peft", str(out), "--out", str(tmp_path / "back"), "--base", str(mistral3)]
    )
    assert back.exit_code == 0, back.output
    model = peft.PeftModel.from_pretrained(vision_model(mistral3), str(tmp_path / "back"))
    assert not any("lora_" in name for name, _ in model.named_parameters() if "vision" in name or "projector" in name)
    assert largest(torch_logits(model), expected) < 1e-5


def test_the_card_names_the_class_that_loads_the_base():
    """For every model type of mlx-lm, against transformers' own tables."""
    import pkgutil

    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING
    from transformers.models.auto import modeling_auto as auto

    from mlx_rsgwm.converters.hub.model_card import IMAGE_TEXT, model_card

    types = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)} | set(MODEL_REMAPPING)
    causal, image = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert {name for name in types if name in image and name not in causal} <= set(IMAGE_TEXT)
    assert not set(IMAGE_TEXT) & set(causal)
    for model_type, loader in (("mistral3", "AutoModelForImageTextToText"), ("llama", "AutoModelForCausalLM")):
        manifest = {"base": {"model_type": model_type}}
        config = {"r": 4, "lora_alpha": 8}
        card = model_card("a/b", "c/d", config, manifest, licence="mit", mlx_folder=None, certificate=None, report=None)
        assert f'{loader}.from_pretrained("c/d")' in card


# --- folders of mlx-lm's full fine-tuning ----------------------------------------------------------------------


def test_fuse_makes_a_model_of_a_full_fine_tune(bases, tmp_path):
    from mlx.utils import tree_flatten

    model = load_base(str(bases("llama")), "float32").model
    weights = {name: value * 1.01 for name, value in tree_flatten(model.parameters()) if "layers.1." in name}
    folder = tmp_path / "full"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1}))
    model.load_weights(list(weights.items()), strict=False)
    expected = np.array(model(mx.array([IDS]))[0])
    ours, theirs = fused_logits(bases("llama"), folder, tmp_path / "model")
    assert largest(ours, expected) < 1e-5
    assert largest(theirs, expected) < 1e-4
    for command in (("convert", "to-peft", folder, "--out", tmp_path / "out", "--base", bases("llama")),):
        result = CliRunner().invoke(rsgwm, [str(one) for one in command])
        assert result.exit_code == 2
        assert "make a model of it (rsgwm fuse)" in result.stderr


# --- what only a replaced parameter can hold --------------------------------------------------------------------

HELD = {
    "tokens": ("llama", {"trainable_token_indices": {"embed_tokens": [5, 9, 300]}}),
    "tokens as a list": ("qwen3", {"trainable_token_indices": [9, 5]}),
    "tokens of a tied base": ("llama-tied", {"trainable_token_indices": [5, 9]}),
    "tokens of embedding and head": ("llama", {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [9, 41]}}),
    "lora_bias": ("qwen2", {"lora_bias": True}),
    "lora_bias by ranks": ("qwen2", {"lora_bias": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
}


@pytest.mark.parametrize("name", HELD)
def test_trained_token_rows_and_biases_of_lora_b(make, name, bases, tmp_path):
    family, settings = HELD[name]
    base, folder = bases(family), tmp_path / "adapter"
    expected = make(base, folder, **settings)
    result, out = convert(folder, base, "--verify")
    assert result.exit_code == 0, result.output
    assert "which only rsgwm fuse can apply" in result.output
    ours, theirs = fused_logits(base, out, tmp_path / "model")
    assert largest(ours, expected) < 1e-4
    assert largest(theirs, expected) < 1e-4
    if name in ("tokens", "lora_bias"):
        parity = CliRunner().invoke(rsgwm, ["parity", str(out), "--base", str(base), "--quiet"])
        assert parity.exit_code == 0, parity.output


def test_what_the_base_cannot_hold_is_refused_by_name(make, bases, tmp_path):
    make(bases("llama"), tmp_path / "bias", lora_bias=True)
    result, _ = convert(tmp_path / "bias", bases("llama"))
    assert result.exit_code == 2
    assert "the base has no model.layers.0.self_attn.q_proj.bias that could hold it" in result.stderr
    make(bases("llama"), tmp_path / "tokens", trainable_token_indices=[5, 9])
    edit(tmp_path / "tokens", trainable_token_indices=[5, 9, 11])
    result, _ = convert(tmp_path / "tokens", bases("llama"))
    assert "names 3 rows of 320, the file has 2" in result.stderr
    edit(tmp_path / "tokens", trainable_token_indices=[5, 320])
    result, _ = convert(tmp_path / "tokens", bases("llama"))
    assert "names 2 rows of 320" in result.stderr
