"""Adapters that mlx_lm.lora itself trained, on a dense and on a 4-bit base, through PEFT into torch; and parity of
adapters that mlx-lm's plain form cannot hold: experts, embeddings, replaced parameters, many ranks."""

from __future__ import annotations

import json
import types

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.parity.check import check_parity
from mlx_rsgwm.converters.peft.convert import from_peft_on, to_peft
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = [[1, 5, 9, 2, 33, 70, 41], [8, 95, 3]]
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def bases(make_torch_llama, tmp_path_factory):
    """A dense Llama, and the same one in 4 bits as mlx_lm.convert writes it."""
    from mlx_lm.utils import load_config, load_model, quantize_model, save_config, save_model

    root = tmp_path_factory.mktemp("bases")
    dense = make_torch_llama(root / "dense", 0, 2, 96)
    model, _ = load_model(dense)
    _, config = quantize_model(model, load_config(dense), 32, 4)
    save_model(root / "4bit", model)
    save_config(config, root / "4bit" / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "4bit" / name).write_bytes((dense / name).read_bytes())
    return root


def train(base, out, kind, **parameters):
    """Three steps of mlx_lm.lora itself."""
    from mlx_lm import lora

    data = out.parent / "data"
    data.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part in ("train", "valid"):
        rows = [{"text": " ".join(f"w{i}" for i in rng.integers(2, 96, 24))} for _ in range(8)]
        (data / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        **lora.CONFIG_DEFAULTS,
        "model": str(base),
        "data": str(data),
        "adapter_path": str(out),
        "train": True,
        "fine_tune_type": kind,
        "num_layers": 2,
        "batch_size": 2,
        "iters": 3,
        "learning_rate": 0.05,
        "steps_per_eval": 100,
        "val_batches": 1,
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 5.0, **parameters},
    }
    lora.run(types.SimpleNamespace(**options))
    return out


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["dense", "4bit"])
@pytest.mark.parametrize("keys", [KEYS, None], ids=["keys", "all"])
def test_what_mlx_lm_trained_computes_the_same_in_torch(bases, tmp_path, base, kind, keys, capsys):
    adapter = train(bases / base, tmp_path / "adapter", kind, **({"keys": keys} if keys else {}))
    result = check_parity(adapter, str(bases / base), device="cpu", token_ids=IDS, tolerance=1e-4, continuation=4)
    assert result["failures"] == []
    assert result["effect_torch"] > 0.05
    assert result["modules"] == 2 * (len(keys) if keys else 7)


def test_an_adapter_on_one_of_two_blocks_too(bases, tmp_path, capsys):
    adapter = train(bases / "dense", tmp_path / "adapter", "lora", keys=["self_attn.o_proj"])
    to_peft(Adapter.load(adapter), str(bases / "dense"), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 20, ["self_attn.o_proj"])


# --- other kinds ------------------------------------------------------------------------------------------------


def factors(module, inputs, outputs, experts=0, rank=3, seed=0):
    rng = np.random.default_rng(seed)

    def random(*shape):
        return mx.array((0.3 * rng.standard_normal(shape)).astype(np.float32))

    if experts:
        return {
            f"{module}.lora_a": random(experts, rank, inputs),
            f"{module}.lora_b": random(experts, outputs, rank),
        }
    return {f"{module}.lora_a": random(inputs, rank), f"{module}.lora_b": random(rank, outputs)}


@pytest.fixture(scope="module")
def moe(tmp_path_factory, bases):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("moe") / "base"
    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=96,
        initializer_range=0.2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        norm_topk_prob=True,
    )
    transformers.Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 4}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bases / "dense" / name).read_bytes())
    return folder


SWITCH = "mlp.switch_mlp."


@pytest.mark.parametrize("names", [("gate", "up", "down"), ("gate", "up"), ("up",), ("down",)], ids="+".join)
def test_experts_of_mlx_lm_become_peft_parameters_and_come_back(moe, tmp_path, names):
    weights = {}
    for layer in range(2):
        for seed, name in enumerate(names):
            shape = (24, 32) if name == "down" else (32, 24)
            weights |= factors(f"model.layers.{layer}.{SWITCH}{name}_proj", *shape, 4, seed=2 * seed + layer)
        weights |= factors(f"model.layers.{layer}.mlp.gate", 32, 4, seed=9)
        weights |= factors(f"model.layers.{layer}.self_attn.q_proj", 32, 32, seed=8)
    keys = (*(f"{SWITCH}{name}_proj" for name in names), "mlp.gate", "self_attn.q_proj")
    from mlx_rsgwm.models.base import load_base

    manifest = {"base": load_base(str(moe)).describe()}
    adapter = Adapter(LoraSpec(3, 2.0, 0.1, keys, 2), weights, manifest=manifest)
    folder = adapter.save(tmp_path / "adapter")
    to_peft(adapter, str(moe), tmp_path / "peft")
    result = check_parity(
        folder, str(moe), peft_folder=tmp_path / "peft", device="cpu", token_ids=IDS, tolerance=1e-4, continuation=4
    )
    assert result["failures"] == []
    assert result["effect_torch"] > 0.05
    back = from_peft_on(tmp_path / "peft", str(moe))
    assert back.spec == adapter.spec
    assert back.weights.keys() == weights.keys()
    assert all(mx.array_equal(back.weights[name], value) for name, value in weights.items())


def test_a_planted_fault_in_an_expert_is_named(moe, tmp_path):
    weights = {}
    for name, shape in (("gate", (32, 24)), ("up", (32, 24)), ("down", (24, 32))):
        weights |= factors(f"model.layers.1.{SWITCH}{name}_proj", *shape, 4)
    keys = tuple(f"{SWITCH}{name}_proj" for name in ("gate", "up", "down"))
    folder = Adapter(LoraSpec(3, 2.0, 0.0, keys, 1), weights).save(tmp_path / "adapter")
    to_peft(Adapter.load(folder), str(moe), tmp_path / "peft")
    path = str(tmp_path / "peft" / "adapter_model.safetensors")
    arrays = dict(mx.load(path))
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    up = mx.arange(48)[:, None] >= 24
    mx.save_safetensors(path, {**arrays, name: mx.where(up, -arrays[name], arrays[name])}, {"format": "pt"})
    result = check_parity(folder, str(moe), peft_folder=tmp_path / "peft", device="cpu", token_ids=IDS, continuation=2)
    assert result["first_difference"]["layer"] == f"model.layers.1.{SWITCH}up_proj"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "rank_pattern": {"v_proj": 2}},
        {"modules_to_save": ["lm_head", "model.norm"], "use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "v_proj": 5}},
    ],
    ids=["embedding and head", "replaced and dora", "many ranks"],
)
def test_parity_of_what_peft_made(bases, tmp_path, settings):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    base = transformers.AutoModelForCausalLM.from_pretrained(str(bases / "dense"), dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(std=0.2)
        elif parameter.requires_grad:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape))
    model.save_pretrained(str(tmp_path / "peft"))
    folder = from_peft_on(tmp_path / "peft", str(bases / "dense")).save(tmp_path / "adapter")
    result = check_parity(
        folder,
        str(bases / "dense"),
        peft_folder=tmp_path / "peft",
        device="cpu",
        token_ids=IDS,
        tolerance=1e-4,
        continuation=4,
    )
    assert result["failures"] == []
    assert result["effect_torch"] > 0.05
