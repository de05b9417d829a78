"""Fusing: what survives is measured as defined, too little is refused, and the written model computes as it should."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.fuse import FORMATS as CLI_FORMATS
from mlx_rsgwm.cli.fuse import MIN_SHARE as CLI_MIN_SHARE
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.fuse.fuse import FORMATS, MIN_SHARE, StoredForm, fuse
from mlx_rsgwm.core.errors import AdapterError, CheckFailed, RsgwmError
from mlx_rsgwm.linalg.gram import WholeGram
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.quantisation import QuantFormat

IDS = [3, 9, 40, 41, 7, 99, 200, 12]
ALL = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A Llama of hidden size 64 in float32, bfloat16 and 4 bits, as mlx-lm writes them."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model, save_config, save_model

    root = tmp_path_factory.mktemp("bases")
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    for name in ("float32", "bfloat16", "4bit"):
        mx.random.seed(1)
        model = Model(ModelArgs.from_dict(config))
        model.update_modules({})
        weights = [(n, v * 2 if "proj" in n else v) for n, v in tree_flatten(model.parameters())]
        model.load_weights(weights)
        own = dict(config)
        if name == "4bit":
            _, own = quantize_model(model, own, 64, 4)
        if name == "bfloat16":
            model.set_dtype(mx.bfloat16)
        save_model(root / name, model)
        save_config(own, root / name / "config.json")
        byte_tokenizer(root / name)
    return root


def byte_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, **{s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def make(folder, size=0.1, keys=ALL, rank=4, kind="lora", extra=None, full=None, base=None):
    """A random adapter of the Llama above; ``size``: standard deviation of its factors."""
    rng = np.random.default_rng(2)
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (64, 32), "mlp.up_proj": (64, 128)}
    shapes["mlp.down_proj"] = (128, 64)
    weights = {}

    def random(*shape):
        return mx.array((size * rng.standard_normal(shape)).astype(np.float32))

    for layer in range(2):
        for key in keys:
            module, (inputs, outputs) = f"model.layers.{layer}.{key}", shapes[key]
            weights |= {f"{module}.lora_a": random(inputs, rank), f"{module}.lora_b": random(rank, outputs)}
            if kind == "dora":
                weights[f"{module}.m"] = mx.array(rng.uniform(0.8, 1.6, outputs).astype(np.float32))
    for module, (inputs, outputs) in (extra or {}).items():
        weights |= {f"{module}.lora_a": random(inputs, rank), f"{module}.lora_b": random(rank, outputs)}
    manifest = {"base": load_base(str(base)).describe()} if base else {}
    spec = LoraSpec(rank, 2.0, 0.1, (*keys, *(extra or {})), 2, kind)
    return Adapter(spec, weights, manifest=manifest, full=full or {}).save(folder)


def logits(base, adapter=None):
    from mlx_lm.tuner.utils import load_adapters

    model = load_base(str(base), "float32").model
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
    return np.array(model(mx.array([IDS]))[0])


def test_dora_that_changes_nothing_is_not_fused(bases, tmp_path):
    folder = make(tmp_path / "adapter", kind="dora", base=bases / "float32")
    adapter, layers = Adapter.load(folder), dict(load_base(str(bases / "float32"), "float32").model.named_modules())
    for module in adapter.modules():
        adapter.weights[f"{module}.lora_b"] *= 0
        adapter.weights[f"{module}.m"] = mx.linalg.norm(layers[module].weight, axis=1)
    with pytest.raises(AdapterError, match=r"changes nothing: .*magnitudes are the base's"):
        fuse(adapter.save(tmp_path / "still"), str(bases / "float32"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapter.weights[f"{module}.m"] *= 1.05
    assert fuse(adapter.save(tmp_path / "moved"), str(bases / "float32"), tmp_path / "out")["modules"] == 1


@pytest.mark.parametrize(
    ("base", "target", "tolerance"),
    [
        ("float32", "keep", 1e-4),
        ("float32", "float16", 0.05),
        ("bfloat16", "float32", 1e-4),
        ("bfloat16", "keep", 0.2),
        ("4bit", "float32", 1e-4),
        ("4bit", "float16", 0.05),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_float_model_computes_what_base_and_adapter_do(bases, tmp_path, base, target, tolerance, kind):
    adapter = make(tmp_path / "adapter", kind=kind)
    result = fuse(adapter, str(bases / base), tmp_path / "out", target=target)
    assert result["share"] == pytest.approx(1, abs=0.02)
    assert result["logit_share"] == pytest.approx(1, abs=0.02)
    expected = logits(bases / base, adapter)
    assert np.abs(expected - logits(bases / base)).max() > 0.5
    assert np.abs(logits(tmp_path / "out") - expected).max() < tolerance
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config
    assert json.loads((tmp_path / "out" / "fuse.json").read_text())["modules"] == 8
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("base", "kind"), [("float32", "lora"), ("float32", "dora"), ("4bit", "lora")])
def test_what_was_not_changed_is_not_counted_and_stays_as_it_was(bases, tmp_path, base, kind):
    """mlx-lm adapts all that the keys select: without arrays, with a zero lora_b, with the base's own value."""
    adapter = Adapter.load(make(tmp_path / "all", kind=kind))
    weights = {name: value for name, value in adapter.weights.items() if "layers.0.self_attn" not in name}
    weights["model.layers.1.mlp.up_proj.lora_b"] *= 0
    own, other = mx.ones((64,)), mx.array(np.linspace(0.5, 1.5, 64).astype(np.float32))
    full = {"model.norm.weight": own, "model.layers.0.input_layernorm.weight": other}
    replace(adapter, weights=weights, full=full, manifest={}).save(tmp_path / "adapter")
    result = fuse(tmp_path / "adapter", str(bases / base), tmp_path / "out", min_share=0.1)
    assert (result["modules"], result["replaced"]) == (5 if kind == "lora" else 6, 1)
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (bases / base, tmp_path / "out"))
    untouched = [name for name in before if "layers.0.self_attn" in name or "o_proj" in name]
    assert len(untouched) > 4
    assert all(mx.array_equal(before[name], after[name]) for name in untouched)


