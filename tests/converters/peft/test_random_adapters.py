"""Any adapter: random configurations, made by PEFT and by mlx-lm themselves, then sometimes damaged.

Each is read to the same logits as PEFT's own, or refused in one line; never something in between.
"""

from __future__ import annotations

import json
import tempfile
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mlx_rsgwm.converters.peft.convert import convert_from_peft, convert_to_peft
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from tests.converters.peft import test_matrix as matrix
from tests.converters.peft.test_matrix import base_layers, folders, torch_bases  # noqa: F401  (fixtures)
from tests.outside import fed

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.usefixtures("one_torch_thread")
FAMILIES = ("llama", "qwen", "gemma")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = range(matrix.LAYERS)
QUICK, MANY = (65, 35), (1400, 700)  # adapters of PEFT, of mlx-lm
ANYTHING = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate])

modules = st.sampled_from(LINEAR)
blocks = st.sampled_from(["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
full_names = st.builds("model.layers.{}.{}".format, st.sampled_from(LAYERS), blocks)
targets = st.one_of(
    st.lists(modules, min_size=1, max_size=4, unique=True),
    st.lists(full_names, min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from([*LINEAR, "embed_tokens", "lm_head"]), min_size=1, max_size=3, unique=True),
    st.just("all-linear"),
    st.sampled_from(["q_proj", r".*q_proj", r".*\.(q|v)_proj", r"model\.layers\.[02]\..*_proj", r".*(?<!o)_proj",
                     r"^(?!.*layers\.1\.).*(up|down)_proj$", r".*layers\.\d+\.mlp\.\w+", r"(a+)+$|.*k_proj"]),
)  # fmt: skip
patterns = st.one_of(modules, blocks, full_names, st.sampled_from([r"layers\.1\..*", r".*_proj", "nothing", "proj"]))
ranks = st.integers(1, 9)
alphas = st.one_of(st.integers(1, 32), st.floats(0.125, 16.0, width=32))
options = {
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "lora_bias": st.booleans(),
    "rank_pattern": st.dictionaries(patterns, ranks, max_size=3),
    "alpha_pattern": st.dictionaries(patterns, alphas, max_size=3),
    "modules_to_save": st.lists(st.sampled_from(["lm_head", "embed_tokens", "norm", "model.norm", "input_layernorm",
                                                 "layers.0.post_attention_layernorm"]), max_size=2, unique=True),
    "layers_to_transform": st.one_of(st.sampled_from(LAYERS), st.lists(st.sampled_from(LAYERS), max_size=3)),
    "exclude_modules": st.one_of(st.lists(modules, max_size=2), st.just(r".*\.1\..*")),
    "lora_dropout": st.floats(0, 0.5),
    "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
    "fan_in_fan_out": st.booleans(),
    "trainable_token_indices": st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True),
}  # fmt: skip


@st.composite
def configurations(draw):
    """What LoraConfig is given: a few options at a time, as most of them exclude each other."""
    chosen = {"r": draw(ranks), "lora_alpha": draw(alphas), "target_modules": draw(targets)}
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=4, unique=True)):
        chosen[name] = draw(options[name])
    if "layers_to_transform" in chosen:
        chosen["target_modules"] = draw(st.lists(modules, min_size=1, max_size=4, unique=True))
        chosen["layers_pattern"] = draw(st.sampled_from(["layers", ["layers"], None]))
    return chosen


def change_array(change):
    """A damage of one array, drawn by its place."""

    def damage(arrays, config, place):
        name = sorted(arrays)[place % len(arrays)]
        change(arrays, name)

    return damage


def set_value(key, value):
    return lambda arrays, config, place: config.__setitem__(key, value)


def fill(number):
    return change_array(lambda arrays, name: arrays[name].fill_(number))


DAMAGES = {
    "nothing": lambda arrays, config, place: None,
    "an array is missing": change_array(lambda arrays, name: arrays.pop(name)),
    "an array is called otherwise": change_array(
        lambda arrays, name: arrays.__setitem__(name.replace("layers.0", "layers.7") + "x", arrays.pop(name))
    ),
    "a prefix is missing": change_array(
        lambda arrays, name: arrays.__setitem__(name.removeprefix("base_model."), arrays.pop(name))
    ),
    "an array more": change_array(
        lambda arrays, name: arrays.__setitem__("base_model.model.x.lora_A.weight", arrays[name].clone())
    ),
    "an array is transposed": change_array(lambda arrays, name: arrays.__setitem__(name, arrays[name].T.contiguous())),
    "a row less": change_array(lambda arrays, name: arrays.__setitem__(name, arrays[name][:-1].contiguous())),
    "an axis more": change_array(lambda arrays, name: arrays.__setitem__(name, arrays[name][None].contiguous())),
    "bytes": change_array(lambda arrays, name: arrays.__setitem__(name, arrays[name].to(torch.int8))),
    "doubles": change_array(lambda arrays, name: arrays.__setitem__(name, arrays[name].double())),
    "halves": change_array(lambda arrays, name: arrays.__setitem__(name, arrays[name].half())),
    "not a number": fill(float("nan")),
    "infinite": fill(float("inf")),
    "zeros": fill(0.0),
    "another rank": lambda arrays, config, place: config.update(r=config["r"] + 1),
    "no rank": set_value("r", 0),
    "a rank of text": set_value("r", "8"),
    "alpha of text": set_value("lora_alpha", "16"),
    "alpha beyond numbers": set_value("lora_alpha", 10**400),
    "another method": set_value("peft_type", "IA3"),
    "an unknown key": set_value("lora_gamma", 3),
    "another base": set_value("base_model_name_or_path", None),
    "a pattern that is none": set_value("rank_pattern", {"(": 3}),
    "other modules": set_value("target_modules", ["nothing"]),
    "no modules": set_value("target_modules", None),
    "a mixture": set_value("use_qalora", True),
    "inference off": set_value("inference_mode", False),
}  # fmt: skip


