"""Heads trained apart from the embedding that they share in the base: fuse writes an untied model, torch's logits."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mlx_rsgwm.bench.architecture_sizes import SIZES as TINY
from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.gguf.adapter import to_gguf
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.training.warm_start import WarmStart
from tests.converters.sides import invoke, mlx_logits, torch_base, torch_logits

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_torch_thread")
IDS = [1, 5, 9, 2, 33, 60, 41, 8, 55, 3, 17]
SIZES = {**TINY, "vocab_size": 320, "tie_word_embeddings": True}
TRAINED = {
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "embedding saved, LoRA on the head": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, byte_level):
    made = {}

    def folder(kind, **extra):
        if kind not in made:
            torch.manual_seed(5)
            config = getattr(transformers, f"{kind}Config")(**{**SIZES, **extra})
            made[kind] = tmp_path_factory.mktemp("bases") / kind
            getattr(transformers, f"{kind}ForCausalLM")(config).float().save_pretrained(made[kind])
            byte_level(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def make(save_random_peft):
    def make(base, folder, **settings):
        """A random PEFT adapter; torch's logits with it, as PEFT loads it again from the file."""
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_random_peft(torch_base(base), folder, options)
            return torch_logits(peft.PeftModel.from_pretrained(torch_base(base), str(folder)), IDS)

    return make


def largest(one, other):
    return float(np.abs(one - other).max())


CASES = [("Llama", name) for name in TRAINED] + [(kind, "head saved") for kind in ("Qwen3", "Gemma2")]
CASES += [("Gemma3", "LoRA on the head")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_head_apart_becomes_an_untied_model(make, kind, name, bases, tmp_path):
    extra = {"sliding_window": 32, "query_pre_attn_scalar": 8} if kind.startswith("Gemma") else {}
    base = bases(kind, **extra) if kind != "Gemma3" else gemma3(bases, tmp_path)
    expected = make(base, tmp_path / "peft", **TRAINED[name])
    converted = invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", base)
    if kind == "Gemma2":  # its class in mlx-lm has no head at all
        assert converted.exit_code == 2
        assert "gemma2" in converted.stderr
        assert "head" in converted.stderr
        assert not (tmp_path / "mlx").exists()
        return
    assert converted.exit_code == 0, converted.output
    assert "rsgwm fuse makes an untied model, and mlx_lm.generate and mlx_lm.fuse cannot use" in converted.output
    fused = invoke("fuse", tmp_path / "mlx", "--out", tmp_path / "fused", "--base", base, "--quiet")
    assert fused.exit_code == 0, fused.output
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["tie_word_embeddings"] is False
    # mlx-lm rounds Gemma 3's embedding scale to bfloat16: its bare base is that far from torch already.
    bound = 1e-4 if kind != "Gemma3" else 2 * largest(mlx_logits(base, IDS), torch_logits(torch_base(base), IDS))
    assert bound < 5e-3
    assert largest(mlx_logits(tmp_path / "fused", IDS), expected) < bound
    assert largest(torch_logits(torch_base(tmp_path / "fused"), IDS), expected) < 1e-4
    assert largest(mlx_logits(base, IDS), expected) > 0.1
    back = invoke("convert", "to-peft", tmp_path / "mlx", "--out", tmp_path / "back", "--base", base)
    assert back.exit_code == 0, back.output
    before, after = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def gemma3(bases, tmp_path):
    torch.manual_seed(5)
    config = transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 7, "sliding_window": 32, "query_pre_attn_scalar": 8}
    )
    transformers.Gemma3ForCausalLM(config).float().save_pretrained(tmp_path / "base")
    for file in bases("Llama").iterdir():
        if file.name.startswith(("tokenizer", "special")):
            shutil.copyfile(file, tmp_path / "base" / file.name)
    return tmp_path / "base"


@pytest.mark.parametrize("name", ["LoRA on the head", "LoRA on the embedding", "head saved"])
def test_commands_that_keep_the_base_tied_refuse_it_by_name(make, name, bases, tmp_path):
    make(bases("Llama"), tmp_path / "peft", **TRAINED[name])
    assert (
        invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", bases("Llama")).exit_code
        == 0
    )
    for command in (
        ("parity", tmp_path / "mlx", "--base", bases("Llama")),
        (
            "ask",
            "2+2",
            "--base",
            bases("Llama"),
            "--drafter",
            tmp_path / "mlx",
            "--verifier",
            tmp_path / "mlx",
            "--template",
            "plain",
        ),
    ):
        result = invoke(*command)
        assert result.exit_code == 2, (command, result.output)
        assert "rsgwm fuse" in result.stderr, (command, result.stderr)