def test_embedding_head_and_replaced_parameters_are_fused_too(bases, tmp_path):
    norm = {"model.norm.weight": mx.array(np.linspace(0.5, 1.5, 64).astype(np.float32))}
    extra = {"model.embed_tokens": (320, 64)}
    make(tmp_path / "plain", extra=extra)
    adapter = make(tmp_path / "adapter", extra=extra, full=norm)
    result = fuse(adapter, str(bases / "float32"), tmp_path / "out")
    assert (result["modules"], result["replaced"]) == (9, 1)
    assert result["max_abs_logit"] < 1e-4
    without_norm = logits(bases / "float32", tmp_path / "plain")
    assert np.abs(logits(tmp_path / "out") - without_norm).max() > 0.1


def test_layers_of_experts_are_fused(tmp_path):
    from mlx_lm.models.qwen3_moe import Model, ModelArgs
    from mlx_lm.utils import save_config, save_model

    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "norm_topk_prob": True,
    }
    save_model(tmp_path / "base", Model(ModelArgs.from_dict(config)))
    save_config(dict(config), tmp_path / "base" / "config.json")
    byte_tokenizer(tmp_path / "base")
    rng = np.random.default_rng(0)
    weights = {}
    for name, inputs, outputs in (("gate", 32, 24), ("up", 32, 24), ("down", 24, 32)):
        module = f"model.layers.0.mlp.switch_mlp.{name}_proj"
        weights[f"{module}.lora_a"] = mx.array(rng.standard_normal((3, 2, inputs)).astype(np.float32))
        weights[f"{module}.lora_b"] = mx.array(rng.standard_normal((3, outputs, 2)).astype(np.float32))
    keys = tuple(f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down"))
    adapter = Adapter(LoraSpec(2, 0.5, 0.0, keys, 1), weights).save(tmp_path / "adapter")
    result = fuse(adapter, str(tmp_path / "base"), tmp_path / "out")
    assert result["max_abs_logit"] < 1e-4
    expected = logits(tmp_path / "base", adapter)
    assert np.abs(expected - logits(tmp_path / "base")).max() > 0.05
    assert np.abs(logits(tmp_path / "out") - expected).max() < 1e-4


# --- few bits ---------------------------------------------------------------------------------------------------


def reference_share(base, adapter, module):
    """<F(W + ΔW) − F(W), ΔW> / ‖ΔW‖² with plain quantise and dequantise."""
    arrays = dict(mx.load(str(base / "model.safetensors")))
    packed = [arrays[f"{module}.{leaf}"] for leaf in ("weight", "scales", "biases")]
    weight = mx.dequantize(*packed, group_size=64, bits=4)
    found = Adapter.load(adapter)
    a, b = found.weights[f"{module}.lora_a"], found.weights[f"{module}.lora_b"]
    update = 2.0 * (a @ b).T

    def there_and_back(value):
        return mx.dequantize(*mx.quantize(value, 64, 4), group_size=64, bits=4)

    survived = there_and_back(weight + update) - there_and_back(weight)
    return (mx.sum(survived * update) / mx.sum(update * update)).item()


def test_a_small_update_does_not_survive_four_bits_and_is_refused(bases, tmp_path):
    adapter = make(tmp_path / "adapter", size=0.01)
    with pytest.raises(CheckFailed, match=r"only \d+% of .* survives in the format keep, below 90% \(least in model"):
        fuse(adapter, str(bases / "4bit"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    forced = fuse(adapter, str(bases / "4bit"), tmp_path / "out", force=True)
    assert forced["share"] < 0.9
    for one in forced["worst"]:
        assert one["share"] == pytest.approx(reference_share(bases / "4bit", adapter, one["module"]), abs=0.02)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 4


def test_a_large_update_survives_them(bases, tmp_path):
    adapter = make(tmp_path / "adapter", size=0.3)
    result = fuse(adapter, str(bases / "4bit"), tmp_path / "out")
    assert 0.9 < result["share"] < 1.1
    model = load_base(str(tmp_path / "out")).model
    assert all(isinstance(layer.mlp.up_proj, nn.QuantizedLinear) for layer in model.layers)
    assert model.layers[0].mlp.up_proj.bits == 4


@pytest.mark.parametrize(("target", "bits"), [("8bit", 8), ("4bit", 4), ("3bit", 3)])
def test_a_dense_base_is_quantised_whole(bases, tmp_path, target, bits, capsys):
    adapter = make(tmp_path / "adapter", size=0.3)
    result = fuse(adapter, str(bases / "bfloat16"), tmp_path / "out", target=target, min_share=0.5)
    assert capsys.readouterr().out == ""  # mlx-lm prints, and standard output is the result's
    model = load_base(str(tmp_path / "out")).model
    assert model.layers[0].self_attn.o_proj.bits == model.layers[0].mlp.up_proj.bits == bits
    assert dict(mx.load(str(tmp_path / "out" / "model.safetensors")))["model.norm.weight"].dtype == mx.bfloat16
    assert result["error"] < {8: 0.05, 4: 0.5, 3: 1.0}[bits]


def test_layers_that_groups_do_not_divide_are_refused_or_named(bases, tmp_path):
    """Of adapted layers the survival would be that of floats; others stay floats, and are told."""
    wide = QuantFormat(4, 128)
    with pytest.raises(RsgwmError, match=r"the 64 columns of .*, and of 5 more layers; take 4,64 or 4,32 or 4,mxfp4"):
        fuse(make(tmp_path / "all"), str(bases / "float32"), tmp_path / "out", target=wide, force=True)
    assert not (tmp_path / "out").exists()
    adapter = make(tmp_path / "down", keys=("mlp.down_proj",))
    result = fuse(adapter, str(bases / "float32"), tmp_path / "out", target=wide, force=True)
    assert len(result["in_floats"]) == 2 * 6 + 1  # of seven layers a block, and the embedding
    model = load_base(str(tmp_path / "out")).model
    assert model.layers[0].mlp.down_proj.bits == 4
    assert not hasattr(model.layers[0].mlp.up_proj, "bits")


def test_error_feedback_is_for_linear_layers(bases, tmp_path):
    adapter = make(tmp_path / "adapter", size=0.3, extra={"model.embed_tokens": (320, 64)})
    grams = {name: WholeGram(np.eye(a.shape[0])) for name, a, _ in Adapter.load(adapter).factors()}
    result = fuse(adapter, str(bases / "float32"), tmp_path / "out", target=QuantFormat(4), grams=grams, force=True)
    assert (result["modules"], result["by_feedback"]) == (9, 8)
    assert load_base(str(tmp_path / "out")).model.model.embed_tokens.bits == 4


def test_more_bits_keep_more(bases, tmp_path):
    adapter = make(tmp_path / "adapter", size=0.02)
    errors = {}
    for target in ("8bit", "4bit", "3bit"):
        errors[target] = fuse(adapter, str(bases / "float32"), tmp_path / target, target=target, force=True)["error"]
    assert errors["8bit"] < errors["4bit"] < errors["3bit"]


def test_rounding_is_that_of_the_float_type():
    values = mx.array([[1 / 3, 1e-9, 70000.0]])
    assert mx.array_equal(StoredForm(mx.bfloat16).round_trip(values), values.astype(mx.bfloat16).astype(mx.float32))


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"target": "2bit"}, "'2bit' is unknown"), ({"min_share": 1.5}, "share must be in"), ({}, "not an empty folder")],
)
def test_bad_input_is_one_line(bases, tmp_path, options, expected):
    adapter = make(tmp_path / "adapter")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(RsgwmError, match=expected) as caught:
        fuse(adapter, str(bases / "float32"), out, **options)
    assert "\n" not in str(caught.value)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_an_adapter_of_another_base_is_refused(bases, tmp_path):
    adapter = make(tmp_path / "adapter", base=bases / "float32")
    with pytest.raises(AdapterError, match=r"was made for .* not for"):
        fuse(adapter, str(bases / "4bit"), tmp_path / "out")


