"""PEFT folders: made by PEFT, read by us, written back; and made by us, loaded by PEFT. Bits, scales, refusals."""

from __future__ import annotations

import copy
import json
import math
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from mlx_rsgwm.converters.peft.config import alpha_for, config_problems, pattern_problem, scale_of, selects
from mlx_rsgwm.converters.peft.convert import from_peft, from_peft_on, to_peft
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.data.row_hashes import KEY, RowRecord, record_of
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

HIDDEN, LAYERS, VOCABULARY = 64, 3, 96
IDS = [[1, 5, 9, 2, 33, 70, 41, 8, 95, 3, 17]]
SHAPES = {  # module: (out, in), with half as many key–value heads
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (80, 64),
    "mlp.down_proj": (64, 80),
}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@pytest.fixture(scope="module")
def base_folder(make_torch_llama, tmp_path_factory):
    return make_torch_llama(tmp_path_factory.mktemp("base"), 0, LAYERS, VOCABULARY)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def torch_base(base_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(base_folder), dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()

    def fresh():
        return copy.deepcopy(model)

    return fresh


def randomise(model, seed=3):
    """Give every adapter array of a PEFT model normal values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_peft(torch_base, folder, dtype="float32", **settings):
    """A PEFT folder made by PEFT itself."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    )
    model = randomise(peft.get_peft_model(torch_base(), config, autocast_adapter_dtype=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(str(folder))
    return folder


def make_adapter(layers=range(LAYERS), keys=tuple(SHAPES)[:4], rank=4, scale=2.0, dtype=mx.float32, manifest=None):
    """A random adapter of the tiny base, with importance and initialisation."""
    key, weights = mx.random.key(7), {}
    for layer in layers:
        for name in keys:
            out_dims, in_dims = SHAPES[name]
            key, one, two = mx.random.split(key, 3)
            module = f"model.layers.{layer}.{name}"
            weights[f"{module}.lora_a"] = (0.2 * mx.random.normal((in_dims, rank), key=one)).astype(dtype)
            weights[f"{module}.lora_b"] = (0.2 * mx.random.normal((rank, out_dims), key=two)).astype(dtype)
    importance = {f"{s}/{n}": mx.abs(v.astype(mx.float32)) for s in ("all", "draft") for n, v in weights.items()}
    init = {name: value * 0.5 for name, value in weights.items() if name.endswith("lora_a")}
    spec = LoraSpec(rank, scale, 0.05, tuple(keys), LAYERS - min(layers))
    return Adapter(spec, weights, importance, {"steps": "12"}, init, manifest or {})


def raw(folder):
    """PEFT's arrays as torch tensors by name."""
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same_arrays(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        width = mx.uint32 if value.dtype == mx.float32 else mx.uint16
        assert mx.array_equal(value.view(width), theirs[name].view(width)), name


def mlx_logits(base_folder, adapter_folder):
    from mlx_lm.tuner.utils import load_adapters

    model = load_base(str(base_folder), dtype="float32").model
    load_adapters(model, str(adapter_folder))
    model.eval()
    return np.array(model(mx.array(IDS))[0])


def torch_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits[0].float().numpy()


CONFIGURATIONS = {
    "two modules": {},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]},
    "regex": {"target_modules": r".*\.(q_proj|gate_proj)$"},
    "all linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "last two layers": {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "one layer in the middle": {"layers_to_transform": [1]},
    "rank-stabilised": {"use_rslora": True, "r": 6},
    "dropout": {"lora_dropout": 0.1},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "fan in": {"fan_in_fan_out": False, "exclude_modules": ["v_proj"]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))
def test_peft_to_ours_to_peft_keeps_every_bit(torch_base, tmp_path, settings, dtype):
    theirs = make_peft(torch_base, tmp_path / "theirs", dtype, **settings)
    from_peft(theirs).save(tmp_path / "ours")
    back = to_peft(Adapter.load(tmp_path / "ours"), "some/base", tmp_path / "back")
    before, after = raw(theirs), raw(back)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype == getattr(torch, dtype)
        assert torch.equal(value, after[name]), name
    original = json.loads((theirs / "adapter_config.json").read_text())
    config = json.loads((back / "adapter_config.json").read_text())
    assert config == {**original, "base_model_name_or_path": "some/base"}


@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))
def test_what_peft_made_computes_the_same_in_mlx(base_folder, torch_base, tmp_path, settings):
    theirs = make_peft(torch_base, tmp_path / "theirs", **settings)
    from_peft_on(theirs, str(base_folder)).save(tmp_path / "ours")
    expected = torch_logits(peft.PeftModel.from_pretrained(torch_base(), str(theirs)).eval())
    assert np.abs(expected - torch_logits(torch_base())).max() > 0.05
    assert np.abs(mlx_logits(base_folder, tmp_path / "ours") - expected).max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_to_peft_to_ours_keeps_everything(tmp_path, dtype):
    manifest = {"kind": "trained", "base": {"name": "b", "fingerprint": "f", "num_layers": LAYERS}, "seed": 3}
    adapter = make_adapter(dtype=DTYPES[dtype], scale=1.7, rank=3, manifest=manifest)
    adapter.save(tmp_path / "ours")
    before = Adapter.load(tmp_path / "ours")
    to_peft(before, "b", tmp_path / "peft")
    from_peft(tmp_path / "peft").save(tmp_path / "back")
    after = Adapter.load(tmp_path / "back")
    for group in ("weights", "importance", "init"):
        same_arrays(getattr(before, group), getattr(after, group))
    assert after.spec == before.spec
    assert after.importance_metadata == before.importance_metadata
    drop = {"files"}
    assert {k: v for k, v in after.manifest.items() if k not in drop} == {
        k: v for k, v in before.manifest.items() if k not in drop
    }