@pytest.mark.parametrize("name", ["LoRA on both", "embedding saved, LoRA on the head", "embedding saved"])
def test_changed_since_it_goes_back_with_its_head_apart(make, name, bases, tmp_path):
    base = bases("Llama")
    make(base, tmp_path / "peft", **TRAINED[name])
    assert invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", base).exit_code == 0
    adapter = Adapter.load(tmp_path / "mlx")
    replace(adapter, spec=replace(adapter.spec, scale=0.3)).save(tmp_path / "changed")
    fused = invoke("fuse", tmp_path / "changed", "--out", tmp_path / "fused", "--base", base, "--quiet")
    assert fused.exit_code == 0, fused.output
    back = invoke("convert", "to-peft", tmp_path / "changed", "--out", tmp_path / "back", "--base", base, "--verify")
    assert back.exit_code == 0, back.output
    after = torch_logits(peft.PeftModel.from_pretrained(torch_base(base), str(tmp_path / "back")), IDS)
    assert largest(mlx_logits(tmp_path / "fused", IDS), after) < 1e-4


def test_a_replaced_embedding_goes_to_peft_as_embedding_and_head(make, bases, tmp_path):
    base = bases("Llama")
    make(base, tmp_path / "peft", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", base).exit_code == 0
    adapter = Adapter.load(tmp_path / "mlx")
    assert list(adapter.full) == ["model.embed_tokens.weight"]
    replace(adapter, spec=replace(adapter.spec, scale=0.3)).save(tmp_path / "changed")
    assert invoke("fuse", tmp_path / "changed", "--out", tmp_path / "fused", "--base", base, "--quiet").exit_code == 0
    assert invoke("convert", "to-peft", tmp_path / "changed", "--out", tmp_path / "back", "--base", base).exit_code == 0
    after = torch_logits(peft.PeftModel.from_pretrained(torch_base(base), str(tmp_path / "back")), IDS)
    assert largest(mlx_logits(tmp_path / "fused", IDS), after) < 1e-4


def test_merges_keep_heads_apart_or_refuse_them(make, bases, tmp_path):
    base = bases("Llama")
    trained = {
        **{name: TRAINED[name] for name in ("LoRA on the head", "head saved", "LoRA on both")},
        "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    }
    for name, settings in trained.items():
        make(base, tmp_path / f"{name} peft", **settings)
        if name == "tied":
            tie_pairs(tmp_path / f"{name} peft" / "adapter_model.safetensors")
        converted = invoke("convert", "from-peft", tmp_path / f"{name} peft", "--out", tmp_path / name, "--base", base)
        assert converted.exit_code == 0, converted.output
    for others in (("head saved",), ("tied",)):
        folders = [tmp_path / name for name in ("LoRA on the head", *others)]
        merged = invoke("merge", *folders, "--method", "linear", "--out", tmp_path / "refused")
        assert merged.exit_code == 2, merged.output
        assert "rsgwm fuse" in merged.stderr
    folders = [tmp_path / name for name in ("LoRA on the head", "LoRA on both")]
    merged = invoke("merge", *folders, "--method", "linear", "--rank", "16", "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    (folder,) = (file.parent for file in (tmp_path / "merged").rglob("adapters.safetensors"))
    assert json.loads((folder / "manifest.json").read_text())["untied"] is True
    assert invoke("fuse", folder, "--out", tmp_path / "fused", "--base", base, "--quiet").exit_code == 0
    assert invoke("convert", "to-peft", folder, "--out", tmp_path / "back", "--base", base).exit_code == 0
    after = torch_logits(peft.PeftModel.from_pretrained(torch_base(base), str(tmp_path / "back")), IDS)
    assert largest(mlx_logits(tmp_path / "fused", IDS), after) < 1e-4


def tie_pairs(file):
    """What training tied pairs leaves: the head's factors are the embedding's, the other way round."""
    arrays = load_file(file)
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    arrays["base_model.model.lm_head.lora_A.weight"] = arrays[f"{embedding}B"].T.contiguous()
    arrays["base_model.model.lm_head.lora_B.weight"] = arrays[f"{embedding}A"].T.contiguous()
    save_file(arrays, file, {"format": "pt"})


def test_training_and_importance_name_fuse(make, bases, tmp_path):
    make(bases("Llama"), tmp_path / "peft", **TRAINED["LoRA on the head"])
    assert (
        invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", bases("Llama")).exit_code
        == 0
    )
    base = load_base(str(bases("Llama")), "float32")
    with pytest.raises(AdapterError, match="rsgwm fuse"):
        fitting_modules(base, Adapter.load(tmp_path / "mlx"))
    with pytest.raises(RsgwmError, match="rsgwm fuse"):
        WarmStart.load(tmp_path / "mlx").put_into(base.model, 2.0)
    with pytest.raises(AdapterError, match="rsgwm fuse"):
        to_gguf(Adapter.load(tmp_path / "mlx"), read_base_layers("base", base.path), tmp_path / "adapter.gguf")


def test_a_quantised_tied_base_gets_a_dense_head(make, bases, tmp_path):
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    base = bases("Llama")
    model, config = load_model(base)
    model, config = quantize_model(model, config, 32, 8)
    quantised = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_model(quantised, model)
    save_config(config, quantised / "config.json")
    make(base, tmp_path / "peft", **TRAINED["head saved"])
    assert (
        invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", quantised).exit_code == 0
    )
    fused = invoke("fuse", tmp_path / "mlx", "--out", tmp_path / "fused", "--base", quantised, "--quiet", "--force")
    assert fused.exit_code == 0, fused.output
    head = mx.load(str(tmp_path / "fused" / "model.safetensors"))["lm_head.weight"]
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert np.array_equal(np.array(head.astype(mx.float32)), saved.numpy())


@pytest.fixture
def untied(tmp_path, byte_level):
    def folder(kind):
        torch.manual_seed(5)
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, "tie_word_embeddings": False})
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / kind)
        byte_level(tmp_path / kind)
        return tmp_path / kind

    return folder


