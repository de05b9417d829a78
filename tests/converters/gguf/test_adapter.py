"""GGUF adapters: read with the gguf package and applied as llama.cpp applies them, in NumPy, to its own tensors."""

from __future__ import annotations

import json

import gguf
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.base_layers import BaseLayer, BaseLayers
from mlx_rsgwm.converters.gguf.adapter import to_gguf
from mlx_rsgwm.converters.gguf.architectures import ADAPTER_TYPES
from mlx_rsgwm.converters.gguf.names import adapter_architecture, permute_rows, tensor_namer
from mlx_rsgwm.converters.gguf.read import unpermute
from mlx_rsgwm.core.errors import AdapterError, CheckFailed, RsgwmError
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

HIDDEN, HEADS, KV_HEADS, RANK, SCALE = 32, 4, 2, 3, 2.5
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
NAMES |= {"gate_proj": "ffn_gate", "down_proj": "ffn_down", "up_proj": "ffn_up"}


@pytest.fixture
def some_base(tmp_path):
    """Maker of a base's description: layers and config, no weights."""

    def make(model_type="llama", tied=False):
        config = {
            "model_type": model_type,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
        }
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        layers = {
            f"model.layers.{i}.{key}": BaseLayer("linear", *shape) for i in range(2) for key, shape in SHAPES.items()
        }
        layers |= {"model.embed_tokens": BaseLayer("embedding", 50, HIDDEN), "lm_head": BaseLayer("linear", HIDDEN, 50)}
        for name, (inputs, outputs) in {"gate_proj": (32, 24), "up_proj": (32, 24), "down_proj": (24, 32)}.items():
            layers[f"model.layers.0.mlp.switch_mlp.{name}"] = BaseLayer("experts", inputs, outputs, 4)
            layers[f"model.layers.0.block_sparse_moe.switch_mlp.{name}"] = BaseLayer("experts", inputs, outputs, 4)
        return BaseLayers("some/base", tmp_path / "base", model_type, {}, layers, {}, tied)

    return make


def make_adapter(modules, dtype=mx.float32, kind="lora", full=None):
    rng = np.random.default_rng(0)

    def random(*shape):
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    weights = {}
    for module, (inputs, outputs, *experts) in modules.items():
        shapes = ((*experts, RANK, inputs), (*experts, outputs, RANK)) if experts else ((inputs, RANK), (RANK, outputs))
        weights |= {f"{module}.lora_{letter}": random(*shape) for letter, shape in zip("ab", shapes, strict=True)}
        if kind == "dora":
            weights[f"{module}.m"] = random(outputs)
    return Adapter(LoraSpec(RANK, SCALE, 0.0, (), -1, kind), weights, full=full or {})


def all_modules():
    return {f"model.layers.{i}.{key}": shape for i in range(2) for key, shape in SHAPES.items()}


def read(path):
    reader = gguf.GGUFReader(str(path))
    return {name: field.contents() for name, field in reader.fields.items()}, {
        tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors
    }


def applied(fields, a, b):
    """llama.cpp's change of a weight: alpha / rank · B A, in the order of its own rows."""
    return fields["adapter.lora.alpha"] / a.shape[-2] * (b @ a)