SELECTIONS = {
    "every layer": {},
    "last two": {"layers": [1, 2]},
    "first only": {"layers": [0]},
    "mlp": {"keys": ("mlp.gate_proj", "mlp.down_proj")},
    "half precision": {"dtype": mx.float16},
    "odd scale": {"rank": 3, "scale": 0.1},
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=list(SELECTIONS))
@pytest.mark.parametrize("depth_known", [True, False])
def test_peft_loads_ours_and_computes_the_same(base_folder, torch_base, tmp_path, selection, depth_known):
    manifest = {"base": {"name": "b", "num_layers": LAYERS}} if depth_known else {}
    adapter = make_adapter(manifest=manifest, **selection)
    adapter.save(tmp_path / "ours")
    to_peft(adapter, "b", tmp_path / "peft")
    with warnings.catch_warnings(record=True) as caught:  # PEFT only warns where an array finds no module
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(torch_base(), str(tmp_path / "peft")).eval()
    assert not [one for one in caught if "adapter keys" in str(one.message)]
    adapted = [name for name, module in model.named_modules() if "default" in getattr(module, "lora_A", {})]
    assert sorted(name.removeprefix("base_model.model.") for name in adapted) == sorted(adapter.modules())
    expected = torch_logits(model)
    assert np.abs(expected - torch_logits(torch_base())).max() > 0.01
    assert np.abs(mlx_logits(base_folder, tmp_path / "ours") - expected).max() < 1e-4


def test_modules_that_differ_between_layers_are_named_in_full(torch_base, tmp_path):
    adapter = make_adapter()
    dropped = {"model.layers.1.self_attn.q_proj.lora_a", "model.layers.1.self_attn.q_proj.lora_b"}
    weights = {name: value for name, value in adapter.weights.items() if name not in dropped}
    adapter = Adapter(adapter.spec, weights)
    to_peft(adapter, "b", tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(torch_base(), str(tmp_path / "peft"))
    adapted = [name for name, module in model.named_modules() if "default" in getattr(module, "lora_A", {})]
    assert len(adapted) == 3 * 4 - 1
    assert sorted(name.removeprefix("base_model.model.") for name in adapted) == sorted(adapter.modules())


def test_manifest_of_a_converted_adapter(base_folder, torch_base, tmp_path):
    theirs = make_peft(torch_base, tmp_path / "theirs")
    adapter = from_peft_on(theirs, str(base_folder))
    assert adapter.manifest["kind"] == "converted"
    assert adapter.manifest["base"] == load_base(str(base_folder)).describe()
    assert adapter.spec.num_layers == LAYERS
    assert from_peft(theirs).manifest["base"]["name"] == str(base_folder)


def test_an_alias_is_published_as_its_hub_id(tmp_path):
    to_peft(make_adapter(), "smollm2-135m", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


# --- scales -----------------------------------------------------------------------------------------------------


def test_rank_stabilised_scale_divides_by_the_root():
    assert scale_of({"r": 16, "lora_alpha": 32, "use_rslora": True}) == 8.0
    assert scale_of({"r": 16, "lora_alpha": 32}) == 2.0


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 49, 64])
def test_alpha_divides_back_to_the_scale(rank):
    scales = [2.0, 0.1, 1 / 3, 20.0, 1e-3, -1.5, math.pi, *np.random.default_rng(0).uniform(0.01, 40, 200)]
    off = [scale for scale in map(float, scales) if alpha_for(scale, rank) / rank != scale]
    assert all(abs(alpha_for(scale, rank) / rank / scale - 1) < 3e-16 for scale in off)
    assert len(off) <= 0.2 * len(scales)
    assert alpha_for(2.0, 16) == 32
    assert isinstance(alpha_for(2.0, 16), int)


