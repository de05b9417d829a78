"""Parity with torch: what is right passes, and every planted fault is caught."""

from __future__ import annotations

import builtins
import json
import logging
import shutil
import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.converters.parity.check import check_parity
from mlx_rsgwm.converters.parity.mlx import exact_float32
from mlx_rsgwm.converters.parity.torch import torch_device
from mlx_rsgwm.converters.parity.trace import Logits, Trace, perplexity
from mlx_rsgwm.converters.parity.verdict import compare_continuations, compare_logits
from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.core.files import sha256_file
from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.models.base import load_base

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LAYERS, VOCABULARY, RANK = 2, 96, 4
# q is square and v is not, so that swapped factors still have legal shapes in one of them.
KEYS = ("self_attn.q_proj", "self_attn.v_proj")
IDS = [[1, 5, 9, 2, 33, 70, 41], [8, 95, 3]]


@pytest.fixture(scope="module")
def base_folder(make_torch_llama, tmp_path_factory):
    return make_torch_llama(tmp_path_factory.mktemp("base"), 0, LAYERS, VOCABULARY)


def make_adapter(size=0.2, dtype=mx.float32, manifest=None, scale=2.0):
    key, weights = mx.random.key(7), {}
    for layer in range(LAYERS):
        for name, out_dims in zip(KEYS, (64, 32), strict=True):
            key, one, two = mx.random.split(key, 3)
            module = f"model.layers.{layer}.{name}"
            weights[f"{module}.lora_a"] = (size * mx.random.normal((64, RANK), key=one)).astype(dtype)
            weights[f"{module}.lora_b"] = (size * mx.random.normal((RANK, out_dims), key=two)).astype(dtype)
    return Adapter(LoraSpec(RANK, scale, 0.3, KEYS, -1), weights, manifest=manifest or {})


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def adapter_folder(tmp_path):
    return make_adapter().save(tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": mx.bfloat16}, {"dtype": mx.float16}, {"size": 0.005}, {"scale": 20.0, "size": 0.1}],
    ids=["float32", "bfloat16", "float16", "faint", "strong"],
)
def test_a_right_adapter_passes(base_folder, tmp_path, settings):
    folder = make_adapter(**settings).save(tmp_path / "adapter")
    result = check_parity(folder, str(base_folder), device="cpu", token_ids=IDS, tolerance=1e-4)
    assert result["failures"] == []
    assert result["passed"] is True
    assert result["max_abs_logit"] <= 1e-4
    assert result["effect_mlx"] == pytest.approx(result["effect_torch"], rel=0.05)
    assert (result["tokens"], result["modules"], result["device"]) == (10, 4, "cpu")
    json.dumps(result, allow_nan=False)


def test_the_default_texts_go_through_the_tokenizer(base_folder, adapter_folder):
    assert check_parity(adapter_folder, str(base_folder), device="cpu")["tokens"] > 20


# --- planted faults ---------------------------------------------------------------------------------------------

PREFIX = "base_model.model.model.layers."
FAINT_TOLERANCE = 0.1


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_arrays(folder, change):
    path = str(folder / "adapter_model.safetensors")
    mx.save_safetensors(path, change(dict(mx.load(path))), {"format": "pt"})


def without_transpose(arrays):
    """Rows and columns read in the wrong order: the same shape, other places."""
    return {name: value.T.reshape(value.shape) for name, value in arrays.items()}


def swapped_modules(arrays):
    """Layer 0's and layer 1's factors exchanged."""
    return {
        name.replace(".0.", ".#.").replace(".1.", ".0.").replace(".#.", ".1."): value for name, value in arrays.items()
    }


def swapped_factors(arrays):
    """A where B belongs and the reverse, as far as shapes allow (q is square)."""
    return {
        name: arrays[name.replace("lora_A", "#").replace("lora_B", "lora_A").replace("#", "lora_B")].T
        if "q_proj" in name
        else value
        for name, value in arrays.items()
    }


def dropped_layer(arrays):
    return {name: value for name, value in arrays.items() if f"{PREFIX}1." not in name}


def zeroed(arrays):
    name = f"{PREFIX}1.self_attn.v_proj.lora_B.weight"
    return {**arrays, name: mx.zeros_like(arrays[name])}


