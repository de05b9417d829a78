"""Adapters made by PEFT itself, of every configuration we convert, on small models of several families.

PEFT → MLX → PEFT gives every array and the configuration back bit for bit; MLX's logits with the converted adapter are
torch's with the original.
"""

from __future__ import annotations

import copy
import json
import os
import warnings

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_rsgwm.bench.architecture_sizes import SIZES as TINY
from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.peft.convert import convert_from_peft, convert_to_peft
from mlx_rsgwm.converters.peft.verify import require_equal
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCABULARY, LAYERS = 64, 3
IDS = [[1, 5, 9, 2, 33, 60, 41, 8, 55, 3, 17], [7, 7, 1]]
SIZES = {**TINY, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
DTYPES = ("float32", "float16", "bfloat16")
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen": ("Qwen2", {"tie_word_embeddings": False}),  # its queries, keys and values have biases
    "gemma": ("Gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 8}),  # its head is its embedding
    "qwen-moe": (
        "Qwen3Moe",
        {
            "tie_word_embeddings": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "mixtral": ("Mixtral", {"tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
DENSE = ("llama", "qwen", "gemma")
UNTIED = ("llama", "qwen")
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS = {"target_parameters": PARAMETERS}

# name: (families, what LoraConfig is given beyond rank 4, alpha 8 on q_proj and v_proj)
CONFIGURATIONS = {
    "plain": (DENSE, {}),
    "regex": (DENSE, {"target_modules": r".*layers\.[02]\.(self_attn\.(q|o)_proj|mlp\.down_proj)"}),
    "all linear": (DENSE, {"target_modules": "all-linear", "r": 3, "lora_alpha": 7}),
    "full names": (DENSE, {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"]}),
    "one layer": (DENSE, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": (DENSE, {"target_modules": "all-linear", "exclude_modules": ["o_proj", "down_proj"]}),
    "rslora": (DENSE, {"use_rslora": True, "r": 6}),
    "dora": (DENSE, {"use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "ranks": (DENSE, {"rank_pattern": {"layers.1.self_attn.q_proj": 7, "v_proj": 2}}),
    "ranks and alphas": (DENSE, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1, r"0\..*v_proj": 3}}),
    "rslora with ranks": (DENSE, {"use_rslora": True, "rank_pattern": {"v_proj": 3}}),
    "dora with ranks": (DENSE, {"use_dora": True, "rank_pattern": {"v_proj": 3}, "use_rslora": True}),
    "head": (UNTIED, {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": (UNTIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": (DENSE, {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "saved head": (UNTIED, {"modules_to_save": ["lm_head"]}),
    "saved norms": (DENSE, {"modules_to_save": ["model.norm", "layers.1.post_attention_layernorm"]}),
    "saved embedding": (UNTIED, {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True}),
    "all biases": (UNTIED, {"bias": "all"}),
    "own biases": (UNTIED, {"bias": "lora_only", "rank_pattern": {"v_proj": 2}}),
    "dropout, gaussian": (DENSE, {"lora_dropout": 0.1, "init_lora_weights": "gaussian"}),
    "experts": (("qwen-moe", "mixtral"), EXPERTS),
    "experts and router": (("qwen-moe", "mixtral"), {"target_parameters": [*PARAMETERS, "gate.weight"]}),
    "one expert parameter": (("qwen-moe", "mixtral"), {"target_parameters": ["mlp.experts.down_proj"], "r": 3}),
    "expert ranks": (("qwen-moe", "mixtral"), {**EXPERTS, "rank_pattern": {"experts.down_proj": 2}, "lora_alpha": 6}),
}
CASES = [(family, name) for name, (families, _) in CONFIGURATIONS.items() for family in families]
# One of each kind in every run; all of them, in all dtypes, in the slow one.
QUICK = {
    *((DENSE[i % 3], name) for i, (name, (families, _)) in enumerate(CONFIGURATIONS.items()) if families == DENSE),
    *((UNTIED[i % 2], name) for i, (name, (families, _)) in enumerate(CONFIGURATIONS.items()) if families == UNTIED),
    ("gemma", "embedding and head"),
    ("llama", "embedding and head"),
    ("qwen-moe", "experts and router"),
    ("mixtral", "expert ranks"),
}


def cases(every_dtype):
    found = []
    for index, (family, name) in enumerate(CASES):
        for place, dtype in enumerate(DTYPES if every_dtype else ("float32",)):
            quick = (family, name) in QUICK and (not every_dtype or place == index % 3)
            values = (family, name, dtype) if every_dtype else (family, name)
            found.append(pytest.param(*values, marks=() if quick else pytest.mark.slow))
    return found


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, save_torch_model):
    """Base folders by family, made when asked for."""
    made = {}

    def folder(family):
        if family not in made:
            kind, extra = FAMILIES[family]
            made[family] = tmp_path_factory.mktemp("bases") / family
            save_torch_model(kind, {**SIZES, **extra}, made[family])
            if "num_experts" in extra:  # transformers 5 saves it under another name than published models have
                path = made[family] / "config.json"
                path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": extra["num_experts"]}))
            save_tokenizer(made[family])
        return made[family]

    return folder


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)


@pytest.fixture(scope="module")
def torch_bases(folders):
    """Fresh torch models by family."""
    loaded = {}

    def fresh(family):
        if family not in loaded:
            loaded[family] = transformers.AutoModelForCausalLM.from_pretrained(
                str(folders(family)), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return copy.deepcopy(loaded[family])

    return fresh


def make_peft(model, folder, dtype, settings):
    """A PEFT folder made by PEFT itself, every trained value drawn at random as training would leave it."""
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=False)
        drawn = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            value = torch.randn(parameter.shape) * (0.1 if "lora_" in name else 0.3)
            if "magnitude" in name or "norm" in name:
                value = parameter.data * (1 + value)
            if "modules_to_save" in name and "norm" not in name:
                value = parameter.data + 0.05 * value
            drawn[name] = value
        for name, parameter in model.named_parameters():
            if name in drawn:
                parameter.data.copy_(drawn[name])
        if settings.get("ensure_weight_tying"):  # one optimiser step would have moved both at once
            named = dict(model.named_parameters())
            path = "base_model.model."
            embedding = [named[f"{path}model.embed_tokens.lora_embedding_{x}.default"] for x in "AB"]
            named[f"{path}lm_head.lora_A.default.weight"].data.copy_(embedding[1].data.T)
            named[f"{path}lm_head.lora_B.default.weight"].data.copy_(embedding[0].data.T)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, dtype))
        model.save_pretrained(str(folder))
    return folder


def raw(folder):
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def mlx_logits(base_folder, adapter):
    """Through mlx-lm's own loading, with parameters of the base replaced first where the adapter has any."""
    from mlx_lm.tuner.utils import load_adapters

    model = load_base(str(base_folder), dtype="float32").model
    model.load_weights([(name, value.astype(mx.float32)) for name, value in adapter.full.items()], strict=False)
    if adapter.full:
        folder = adapter.path.with_name("without-full")
        Adapter(adapter.spec, adapter.weights).save(folder)
    load_adapters(model, str(folder if adapter.full else adapter.path))
    model.eval()
    return [np.array(model(mx.array([ids]))[0]) for ids in IDS]


def torch_logits(model):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0].float().numpy() for ids in IDS]


def base_layers(folder):
    return read_base_layers(str(folder), folder)


def largest(one, other):
    return max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("family", "name", "dtype"), cases(every_dtype=True))
def test_there_and_back_keeps_every_bit(folders, torch_bases, tmp_path, family, name, dtype):
    theirs = make_peft(torch_bases(family), tmp_path / "theirs", dtype, CONFIGURATIONS[name][1])
    converted = convert_from_peft(theirs, base_layers(folders(family)), tmp_path / "ours")
    # PEFT's two sets of arrays for a table that is embedding and head at once are one module here.
    shared = family == "gemma" and name == "embedding and head"
    compared = require_equal(theirs, tmp_path / "ours", base_layers(folders(family)).names)
    assert converted.modules + shared == compared
    convert_to_peft(tmp_path / "ours", "some/base", tmp_path / "back")
    before, after = raw(theirs), raw(tmp_path / "back")
    assert sorted(before) == sorted(after)
    for array, value in before.items():
        assert value.dtype == after[array].dtype, array
        assert torch.equal(value, after[array]), array
    original = json.loads((theirs / "adapter_config.json").read_text())
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config == {**original, "base_model_name_or_path": "some/base"}


@pytest.mark.parametrize(("family", "name"), cases(every_dtype=False))
def test_logits_are_those_of_torch(folders, torch_bases, tmp_path, family, name):
    theirs = make_peft(torch_bases(family), tmp_path / "theirs", "float32", CONFIGURATIONS[name][1])
    convert_from_peft(theirs, base_layers(folders(family)), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch_logits(peft.PeftModel.from_pretrained(torch_bases(family), str(theirs)).eval())
    assert largest(expected, torch_logits(torch_bases(family))) > 0.01
    assert largest(mlx_logits(folders(family), Adapter.load(tmp_path / "ours")), expected) < 1e-4


def test_the_matrix_is_as_large_as_stated():
    assert len(CONFIGURATIONS) >= 15
    assert all(sum(family in families for families, _ in CONFIGURATIONS.values()) >= 15 for family in ("llama", "qwen"))
    assert set(CASES) >= QUICK
    assert os.sep not in "".join(CONFIGURATIONS)