@pytest.mark.parametrize("rank", [3, 7, 49])
def test_a_scale_that_no_alpha_gives_still_survives(tmp_path, rank):
    scales = np.random.default_rng(1).uniform(0.01, 40, 2000).tolist()
    scale = next(one for one in scales if alpha_for(one, rank) / rank != one)
    to_peft(make_adapter(rank=rank, scale=scale), "b", tmp_path / "peft")
    assert from_peft(tmp_path / "peft").spec.scale == scale


def test_the_sidecar_is_ignored_once_peft_changed_its_files(tmp_path):
    adapter = make_adapter(manifest={"kind": "trained"})
    to_peft(adapter, "b", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 40}))
    again = from_peft(tmp_path / "peft")
    assert again.spec.scale == 10.0
    assert again.importance == {}
    assert again.manifest["kind"] == "converted"


@pytest.mark.parametrize("place", ["manifest", "data"])
def test_rows_of_an_adapter_trained_further_in_torch_still_count(tmp_path, place):
    rows = RowRecord.of(["what is 1 + 1?", "what is 2 + 2?"])
    described = {KEY: rows.describe()} if place == "manifest" else {"data": {KEY: rows.describe()}}
    to_peft(make_adapter(manifest={"kind": "trained", **described}), "b", tmp_path / "peft")
    assert record_of(from_peft(tmp_path / "peft").manifest, "peft") == rows
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 40}))
    again = record_of(from_peft(tmp_path / "peft").manifest, "peft")
    assert (again.used, again.unknown) == (rows.used, ("peft",))


def test_a_damaged_sidecar_is_an_error(tmp_path):
    to_peft(make_adapter(), "b", tmp_path / "peft")
    path = tmp_path / "peft" / "mlx_rsgwm" / "importance.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match=r"importance.safetensors was changed or damaged"):
        from_peft(tmp_path / "peft")


def test_an_edited_adapter_does_not_get_its_old_configuration_back(torch_base, tmp_path):
    adapter = from_peft(make_peft(torch_base, tmp_path / "theirs", use_rslora=True))
    spec = LoraSpec(4, 1.25, 0.0, adapter.spec.keys, -1)
    to_peft(Adapter(spec, adapter.weights, manifest=adapter.manifest), "b", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 5)


# --- refusals ---------------------------------------------------------------------------------------------------

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj' has rank 0"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: 'q_proj' has alpha None"),
        ({"rank_pattern": [8]}, "rank_pattern must map"),
        ({"rank_pattern": {"(": 8}}, "is not a regular expression"),
        ({"target_modules": r"((a)\2+)+$"}, "could take forever (groupref among"),
        ({"rank_pattern": {"(?i)q_proj": 8}}, "is not a regular expression"),
        ({"layers_pattern": ["h", "(.*)+"]}, "is not the name of a list of layers"),
        ({"layers_pattern": r"(?P<layer>h)"}, "is not a regular expression"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, "alpha_pattern: 'q_proj' has alpha"),
        ({"r": 10**400}, "r must be a whole number"),
        ({"target_modules": 7}, "target_modules must be a list"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: not a list"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"lora_bias": "yes"}, "lora_bias must be"),
        ({"trainable_token_indices": {"embed_tokens": ["a"]}}, "trainable_token_indices must be"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [3]}, "activated LoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"kasa_config": {"beta": 1}}, "kasa_config asks for KaSA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"monteclora_config": {"num_samples": 2}}, "Monte Carlo"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"something_new": 1, "peft_version": "0.99.1"}, "something_new is an option of PEFT 0.99.1"),
        ({"something_new": 1, "peft_version": "1.0.0.dev0"}, "something_new is an option of PEFT 1.0.0.dev0"),
        ({"enable_lora": [True, False, True]}, "parts of a fused layer"),
        ({"target_modules": "a" * 300_000}, "300000 characters long"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r must be"),
        ({"r": "four"}, "r must be"),
        ({"lora_alpha": 0}, "lora_alpha must be"),
        ({"lora_alpha": math.inf}, "lora_alpha must be"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
        ({"use_dora": "yes"}, "use_dora must be"),
    ],
)
def test_every_refusal_names_its_field(change, expected):
    assert config_problems(GOOD) == []
    problems = config_problems({**GOOD, **change})
    assert len(problems) == 1
    assert expected in problems[0]