def one_nan(arrays):
    name = f"{PREFIX}1.self_attn.q_proj.lora_A.weight"
    return {**arrays, name: arrays[name] * float("nan")}


# name: (what is done to the PEFT folder, the first layer that differs then)
FIRST, MIDDLE, LAST = "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"
FAULTS = {
    "missing transpose": (lambda folder: edit_arrays(folder, without_transpose), FIRST),
    "swapped layers": (lambda folder: edit_arrays(folder, swapped_modules), FIRST),
    "swapped factors": (lambda folder: edit_arrays(folder, swapped_factors), FIRST),
    "alpha for scale": (lambda folder: edit_config(folder, lora_alpha=2), FIRST),
    "alpha two per cent off": (lambda folder: edit_config(folder, lora_alpha=8.16), FIRST),
    "rank-stabilised by mistake": (lambda folder: edit_config(folder, use_rslora=True), FIRST),
    "one alpha off": (lambda folder: edit_config(folder, alpha_pattern={"layers.1.self_attn.v_proj": 9}), LAST),
    "layer dropped from the config": (lambda folder: edit_config(folder, layers_to_transform=[0]), MIDDLE),
    "module dropped from the config": (
        lambda folder: edit_config(folder, target_modules=["self_attn.q_proj"]),
        "layers.0.self_attn.v_proj",
    ),
    "layer dropped from the arrays": (lambda folder: edit_arrays(folder, dropped_layer), MIDDLE),
    "one module zeroed": (lambda folder: edit_arrays(folder, zeroed), LAST),
    "names that PEFT does not know": (
        lambda folder: edit_arrays(
            folder, lambda arrays: {name.removeprefix("base_model.model."): value for name, value in arrays.items()}
        ),
        FIRST,
    ),
    "sign": (lambda folder: edit_config(folder, lora_alpha=-8), FIRST),
    "one value not a number": (lambda folder: edit_arrays(folder, one_nan), MIDDLE),
}


def parity_of_converted(base_folder, folder, tmp_path, fault=None):
    """Parity of an adapter so faint that its whole effect is within the tolerance."""
    peft_folder = to_peft(Adapter.load(folder), str(base_folder), tmp_path / "peft")
    if fault is not None:
        fault(peft_folder)
    return check_parity(
        folder, str(base_folder), peft_folder=peft_folder, device="cpu", token_ids=IDS, tolerance=FAINT_TOLERANCE
    )


def test_the_faint_adapter_passes_and_its_effect_is_within_the_tolerance(base_folder, tmp_path):
    result = parity_of_converted(base_folder, make_adapter(size=0.01).save(tmp_path / "adapter"), tmp_path)
    assert result["failures"] == []
    assert result["effect_torch"] < FAINT_TOLERANCE


@pytest.mark.parametrize(("fault", "layer"), FAULTS.values(), ids=list(FAULTS))
def test_a_planted_fault_is_caught_and_its_first_layer_named(base_folder, tmp_path, fault, layer):
    result = parity_of_converted(base_folder, make_adapter(size=0.01).save(tmp_path / "adapter"), tmp_path, fault)
    assert not result["passed"]
    assert result["first_difference"]["layer"] == f"model.{layer}"
    assert f"the first layer that differs is model.{layer}" in result["failures"][0]
    json.dumps(result, allow_nan=False)


def test_another_base_is_named_by_its_first_block(base_folder, tmp_path, make_torch_llama, monkeypatch):
    """The fingerprint would stop it sooner: here torch is given other weights behind its back."""
    import mlx_rsgwm.converters.parity.check as parity

    folder = make_adapter().save(tmp_path / "adapter")
    other = make_torch_llama(tmp_path / "other", 0, LAYERS, VOCABULARY)
    arrays = dict(mx.load(str(other / "model.safetensors")))
    name = "model.layers.1.mlp.up_proj.weight"
    mx.save_safetensors(str(other / "model.safetensors"), {**arrays, name: arrays[name] + 0.1}, {"format": "pt"})
    monkeypatch.setattr(parity, "dense_base", lambda path, out: other)
    result = check_parity(folder, str(base_folder), device="cpu", token_ids=IDS)
    assert result["first_difference"]["layer"] == "block 1 of the bare base"