@pytest.mark.parametrize("trained", [["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("changed", [False, True])
def test_a_head_with_a_bias(make, untied, trained, changed, tmp_path):
    """PEFT saves weight and bias of an adapted head, and loads what is saved."""
    base = untied("Phi")
    expected = make(base, tmp_path / "peft", target_modules=["q_proj", *trained])
    if changed:
        change(tmp_path / "peft", "lm_head.base_layer.bias", lambda bias: bias + torch.linspace(-1, 1, len(bias)))
        expected = torch_logits(peft.PeftModel.from_pretrained(torch_base(base), str(tmp_path / "peft")), IDS)
    converted_and_fused(base, expected, tmp_path)
    assert bool(Adapter.load(tmp_path / "mlx").full) is changed


def change(folder, name, function):
    file = folder / "adapter_model.safetensors"
    arrays = load_file(file)
    name = f"base_model.model.{name}"
    arrays[name] = function(arrays[name])
    save_file(arrays, file, {"format": "pt"})


def converted_and_fused(base, expected, tmp_path):
    converted = invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", base, "--verify")
    assert converted.exit_code == 0, converted.output
    fused = invoke("fuse", tmp_path / "mlx", "--out", tmp_path / "fused", "--base", base, "--quiet")
    assert fused.exit_code == 0, fused.output
    assert largest(mlx_logits(tmp_path / "fused", IDS), expected) < 1e-4
    assert largest(torch_logits(torch_base(tmp_path / "fused"), IDS), expected) < 1e-4
    back = invoke("convert", "to-peft", tmp_path / "mlx", "--out", tmp_path / "back", "--base", base)
    assert back.exit_code == 0, back.output
    before, after = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return converted.output


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_weight_below_lora_that_is_not_the_bases(make, untied, name, tmp_path):
    base = untied("Llama")
    make(base, tmp_path / "peft", target_modules=["q_proj", name.rpartition(".")[2]])
    change(
        tmp_path / "peft", f"{name}.base_layer.weight", lambda weight: weight + torch.linspace(-1, 1, weight.shape[1])
    )
    expected = torch_logits(peft.PeftModel.from_pretrained(torch_base(base), str(tmp_path / "peft")), IDS)
    assert "is not this base's" in converted_and_fused(base, expected, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_below_lora_that_was_only_rounded_is_no_change(make, untied, dtype, tmp_path):
    base = untied("Llama")
    make(base, tmp_path / "peft", target_modules=["q_proj", "lm_head"])
    change(tmp_path / "peft", "lm_head.base_layer.weight", lambda weight: weight.to(dtype))
    converted = invoke("convert", "from-peft", tmp_path / "peft", "--out", tmp_path / "mlx", "--base", base)
    assert converted.exit_code == 0, converted.output
    assert not Adapter.load(tmp_path / "mlx").full