def test_the_expression_that_unsloth_writes_is_taken():
    parts = r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    names = "(?:k_proj|q_proj|v_proj|fc1|fc2)"
    pattern = (
        rf"(?:.*?(?:vision|image|visual|patch|language|text).*?{parts}.*?{names}.*?)"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.{parts}\.(?:{names}))"
    )
    assert pattern_problem(pattern) is None
    config = {"target_modules": pattern}
    assert selects(config, "model.layers.13.self_attn.q_proj")
    assert not selects(config, "model.layers.13.self_attn.o_proj")


def test_all_reasons_come_in_one_line(torch_base, tmp_path):
    theirs = make_peft(torch_base, tmp_path / "theirs", lora_bias=True, trainable_token_indices=[1])
    arrays = arrays_of(theirs)
    save_raw(theirs, {**arrays, Q: arrays[Q].astype(mx.int32), "stray": arrays[Q]})
    with pytest.raises(AdapterError) as caught:
        from_peft(theirs)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("lora_bias", "trainable_token_indices", "a bias on lora_B", "trained token", "int32", "array stray"):
        assert part in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["embed_tokens"]}, "give the base model"),
        ({"target_modules": ["lm_head"]}, "give the base model"),
        ({"modules_to_save": ["lm_head"]}, "give the base model"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA on embeddings"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_peft_itself_makes_and_we_refuse(torch_base, tmp_path, settings, expected):
    theirs = make_peft(torch_base, tmp_path / "theirs", **settings)
    with pytest.raises(AdapterError, match=expected):
        from_peft(theirs)


def save_raw(folder, arrays):
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, {"format": "pt"})


@pytest.fixture
def peft_folder(tmp_path):
    return to_peft(make_adapter(), "b", tmp_path / "peft")