def test_a_window_that_mlx_lm_does_not_apply_is_named(base_folder, tmp_path):
    """mlx-lm's Mistral attends to everything: the same model on texts up to the window."""
    base = shutil.copytree(base_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mistral", "sliding_window": 6}))
    folder = make_adapter().save(tmp_path / "adapter")
    beyond = check_parity(folder, str(base), device="cpu", token_ids=IDS, continuation=0)
    assert not beyond["passed"]
    assert "does not apply this model's window of 6 tokens" in beyond["failures"][0]
    assert "up to 7" in beyond["failures"][0]
    within = check_parity(folder, str(base), device="cpu", token_ids=[ids[:4] for ids in IDS], continuation=2)
    assert (within["failures"], within["window_left_out"]) == ([], 6)


def test_factors_that_do_not_fit_are_one_line(base_folder, adapter_folder, tmp_path):
    peft_folder = to_peft(Adapter.load(adapter_folder), str(base_folder), tmp_path / "peft")
    edit_arrays(peft_folder, lambda arrays: {name: value.T for name, value in arrays.items()})
    with pytest.raises(AdapterError, match="PEFT cannot load") as caught:
        check_parity(adapter_folder, str(base_folder), peft_folder=peft_folder, device="cpu", token_ids=IDS)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_effect_proves_nothing(base_folder, tmp_path):
    adapter = make_adapter()
    adapter.weights = {n: v * (0 if n.endswith("lora_b") else 1) for n, v in adapter.weights.items()}
    result = check_parity(adapter.save(tmp_path / "a"), str(base_folder), device="cpu", token_ids=IDS)
    assert not result["passed"]
    assert "the adapter changes nothing in MLX" in result["failures"]
    assert "the adapter changes nothing in torch" in result["failures"]


def logits(base=0.0, adapted=1.0, modules=2):
    return Logits(np.full((2, 3), base, np.float32), np.full((2, 3), adapted, np.float32), modules)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (logits(adapted=1.2), ["with the adapter differ", "what the adapter changes"]),
        (logits(base=0.2, adapted=1.2), ["with the adapter differ", "bare base differ"]),
        (logits(adapted=0.0), ["with the adapter", "what the adapter changes", "changes nothing in torch"]),
        (logits(modules=1), ["torch adapted 1 modules"]),
        (logits(adapted=np.nan), ["with the adapter differ", "what the adapter changes"]),
        (logits(), []),
    ],
)
def test_every_reason_to_fail_is_said(theirs, expected):
    result = compare_logits(logits(), theirs, 2, 1e-3)
    assert result["passed"] is (not expected)
    assert len(result["failures"]) == len(expected)
    assert all(part in text for part, text in zip(expected, result["failures"], strict=True))


def trace(continuations, margins):
    return Trace(logits(), continuations=continuations, margins=margins)


def test_a_continuation_may_part_only_at_a_tie():
    mine = trace([[1, 2, 3], [4, 5, 6]], [[9.0, 9.0, 9.0], [9.0, 0.001, 9.0]])
    same = compare_continuations(mine, trace([[1, 2, 3], [4, 5, 6]], []), 0.01)
    assert same == {"tokens": 6, "agree": 6, "failures": []}
    tie = compare_continuations(mine, trace([[1, 2, 3], [4, 7, 7]], []), 0.01)
    assert tie == {"tokens": 6, "agree": 4, "failures": []}
    apart = compare_continuations(mine, trace([[1, 9, 3], [4, 5, 6]], []), 0.01)
    assert (apart["agree"], apart["failures"]) == (4, ["greedy continuation 1 differs at token 2"])


def test_perplexity_is_that_of_the_definition():
    rows = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3] * 3, [0.2, 0.2, 0.6], [1 / 3] * 3]))
    assert perplexity(rows, [[0, 1, 1], [2, 2]]) == pytest.approx((0.25 * 0.8 * 0.6) ** (-1 / 3))
    assert perplexity(rows * np.nan, [[0, 1, 1], [2, 2]]) is None