def made_by_peft(model, folder, configuration, dtype):
    """Whether PEFT makes such an adapter: of some configurations it says that they are none."""
    try:
        matrix.make_peft(model, folder, dtype, configuration)
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, AttributeError):
        return False
    return True


def damaged(folder, damage, place, damages=DAMAGES, file="adapter_model.safetensors"):
    arrays = safetensors_torch.load_file(str(folder / file))
    config = json.loads((folder / "adapter_config.json").read_text())
    damages[damage](arrays, config, place)
    safetensors_torch.save_file(arrays, str(folder / file), {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def kind_of(damage):
    return "sound" if damage == "nothing" else "damaged"


def require_one_line(error):
    text = str(error)
    assert text.strip()
    assert "\n" not in text


def logits_by_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return matrix.torch_logits(peft.PeftModel.from_pretrained(model, str(folder)).eval())


def in_float32(folder):
    """The adapter with its values in float32, as PEFT computes: mlx-lm takes DoRA's norms in the adapter's own type."""
    adapter = Adapter.load(folder)
    weights = {name: value.astype(mx.float32) for name, value in adapter.weights.items()}
    return Adapter.load(replace(adapter, weights=weights, path=None).save(folder.with_name("wide")))


def require_same(ours, theirs):
    scale = max(1.0, max(np.abs(row).max() for row in theirs))
    assert matrix.largest(ours, theirs) < 2e-4 * scale


def try_peft(folders, torch_bases, outcomes, family, configuration, dtype, damage, place):  # noqa: F811
    """One adapter made by PEFT: read to the same logits, or refused in one line."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if not made_by_peft(torch_bases(family), work / "theirs", configuration, dtype):
            outcomes["not made"] += 1
            return
        damaged(work / "theirs", damage, place)
        try:
            convert_from_peft(work / "theirs", base_layers(folders(family)), work / "ours")
        except RsgwmError as error:
            require_one_line(error)
            assert not (work / "ours").exists()
            outcomes[f"{kind_of(damage)} refused"] += 1
            return
        ours = matrix.mlx_logits(folders(family), in_float32(work / "ours"))
        require_same(ours, logits_by_peft(torch_bases(family), work / "theirs"))
        outcomes[f"{kind_of(damage)} read"] += 1


peft_adapters = {
    "family": st.sampled_from(FAMILIES),
    "configuration": configurations(),
    "dtype": st.sampled_from(matrix.DTYPES),
}


inside = st.sampled_from(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj",
                          "mlp.gate_proj", "mlp.down_proj"])  # fmt: skip
keys = st.one_of(
    st.lists(inside, min_size=1, max_size=4, unique=True),
    st.lists(st.one_of(inside, full_names, st.sampled_from(["model.embed_tokens", "lm_head"])), min_size=1, max_size=3,
             unique=True),
)  # fmt: skip
MLX_DAMAGES = {
    **{name: DAMAGES[name] for name in ("nothing", "not a number", "infinite", "zeros")},
    **{name: DAMAGES[name] for name in ("an array is missing", "an array is called otherwise", "an array more")},
    **{name: DAMAGES[name] for name in ("an array is transposed", "a row less", "an axis more", "bytes", "halves")},
    "another rank": lambda arrays, config, place: config["lora_parameters"].update(rank=17),
    "a scale of text": lambda arrays, config, place: config["lora_parameters"].update(scale="big"),
    "a scale beyond numbers": lambda arrays, config, place: config["lora_parameters"].update(scale=10**400),
    "no scale": lambda arrays, config, place: config["lora_parameters"].pop("scale"),
    "other keys": lambda arrays, config, place: config["lora_parameters"].update(keys=["mlp.nothing"]),
    "more layers": set_value("num_layers", 99),
    "fewer layers": set_value("num_layers", 1),
    "half a layer": set_value("num_layers", 1.5),
    "another kind": set_value("fine_tune_type", "ia3"),
    "no parameters": set_value("lora_parameters", None),
}
mlx_adapters = {
    "family": st.sampled_from(FAMILIES),
    "parameters": st.fixed_dictionaries(
        {"rank": ranks, "scale": st.floats(0.125, 16.0, width=32), "dropout": st.sampled_from([0.0, 0.1]), "keys": keys}
    ),
    "layers": st.sampled_from([-1, 1, 2, matrix.LAYERS]),
    "dora": st.booleans(),
    "seed": st.integers(0, 9),
}


def make_mlx(base, folder, parameters, layers, dora, seed):
    """A folder as ``mlx_lm.lora`` writes it, every trained value drawn at random."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = load_base(str(base), dtype="float32").model
    model.freeze()
    linear_to_lora_layers(model, matrix.LAYERS if layers == -1 else layers, parameters, use_dora=dora)
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, value in tree_flatten(model.trainable_parameters()):
        drawn = mx.array(rng.standard_normal(value.shape).astype(np.float32))
        arrays[name] = value * (1 + 0.1 * drawn) if name.endswith(".m") else 0.1 * drawn
    if not arrays:  # lm_head of a base that has none of its own
        raise ValueError("nothing is adapted")
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "model": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def mlx_lm_logits(base, folder):
    from mlx_lm.tuner.utils import load_adapters

    model = load_base(str(base), dtype="float32").model
    load_adapters(model, str(folder))
    model.eval()
    return [np.array(model(mx.array([ids]))[0]) for ids in matrix.IDS]


def try_mlx(folders, torch_bases, outcomes, family, parameters, layers, dora, seed, damage, place):  # noqa: F811
    """One adapter made by mlx-lm: PEFT computes the same with what it is converted to, or it is refused in one line."""
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), folders(family)
        try:
            make_mlx(base, work / "theirs", parameters, layers, dora, seed)
        except (ValueError, AttributeError):
            outcomes["not made"] += 1
            return
        damaged(work / "theirs", damage, place, MLX_DAMAGES, "adapters.safetensors")
        try:
            convert_to_peft(work / "theirs", str(base), work / "ours")
        except RsgwmError as error:
            require_one_line(error)
            assert not (work / "ours").exists()
            outcomes[f"{kind_of(damage)} refused"] += 1
            return
        if damage in ("fewer layers", "other keys"):  # mlx-lm refuses arrays that these leave out; here arrays count
            sound = {"num_layers": -1, "lora_parameters": parameters}
            config = json.loads((work / "theirs" / "adapter_config.json").read_text())
            (work / "theirs" / "adapter_config.json").write_text(json.dumps({**config, **sound}))
        file = str(work / "theirs" / "adapters.safetensors")
        wide = {name: value.astype(mx.float32) for name, value in mx.load(file).items()}  # as `in_float32`
        mx.eval(wide)
        mx.save_safetensors(file, wide)
        require_same(logits_by_peft(torch_bases(family), work / "ours"), mlx_lm_logits(base, work / "theirs"))
        outcomes[f"{kind_of(damage)} read"] += 1


def damage_of(drawn, damages):
    """A damage, or none, and its place: of what else is drawn, evenly, where Hypothesis would favour a few."""
    number = zlib.crc32(repr(sorted(drawn.items())).encode())
    return "nothing" if number % 2 else sorted(damages)[number // 2 % len(damages)], number >> 10


def many(strategies, attempt, damages, count):
    """Outcomes of so many examples, of which enough are read and enough refused."""
    outcomes = Counter()

    @seed(count)  # derandomize=True draws by the function's digest, which differs between runs of a closure
    @settings(ANYTHING, max_examples=count)
    @given(**strategies)
    def each(**drawn):
        damage, place = damage_of(drawn, damages)
        attempt(outcomes, **drawn, damage=damage, place=place)

    each()
    tried = sum(outcomes.values())
    assert outcomes["sound read"] > tried / 8, outcomes  # or the rest would prove nothing
    assert outcomes["damaged refused"] > tried / 20, outcomes
    return outcomes


def test_adapters_of_peft(folders, torch_bases):  # noqa: F811
    many(peft_adapters, partial(try_peft, folders, torch_bases), DAMAGES, QUICK[0])


def test_adapters_of_mlx_lm(folders, torch_bases):  # noqa: F811
    many(mlx_adapters, partial(try_mlx, folders, torch_bases), MLX_DAMAGES, QUICK[1])


@pytest.mark.slow
def test_many_more_adapters_of_peft(folders, torch_bases):  # noqa: F811
    tried = many(peft_adapters, partial(try_peft, folders, torch_bases), DAMAGES, fed.at_most(MANY[0]))
    fed.keep("random adapters", "made by PEFT", tried.total() - tried["not made"], MANY[0], 0)


@pytest.mark.slow
def test_many_more_adapters_of_mlx_lm(folders, torch_bases):  # noqa: F811
    tried = many(mlx_adapters, partial(try_mlx, folders, torch_bases), MLX_DAMAGES, fed.at_most(MANY[1]))
    fed.keep("random adapters", "made by mlx-lm", tried.total() - tried["not made"], MANY[1], 0)