def arrays_of(folder):
    return dict(mx.load(str(folder / "adapter_model.safetensors")))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: a.pop(Q), "q_proj has no lora_A.weight"),
        (lambda a: a.update({Q: a[Q].T}), r"has shape \(64, 4\)"),
        (lambda a: a.update({Q: a[Q][None]}), r"has shape \(1, 4, 64\)"),
        (lambda a: a.update({Q: a[Q] * mx.array(math.nan)}), "not finite"),
        (lambda a: a.update({Q: a[Q].astype(mx.int32)}), "int32"),
        (lambda a: a.update({"stray": a[Q]}), "unknown array stray"),
        (
            lambda a: a.update({Q.replace("model.layers.0.", "model.experts.0."): a[Q]}),
            "experts.0.self_attn.q_proj has no lora_B",
        ),
        (lambda a: a.clear() or a.update({"base_model.model.x.ia3_l": mx.ones(3)}), "IA3"),
    ],
    ids=["missing", "transposed", "three axes", "nan", "integers", "stray", "experts", "ia3"],
)
def test_bad_arrays_are_refused(peft_folder, change, expected):
    arrays = arrays_of(peft_folder)
    change(arrays)
    save_raw(peft_folder, arrays)
    with pytest.raises(AdapterError, match=expected) as caught:
        from_peft(peft_folder)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_whole(peft_folder, tmp_path):
    weights = peft_folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(RsgwmError, match="not a sound safetensors file"):
        from_peft(peft_folder)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_model.safetensors"):
        from_peft(peft_folder)
    (peft_folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle file"):
        from_peft(peft_folder)
    weights.write_bytes(whole)
    (peft_folder / "adapter_config.json").write_text("{")
    with pytest.raises(RsgwmError, match="not valid JSON"):
        from_peft(peft_folder)
    (peft_folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_config.json"):
        from_peft(peft_folder)
    with pytest.raises(AdapterError, match="does not exist"):
        from_peft(tmp_path / "nowhere")


def test_an_adapter_of_another_base_is_refused(base_folder, peft_folder, tmp_path, make_torch_llama):
    other = make_torch_llama(tmp_path / "other", 0, 2, VOCABULARY)
    with pytest.raises(AdapterError, match="layer 2 is not in the base model"):
        from_peft_on(peft_folder, str(other))
    arrays = arrays_of(peft_folder)
    save_raw(peft_folder, {**arrays, Q: mx.zeros((4, 32))})
    with pytest.raises(AdapterError, match=r"q_proj is \(64, 64\) in the base, the adapter is for \(64, 32\)"):
        from_peft_on(peft_folder, str(base_folder))


def factors(module, shape_a, shape_b, dtype=mx.float32, **more):
    made = {f"{module}.lora_a": mx.ones(shape_a).astype(dtype), f"{module}.lora_b": mx.ones(shape_b).astype(dtype)}
    return made | {f"{module}.{leaf}": mx.ones(shape) for leaf, shape in more.items()}


EXPERTS = "model.layers.0.mlp.experts.up_proj"


@pytest.mark.parametrize(
    ("spec", "weights", "expected"),
    [
        (LoraSpec(2, 1.0, 0.0, ("q",), -1), factors("q", (4, 2), (2, 4), mx.int32), "int32"),
        (LoraSpec(2, 1.0, 0.0, ("e",), -1), factors(EXPERTS, (2, 2, 4), (2, 4, 2)), "named switch_mlp"),
        (
            LoraSpec(2, 1.0, 0.0, ("e",), -1, "dora"),
            factors("model.embed_tokens", (4, 2), (2, 4), m=(4,)),
            "DoRA on embeddings",
        ),
        (
            LoraSpec(2, 1.0, 0.0, ("e",), -1, "dora"),
            factors(EXPERTS.replace("experts", "switch_mlp"), (2, 2, 4), (2, 4, 2), m=(4,)),
            "no DoRA on experts",
        ),
    ],
    ids=["integers", "experts of another name", "dora on embeddings", "dora on experts"],
)
def test_adapters_without_a_peft_form_are_refused_before_anything_is_written(spec, weights, expected, tmp_path):
    with pytest.raises(AdapterError, match=expected):
        to_peft(Adapter(spec, weights), "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_anything_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RsgwmError, match="not an empty folder"):
        to_peft(make_adapter(), "b", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


# --- the commands -----------------------------------------------------------------------------------------------


def test_commands_convert_there_and_back(base_folder, tmp_path):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    manifest = {"base": load_base(str(base_folder)).describe()}
    make_adapter(manifest=manifest).save(tmp_path / "ours")
    run = CliRunner().invoke
    there = run(rsgwm, ["convert", "to-peft", str(tmp_path / "ours"), "--out", str(tmp_path / "peft"), "--json"])
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout.splitlines()[-1])["base"] == str(base_folder)
    options = ["--base", str(base_folder), "--json", "--quiet"]
    back = run(rsgwm, ["convert", "from-peft", str(tmp_path / "peft"), "--out", str(tmp_path / "back"), *options])
    assert back.exit_code == 0, back.output
    assert json.loads(back.stdout.splitlines()[-1])["modules"] == 12
    same_arrays(Adapter.load(tmp_path / "ours").weights, Adapter.load(tmp_path / "back").weights)
    again = run(rsgwm, ["convert", "from-peft", str(tmp_path / "peft"), "--out", str(tmp_path / "back"), *options])
    assert again.exit_code == 2
    assert "not an empty folder" in again.output


def test_to_peft_names_no_other_base_than_was_trained_on(base_folder, tmp_path, make_torch_llama):
    from mlx_rsgwm.converters.peft.convert import convert_to_peft

    make_adapter(manifest={"base": load_base(str(base_folder)).describe()}).save(tmp_path / "ours")
    other = make_torch_llama(tmp_path / "other", 7, 2, VOCABULARY)
    with pytest.raises(AdapterError, match="pass the base it was made for"):
        convert_to_peft(tmp_path / "ours", str(other), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    convert_to_peft(tmp_path / "ours", "owner/not-here", tmp_path / "peft")  # nobody can tell
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "owner/not-here"
    )


def test_to_peft_without_a_known_base_asks_for_one(tmp_path):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    make_adapter().save(tmp_path / "ours")
    result = CliRunner().invoke(rsgwm, ["convert", "to-peft", str(tmp_path / "ours"), "--out", str(tmp_path / "peft")])
    assert result.exit_code == 2
    assert "give --base" in result.output
    assert not (tmp_path / "peft").exists()


def test_the_tiny_base_has_the_shapes_the_tests_assume(base_folder):
    shapes = {name: value.shape for name, value in tree_flatten(load_base(str(base_folder)).model.parameters())}
    for module, shape in SHAPES.items():
        assert shapes[f"model.layers.0.{module}.weight"] == shape