def test_the_certificate_says_what_it_holds_for(base_folder, adapter_folder):
    result = check_parity(adapter_folder, str(base_folder), device="cpu")
    assert result["format"] == "mlx-rsgwm/parity"
    assert result["adapter_sha256"] == sha256_file(adapter_folder / "adapters.safetensors")
    assert result["base_fingerprint"] == load_base(str(base_folder)).fingerprint
    assert result["greedy"] == {"tokens": 48, "agree": 48}
    for kind in ("base", "adapted"):
        assert result["perplexity"]["mlx"][kind] == pytest.approx(result["perplexity"]["torch"][kind], rel=1e-4)
    assert result["layers_compared"] == 2 * LAYERS + LAYERS


# --- bad input --------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(base_folder, tmp_path, make_torch_llama):
    manifest = {"base": load_base(str(base_folder)).describe()}
    folder = make_adapter(manifest=manifest).save(tmp_path / "adapter")
    other = make_torch_llama(tmp_path / "other", 1, LAYERS, VOCABULARY)
    with pytest.raises(AdapterError, match=r"was made for .* not for"):
        check_parity(folder, str(other), device="cpu", token_ids=IDS)


def test_without_torch_the_error_says_how_to_get_it(base_folder, adapter_folder, monkeypatch):
    real = builtins.__import__

    def no_torch(name, *rest, **named):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(RsgwmError, match=r'needs peft: pip install "mlx-rsgwm\[torch\]"'):
        check_parity(adapter_folder, str(base_folder))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"tolerance": 0.0}, "tolerance must be a number above 0"),
    ],
)
def test_bad_options_are_one_line(base_folder, adapter_folder, options, expected):
    with pytest.raises(RsgwmError, match=expected):
        check_parity(adapter_folder, str(base_folder), **options)


@pytest.mark.parametrize(
    ("mps", "cuda", "expected"), [(True, True, "mps"), (False, True, "cuda"), (False, False, "cpu")]
)
def test_auto_is_a_device_that_is_there(monkeypatch, mps, cuda, expected):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert torch_device("auto") == torch_device(expected) == expected


def test_float32_that_is_not_float32_is_noticed(monkeypatch):
    with exact_float32() as device:
        assert device == str(mx.default_device().type).rpartition(".")[2]
    exact = mx.matmul
    # The device's products lose bits while those asked of the CPU stream do not: as on M5 with TF32.
    monkeypatch.setattr(mx, "matmul", lambda a, b, stream: exact(a, b, stream=stream) + 0.01)
    with exact_float32() as device:
        assert device == "cpu"


# --- the command ------------------------------------------------------------------------------------------------


def test_what_the_libraries_warn_of_is_not_passed_on(base_folder, adapter_folder):
    """The deprecations among transformers and PEFT are nothing that a user of ours could change."""
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = check_parity(adapter_folder, str(base_folder), device="cpu", token_ids=[[1, 5, 9]], continuation=2)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert result["passed"]
    assert not said


def test_the_command_passes_and_fails_with_exit_codes(base_folder, adapter_folder, tmp_path):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    run, options = CliRunner().invoke, ["--base", str(base_folder), "--quiet"]
    proof = tmp_path / "proof" / "parity.json"
    good = run(rsgwm, ["parity", str(adapter_folder), *options, "--out", str(proof)])
    assert good.exit_code == 0, good.output
    assert good.stdout.startswith("parity: max |Δlogit| ")
    assert good.stdout.splitlines()[0].endswith("— passed")
    assert "greedy: " in good.stdout
    peft_folder = to_peft(Adapter.load(adapter_folder), str(base_folder), tmp_path / "peft")
    edit_config(peft_folder, lora_alpha=4)
    bad = run(rsgwm, ["parity", str(adapter_folder), *options, "--json", "--peft", str(peft_folder)])
    assert bad.exit_code == 3
    assert json.loads(bad.stdout.splitlines()[-1])["passed"] is False
    assert "— failed" in bad.stderr
    assert "what the adapter changes differs" in bad.stderr
    exported = tmp_path / "exported"
    options = [
        "to-peft",
        str(adapter_folder),
        "--out",
        str(exported),
        "--base",
        str(base_folder),
        "--certificate",
        str(proof),
    ]
    embedded = run(rsgwm, ["convert", *options])
    assert embedded.exit_code == 0, embedded.output
    assert json.loads((exported / "mlx_rsgwm" / "parity.json").read_text()) == json.loads(proof.read_text())