def test_a_fused_model_that_lost_the_effect_is_removed(bases, tmp_path, monkeypatch):
    import mlx_rsgwm.converters.fuse.layers as module

    adapter = make(tmp_path / "adapter")
    monkeypatch.setattr(module, "fused_weight", lambda layer: (layer.linear.weight, layer.linear.weight))
    with pytest.raises(CheckFailed, match=r"0% of the adapter's effect on logits"):
        fuse(adapter, str(bases / "float32"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_knows_the_formats_and_its_exit_codes(bases, tmp_path):
    assert list(FORMATS) == CLI_FORMATS
    assert MIN_SHARE == CLI_MIN_SHARE
    adapter = make(tmp_path / "adapter", size=0.01, base=bases / "4bit")
    name = str(bases / "4bit")
    run = CliRunner().invoke
    refused = run(rsgwm, ["fuse", str(adapter), "--out", str(tmp_path / "out"), "--base", name, "--quiet"])
    assert refused.exit_code == 3
    assert "choose another --format" in refused.stderr
    options = ["--format", "float32", "--quiet", "--json"]
    made = run(rsgwm, ["fuse", str(adapter), "--out", str(tmp_path / "out"), *options])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout.splitlines()[-1])["logit_share"] == pytest.approx(1, abs=0.01)


def test_every_dtype_of_the_config_is_that_of_the_arrays(bases, tmp_path):
    """transformers 5 obeys ``dtype`` before ``torch_dtype``, and those of nested parts."""
    import shutil

    folder = shutil.copytree(bases / "float32", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "float32", "audio_config": {"dtype": "float32", "torch_dtype": "float32", "depth": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    make(tmp_path / "adapter")
    fuse(tmp_path / "adapter", str(folder), tmp_path / "out", target="float16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("float16", "float16")
    assert written["audio_config"] == {"dtype": "float16", "torch_dtype": "float16", "depth": 2}
    transformers = pytest.importorskip("transformers")
    assert str(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype).endswith("16")


@pytest.mark.parametrize("command", ["fuse", "parity"])
def test_a_tokenizer_that_cuts_texts_to_nothing_is_one_line(command, bases, tmp_path):
    import shutil

    from tokenizers import Regex, Tokenizer, models, normalizers

    folder = shutil.copytree(bases / "float32", tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    tokenizer.save(str(folder / "tokenizer.json"))
    make(tmp_path / "adapter")
    arguments = [command, str(tmp_path / "adapter"), *([str(tmp_path / "out")] if command == "fuse" else [])]
    result = CliRunner().invoke(rsgwm, [*arguments, "--base", str(folder), "--quiet"])
    assert result.exit_code == 2, result.output
    assert "cuts text to nothing" in result.stderr
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "base"]