def expected(adapter, module):
    a, b = (np.array(adapter.weights[f"{module}.lora_{letter}"].astype(mx.float32), np.float64) for letter in "ab")
    return SCALE * (b @ a if a.ndim == 3 else (a @ b).T)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_llama_cpp_would_add_the_same_to_every_weight(some_base, tmp_path, model_type, dtype):
    adapter = make_adapter(all_modules(), dtype)
    to_gguf(adapter, some_base(model_type), tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == ADAPTER_TYPES[model_type]
    assert fields["adapter.lora.alpha"] == SCALE * RANK
    assert len(tensors) == 2 * len(adapter.modules())
    for module in adapter.modules():
        layer, key = module.split(".")[2], module.rpartition(".")[2]
        name = f"blk.{layer}.{NAMES[key]}.weight"
        change = applied(fields, tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"])
        if adapter_architecture(model_type)[1] and key in ("q_proj", "k_proj"):
            change = unpermute(change, HEADS if key == "q_proj" else KV_HEADS)
        assert np.abs(change - expected(adapter, module)).max() < 1e-5


@pytest.mark.parametrize(
    ("model_type", "block"), [("qwen3_moe", "model.layers.0.mlp"), ("mixtral", "model.layers.0.block_sparse_moe")]
)
def test_experts_are_stacked(some_base, tmp_path, model_type, block):
    modules = {f"{block}.switch_mlp.{n}_proj": (32, 24, 4) for n in ("gate", "up")}
    modules[f"{block}.switch_mlp.down_proj"] = (24, 32, 4)
    adapter = make_adapter(modules)
    to_gguf(adapter, some_base(model_type), tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    for module in modules:
        name = f"blk.0.{NAMES[module.rpartition('.')[2]]}_exps.weight"
        change = applied(fields, tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"])
        assert np.abs(change - expected(adapter, module)).max() < 1e-5


def test_embedding_and_head(some_base, tmp_path):
    adapter = make_adapter({"model.embed_tokens": (50, 32), "lm_head": (32, 50)})
    to_gguf(adapter, some_base("qwen2"), tmp_path / "a.gguf")
    _, tensors = read(tmp_path / "a.gguf")
    # llama.cpp takes a row of lora_a by token id: (tokens, rank)
    a, b = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    assert np.abs(SCALE * a @ b.T - expected(adapter, "model.embed_tokens").T).max() < 1e-5
    a, b = tensors["output.weight.lora_a"], tensors["output.weight.lora_b"]
    assert np.abs(SCALE * b @ a - expected(adapter, "lm_head")).max() < 1e-5


def test_half_precision_is_rounded_once(some_base, tmp_path):
    adapter = make_adapter(all_modules())
    to_gguf(adapter, some_base(), tmp_path / "a.gguf", "f16")
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}["blk.1.attn_v.weight.lora_b"]
    assert found.tensor_type == gguf.GGMLQuantizationType.F16
    value = np.array(adapter.weights["model.layers.1.self_attn.v_proj.lora_b"]).T.astype(np.float16)
    assert np.array_equal(found.data, value)


def test_rows_are_permuted_as_the_reader_unpermutes_them():
    rows = np.arange(48.0).reshape(16, 3)
    assert np.array_equal(unpermute(permute_rows(rows, 2), 2), rows)
    assert permute_rows(rows, 2)[:, 0].tolist() == [0, 12, 3, 15, 6, 18, 9, 21, 24, 36, 27, 39, 30, 42, 33, 45]


@pytest.mark.parametrize("model_type", ADAPTER_TYPES)
def test_every_architecture_has_names(model_type):
    assert tensor_namer(model_type, 2)("model.layers.1.self_attn.o_proj") == "blk.1.attn_output"


Q = {"model.layers.0.self_attn.q_proj": (32, 32)}


@pytest.mark.parametrize(
    ("adapter", "model_type", "tied", "expected_text"),
    [
        (lambda: make_adapter(Q, kind="dora"), "llama", False, "no dora adapters; make a model of it"),
        (lambda: make_adapter(Q, full={"model.norm.weight": mx.ones(32)}), "llama", False, "cannot replace model.norm"),
        (lambda: make_adapter({"model.embed_tokens": (50, 32)}), "llama", True, "is the head too"),
        (lambda: make_adapter({"model.layers.0.mlp.nothing": (32, 32)}), "llama", False, "the base has no"),
        (lambda: make_adapter(Q), "mamba", False, "mamba models have no GGUF form"),
    ],
    ids=["dora", "replaced", "tied", "unknown", "architecture"],
)
def test_what_llama_cpp_cannot_apply_is_refused(some_base, tmp_path, adapter, model_type, tied, expected_text):
    with pytest.raises(RsgwmError, match=expected_text) as caught:
        to_gguf(adapter(), some_base(model_type, tied), tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.gguf").exists()


def test_a_file_that_reads_otherwise_is_removed(some_base, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", _wrong(gguf.GGUFWriter.write_tensor_data))
    with pytest.raises(CheckFailed, match="does not read as it was written"):
        to_gguf(make_adapter(Q), some_base(), tmp_path / "a.gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]


def _wrong(write):
    return lambda self, value, *rest: write(self, value * 2, *rest)


def test_nothing_is_overwritten(some_base, tmp_path):
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(RsgwmError, match="exists already"):
        to_gguf(make_adapter(Q), some_base(), tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match="not finite"):
        to_gguf(make_adapter(Q, full={"x.weight": mx.array(float("nan"))}), some_base(), tmp_path / "b.gguf")


def test_the_command(request, tmp_path):
    folder = request.getfixturevalue("make_adapter")(1).save(tmp_path / "adapter")
    result = CliRunner().invoke(rsgwm, ["convert", "to-gguf", str(folder), "--out", str(tmp_path / "a.gguf"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert (told["modules"], told["dtype"]) == (4, "f32")
    assert len(read(tmp_path / "a.gguf")[1]) == 8
