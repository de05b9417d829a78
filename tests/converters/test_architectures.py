"""Adapters of the architectures whose arrays mlx-lm changes most as it loads them; all of them in the slow run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.base_layers import read_base_layers
from mlx_rsgwm.converters.dense_base import dense_base
from mlx_rsgwm.converters.fuse.fuse import fuse
from mlx_rsgwm.converters.module_names import NEEDS_BASE, RENAMED, REWRITTEN_TYPES, TEXT_ONLY, transformers_parameter
from mlx_rsgwm.converters.parity.check import check_parity
from mlx_rsgwm.converters.peft.bulk import from_peft_verified, to_peft_verified
from mlx_rsgwm.converters.peft.convert import convert_from_peft, convert_to_peft
from mlx_rsgwm.converters.peft.verify import require_equal
from mlx_rsgwm.core.errors import CheckFailed, RsgwmError
from mlx_rsgwm.models.adapter import WEIGHTS_FILE, Adapter

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from mlx_rsgwm.bench import architectures as sweep  # noqa: E402
from mlx_rsgwm.bench.architecture_configs import ARCHITECTURES  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),
]
# What the trial "linear" must say, where it is refused.
STRANGEST = {
    "falcon_h1": None,
    "gpt2": None,
    "qwen3_5": None,
    "qwen3_next": None,
    "granitemoe": None,
    "ernie4_5_moe": None,
    "glm4_moe": "mlp.gate is no linear layer",
    "deepseek_v3": "unembed_out of model.layers.1.self_attn.kv_b_proj",
    "lfm2_moe": None,
}


@pytest.mark.parametrize("name", STRANGEST)
def test_logits_are_those_of_torch_both_ways(name, tmp_path):
    found = sweep.sweep(name, tmp_path).findings
    expected = {"base": "right", "linear": "right", "saved": "right", "to": "right"}
    if STRANGEST[name]:
        assert STRANGEST[name] in str(found["linear"].refusal)
        expected |= {"linear": "refused", "rest": "right"}
    assert {trial: finding.verdict for trial, finding in found.items()} == expected, found
    assert all(finding.effect > 0.05 for trial, finding in found.items() if finding.effect and trial != "base")


@pytest.mark.slow
def test_every_architecture_is_right_or_refused_by_name(tmp_path):
    rows = []
    for name in ARCHITECTURES:
        (tmp_path / name).mkdir()
        rows.append(sweep.sweep(name, tmp_path / name))
    tried = [row for row in rows if row.findings["base"].verdict == "right"]
    assert len(tried) >= 50
    wrong = {row.name: row.findings for row in tried if {"WRONG", "crash"} & {f.verdict for f in row.findings.values()}}
    assert not wrong
    differing = []
    for row in tried:
        names = read_base_layers("base", tmp_path / row.name / "base").names
        layers = read_base_layers("base", tmp_path / row.name / "base").layers
        for module, layer in layers.items():
            link = names.link(f"{module}.weight")
            if layer.kind == "experts":
                switch = module.rpartition(".")[0]
                same = names.experts_block(switch) == names.by_rule.experts_block(switch)
            else:
                same = names.transformers_module(module) == names.by_rule.transformers_module(module)
            if not same or link is None or link.scaled:
                differing.append(row.name)
    assert set(differing) <= set(NEEDS_BASE)


# --- the tables against transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRANGEST)
def test_every_layer_is_one_that_transformers_has(name, base_of):
    layers = read_base_layers("base", base_of(name))
    model = sweep.load_torch_base(base_of(name), "cpu", "float32")
    present = {key for key, _ in model.named_modules()}
    for module, layer in layers.layers.items():
        if layer.kind == "experts":
            theirs = f"{layers.names.experts_block(module.rpartition('.')[0])}.experts"
        else:
            theirs = layers.names.transformers_module(module)
        assert theirs in present or "kv_b_proj" in theirs, (module, theirs)


def test_the_types_that_peft_rewrites_are_those_of_the_table():
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    theirs = {**_MODEL_TO_CONVERSION_PATTERN, **{name: name for name in _MOE_TARGET_MODULE_MAPPING}}
    ours = {name: theirs.get(name) for name in (*ARCHITECTURES, *REWRITTEN_TYPES)}
    expected = {name: kind for name, kind in ours.items() if kind in _MOE_TARGET_MODULE_MAPPING}
    assert expected == {name: REWRITTEN_TYPES[name] for name in REWRITTEN_TYPES if name in ours}


@pytest.mark.parametrize("name", sorted(set(RENAMED) & set(ARCHITECTURES)))
def test_renamings_are_those_of_transformers(name):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_checkpoint_conversion_mapping(name) or []
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    assert len(renamings) + sum(isinstance(one, WeightConverter) for one in conversions) == len(conversions)
    for parameter in (
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.block_sparse_moe.router.layer.weight",
        "backbone.layers.0.mixer.in_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "model.layers.0.attention_layer_norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ):
        theirs = rename_source_key(parameter, renamings, [])[0]
        ours = transformers_parameter(parameter, name)
        assert ours == theirs or "language_model" in parameter


def test_the_class_of_models_of_text_and_images_is_that_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in TEXT_ONLY:
        assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name].endswith("ForCausalLM")
    for name, entry in ARCHITECTURES.items():
        if entry.get("text") and name not in TEXT_ONLY:
            assert not MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name].endswith("ForCausalLM")


# --- there and back, verified ------------------------------------------------------------------------------------


def make_peft(base, out, **settings):
    return sweep.random_peft(sweep.load_torch_base(base, "cpu", "float32"), out, **settings)


FALCON = {"target_modules": ["q_proj", "in_proj", "o_proj", "gate_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("falcon_h1", {**FALCON, "rank_pattern": {"o_proj": 2}, "modules_to_save": ["lm_head", "final_layernorm"]}),
        ("qwen3_next", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "input_layernorm"]}),
        ("granitemoe", {"target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj", "ln_f"], "fan_in_fan_out": True}),
    ],
)
def test_what_was_scaled_or_moved_comes_back_to_the_bit(name, settings, base_of, tmp_path):
    make_peft(base_of(name), tmp_path / "peft", **settings)
    layers = read_base_layers(str(base_of(name)), base_of(name))
    from_peft_verified(tmp_path / "peft", layers, tmp_path / "ours")
    convert_to_peft(tmp_path / "ours", "some/base", tmp_path / "back")  # the base need not be at hand
    before, after = (mx.load(str(tmp_path / one / "adapter_model.safetensors")) for one in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(value, after[key]).item() for key, value in before.items())


def test_verify_sees_a_factor_that_was_left_out(base_of, tmp_path):
    make_peft(base_of("falcon_h1"), tmp_path / "peft", **FALCON)
    layers = read_base_layers(str(base_of("falcon_h1")), base_of("falcon_h1"))
    convert_from_peft(tmp_path / "peft", layers, tmp_path / "ours")
    arrays = mx.load(str(tmp_path / "ours" / WEIGHTS_FILE))
    name = "model.layers.1.self_attn.o_proj.lora_b"
    mx.save_safetensors(str(tmp_path / "ours" / WEIGHTS_FILE), {**arrays, name: arrays[name] / 0.9375})
    with pytest.raises(CheckFailed, match=r"layers\.1\.self_attn\.o_proj: the update in MLX is 1\.0666"):
        require_equal(tmp_path / "peft", tmp_path / "ours", layers.names)


def test_dora_on_scaled_layers_computes_what_torch_does(base_of, tmp_path):
    """m / ‖W + ΔW‖ of a weight whose rows are multiplied by s: of s W + s ΔW it is |s| m / ‖s W + s ΔW‖."""
    base = base_of("falcon_h1")
    expected = make_peft(base, tmp_path / "peft", target_modules=FALCON["target_modules"], use_dora=True)
    layers = read_base_layers(str(base), base)
    from_peft_verified(tmp_path / "peft", layers, tmp_path / "ours")
    assert np.abs(sweep.mlx_logits(base, tmp_path / "ours") - expected).max() < 1e-4
    arrays = mx.load(str(tmp_path / "ours" / WEIGHTS_FILE))
    name = "model.layers.1.self_attn.o_proj.m"
    mx.save_safetensors(str(tmp_path / "ours" / WEIGHTS_FILE), {**arrays, name: arrays[name] / 0.9375})
    with pytest.raises(CheckFailed, match=r"layers\.1\.self_attn\.o_proj: its m differs"):
        require_equal(tmp_path / "peft", tmp_path / "ours", layers.names)


def test_dora_trained_on_scaled_layers_goes_to_peft(base_of, tmp_path):
    base = base_of("falcon_h1")
    make_peft(base, tmp_path / "peft", target_modules=FALCON["target_modules"], use_dora=True)
    convert_from_peft(tmp_path / "peft", read_base_layers(str(base), base), tmp_path / "ours")
    adapter = Adapter.load(tmp_path / "ours")
    trained = replace(
        adapter, spec=replace(adapter.spec, scale=0.5), kept={}, manifest={"base": adapter.manifest["base"]}
    )
    trained.save(tmp_path / "trained")
    fuse(tmp_path / "trained", str(base), tmp_path / "fused")
    convert_to_peft(tmp_path / "trained", str(base), tmp_path / "back")
    adapted = sweep.apply_peft(sweep.load_torch_base(base, "cpu", "float32"), tmp_path / "back", widen=True)
    expected = sweep.torch_logits(adapted)
    assert np.abs(sweep.mlx_logits(base, tmp_path / "trained") - expected).max() < 1e-4
    assert (
        np.abs(sweep.torch_logits(sweep.load_torch_base(tmp_path / "fused", "cpu", "float32")) - expected).max() < 1e-4
    )


def test_a_base_that_mlx_lm_saved_is_scaled_too(base_of, tmp_path):
    """Its checkpoint has gone through sanitize before, so its own arrays show nothing."""
    from mlx_lm.utils import load_model, save_config, save_model

    expected = make_peft(base_of("falcon_h1"), tmp_path / "peft", **FALCON)
    model, config = load_model(base_of("falcon_h1"), model_config={"rope_theta": 1e11})
    save_model(tmp_path / "mlx", model)
    save_config(config, tmp_path / "mlx" / "config.json")
    for file in base_of("falcon_h1").glob("tokenizer*"):
        (tmp_path / "mlx" / file.name).write_bytes(file.read_bytes())
    convert_from_peft(tmp_path / "peft", read_base_layers("b", tmp_path / "mlx"), tmp_path / "ours")
    found = sweep.mlx_logits(base_of("falcon_h1"), tmp_path / "ours")
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["falcon_h1", "mixtral"])
def test_a_quantised_base_is_unpacked_as_it_was_before_mlx_lm_changed_it(name, base_of, tmp_path):
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(base_of(name), model_config={"rope_theta": 1e11} if name == "falcon_h1" else None)
    model, config = quantize_model(model, config, 32, 8)
    save_model(tmp_path / "mlx", model)
    save_config(config, tmp_path / "mlx" / "config.json")
    for file in base_of(name).glob("tokenizer*"):
        (tmp_path / "mlx" / file.name).write_bytes(file.read_bytes())
    dense = dense_base(tmp_path / "mlx", tmp_path / "dense")
    ids = torch.tensor([sweep.IDS])
    with torch.no_grad():
        expected = sweep.load_torch_base(dense, "cpu", "float32")(ids).logits[0].numpy()
    assert np.abs(sweep.mlx_logits(tmp_path / "mlx") - expected).max() < 1e-3 * np.abs(expected).max()


def test_parity_of_an_adapter_of_the_whole_model_of_text_and_images(base_of, tmp_path):
    base = base_of("qwen3_5")  # the text model alone is what AutoModelForCausalLM loads of it
    whole = sweep.load_torch_base(base, "cpu", "float32", wrapped=True)
    sweep.random_peft(whole, tmp_path / "peft", target_modules=r".*language_model\.layers\.1\..*q_proj")
    convert_from_peft(tmp_path / "peft", read_base_layers(str(base), base), tmp_path / "ours")
    result = check_parity(tmp_path / "ours", str(base), device="cpu", token_ids=[sweep.IDS], continuation=2)
    assert result["passed"], result["failures"]
    assert result["layers_compared"] > 0


@pytest.mark.parametrize("settings", [FALCON, {"target_modules": ["q_proj", "lm_head"]}])
def test_parity_knows_the_factors_in_falcons_weights(settings, base_of, tmp_path):
    base = base_of("falcon_h1")
    make_peft(base, tmp_path / "peft", **settings)
    convert_from_peft(tmp_path / "peft", read_base_layers(str(base), base), tmp_path / "ours")
    result = check_parity(tmp_path / "ours", str(base), device="cpu", token_ids=[sweep.IDS], continuation=2)
    assert result["passed"], result["failures"]
    assert result["first_difference"] is None


def test_fuse_transposes_a_saved_conv1d(base_of, tmp_path):
    settings = {"modules_to_save": ["attn.c_proj", "ln_f"], "fan_in_fan_out": True}
    expected = make_peft(base_of("gpt2"), tmp_path / "peft", target_modules=["c_attn"], **settings)
    layers = read_base_layers(str(base_of("gpt2")), base_of("gpt2"))
    convert_from_peft(tmp_path / "peft", layers, tmp_path / "ours")
    assert len(Adapter.load(tmp_path / "ours").full) == 6
    fuse(tmp_path / "ours", str(base_of("gpt2")), tmp_path / "fused")
    assert np.abs(sweep.mlx_logits(tmp_path / "fused") - expected).max() < 1e-3


def test_fuse_refuses_logits_that_are_not_finite(base_of, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_of("gpt2"), base)
    arrays = mx.load(str(base / "model.safetensors"))
    arrays["ln_f.bias"] = arrays["ln_f.bias"] * float("nan")
    mx.save_safetensors(str(base / "model.safetensors"), arrays, {"format": "pt"})
    make_peft(base_of("gpt2"), tmp_path / "peft", target_modules=["c_attn"], fan_in_fan_out=True)
    layers = read_base_layers(str(base_of("gpt2")), base_of("gpt2"))
    convert_from_peft(tmp_path / "peft", layers, tmp_path / "ours")
    (tmp_path / "ours" / "manifest.json").unlink()  # it names the base that is sound
    with pytest.raises(RsgwmError, match="are not finite"):
        fuse(tmp_path / "ours", str(base), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next", "ernie4_5_moe"])
def test_dense_and_shared_layers_are_parameters_that_peft_loads(name, base_of, tmp_path):
    sweep.random_mlx(read_base_layers(str(base_of(name)), base_of(name)), tmp_path / "ours")
    to_peft_verified(tmp_path / "ours", str(base_of(name)), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.down_proj.weight" in config["target_parameters"]
    assert not [one for one in config["target_modules"] if one.endswith(("gate_proj", "up_proj", "down_proj"))]


def test_without_the_base_an_architecture_that_needs_it_is_refused(base_of, tmp_path):
    sweep.random_mlx(read_base_layers("b", base_of("falcon_h1")), tmp_path / "ours", ("out_proj",))
    with pytest.raises(RsgwmError, match="not/here"):
        convert_to_peft(tmp_path / "ours", "not/here", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
