"""Ways to few bits, compared: each number is that of the model that would be written, and the advice follows them."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.fuse.error_feedback import round_by_feedback
from mlx_rsgwm.converters.fuse.fuse import fuse
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.linalg.gram import WholeGram
from mlx_rsgwm.merging.quantisation_vector import extract, patch
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.studies.rounding_remedies import REMEDIES, Remedy, RoundedBase, compare_remedies, recommend
from mlx_rsgwm.training.losses import row_nats

THREE = QuantFormat(3, 32)
KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture
def corpus(tmp_path):
    rows = make_rows(generate("change", 12, 1, "train"), 12, 0, 1)
    return save_corpus(tmp_path / "corpus", rows, TEMPLATES["plain"], {"seed": 1})


@pytest.fixture
def rows(base, corpus):
    return corpus.token_rows(base.tokenizer, 1024, "drop")[0]


@pytest.fixture
def adapter(make_adapter):
    return make_adapter(1, keys=KEYS, size=0.3)


@pytest.fixture
def vector(make_adapter):
    through, plain = (make_adapter(seed, keys=KEYS, size=0.2) for seed in (2, 3))
    through.manifest["config"] = {"qat": {"bits": 3, "group_size": 32, "mode": "affine"}}
    return extract(through, plain)


@pytest.fixture
def grams(adapter):
    rng = np.random.default_rng(7)
    moments = {}
    for name, a, _ in adapter.factors():
        x = rng.standard_normal((200, 6)) @ rng.standard_normal((6, a.shape[0])) + 0.05 * rng.standard_normal(
            (200, a.shape[0])
        )
        moments[name] = WholeGram(x.T @ x / 200)
    return moments


def nll(model, rows):
    nats, counts = row_nats(model, rows, 8)
    return nats.sum() / counts.sum()


def written(folder):
    """A fused model in memory, its arrays' size, and the share of the update that fusing measured."""
    arrays = mx.load(str(folder / "model.safetensors"))
    told = json.loads((folder / "fuse.json").read_text())
    return load_base(str(folder), "float32").model, sum(value.nbytes for value in arrays.values()), told


def test_every_number_is_that_of_the_model_that_would_be_written(
    base, tiny_base, rows, adapter, vector, grams, tmp_path
):
    before = dict(tree_flatten(base.model.parameters()))
    comparison = compare_remedies(base, adapter, THREE, rows, vector, 1.0, grams)
    assert all(value is before[name] for name, value in tree_flatten(base.model.parameters()))
    told = {remedy.remedy: remedy for remedy in comparison.remedies}
    assert tuple(told) == REMEDIES
    assert comparison.not_tried == {}
    ways = {
        "plain": (adapter, None), "feedback": (adapter, grams),
        "vector": (patch(adapter, vector), None), "vector_feedback": (patch(adapter, vector), grams),
    }  # fmt: skip
    for name, (source, moments) in ways.items():
        fuse(source, str(tiny_base), tmp_path / name, target=THREE, grams=moments, force=True)
        model, size, fused = written(tmp_path / name)
        assert told[name].nll == pytest.approx(nll(model, rows), rel=1e-3)
        assert told[name].bytes == size
        assert told[name].survives == pytest.approx(fused["share"], rel=1e-4)
        if source is adapter:
            assert told[name].kept == pytest.approx(fused["share"], rel=1e-4)
            assert told[name].error == pytest.approx(fused["error"], rel=1e-4)
    model = load_base(str(tiny_base), "float32").model
    nn.quantize(model, 32, 3)
    assert comparison.base_nll == pytest.approx(nll(model, rows), rel=1e-3)
    assert told["unfused"].bytes == told["plain"].bytes + sum(value.nbytes for value in adapter.weights.values())
    assert (told["unfused"].kept, told["unfused"].error) == (1.0, 0.0)
    with_adapter = adapted_nll(model, adapter, rows, tmp_path)
    assert told["unfused"].nll == pytest.approx(with_adapter, rel=1e-3)
    dense = adapted_nll(load_base(str(tiny_base), "float32").model, adapter, rows, tmp_path)
    assert comparison.float_nll == pytest.approx(dense, rel=1e-4)
    best = min(told.values(), key=lambda remedy: remedy.nll)
    for remedy in told.values():
        assert remedy.worse == pytest.approx(remedy.nll - best.nll, abs=1e-9)
        assert remedy.low <= remedy.worse <= remedy.high
    json.dumps(comparison.to_dict(), allow_nan=False)


def adapted_nll(model, adapter, rows, folder):
    """With mlx-lm's own layers on the model."""
    from mlx_lm.tuner.utils import load_adapters

    load_adapters(model, str(adapter.save(folder / "adapter")))
    model.eval()
    return nll(model, rows)


@pytest.mark.parametrize("quant", [QuantFormat(4, 32), QuantFormat(4, 32, "mxfp4"), QuantFormat(3, mode="symmetric")])
def test_a_rounded_base_by_itself(tiny_base, base, adapter, quant):
    rounded = RoundedBase(base, quant)
    module = adapter.modules()[0]
    a, b = (adapter.weights[f"{module}.{leaf}"] for leaf in ("lora_a", "lora_b"))
    weight = dict(base.model.named_modules())[module].weight
    expected = quant.round_trip(weight + adapter.spec.scale * (b.T @ a.T))
    assert mx.array_equal(rounded.sums(adapter)[module], expected).item()
    with rounded.using({}):
        assert mx.array_equal(dict(base.model.named_modules())[module].weight, quant.round_trip(weight)).item()
    entries = {name: layer for name, layer in base.model.named_modules() if hasattr(layer, "to_quantized")}
    rows, size = (sum(f(layer.weight) for layer in entries.values()) for f in (lambda w: w.shape[0], lambda w: w.size))
    norms = 5 * 32 * 4  # RMS norms stay floats
    scales = {"affine": size // 32 * 8, "mxfp4": size // 32, "symmetric": rows * 4}[quant.mode]
    assert rounded.bytes == size * quant.bits // 8 + scales + norms


def test_ways_without_what_they_need_are_named(base, rows, adapter, grams):
    plain = compare_remedies(base, adapter, THREE, rows)
    assert [remedy.remedy for remedy in plain.remedies] == ["plain", "unfused"]
    assert set(plain.not_tried) == {"feedback", "vector", "vector_feedback"}
    assert "directions collect ADAPTER" in plain.not_tried["feedback"]
    newer = compare_remedies(base, adapter, QuantFormat(4, 32, "mxfp4"), rows, grams=grams)
    assert "not for mxfp4" in newer.not_tried["feedback"]


def test_what_cannot_be_compared(base, rows, adapter):
    with pytest.raises(RsgwmError, match=r"MLX stores no 3 bits \(symmetric\)"):
        compare_remedies(base, adapter, QuantFormat(3, mode="symmetric"), rows)
    with pytest.raises(RsgwmError, match="does not divide the 32 columns"):
        compare_remedies(base, adapter, QuantFormat(4, 64), rows)
    nn.quantize(base.model, 32, 4)
    with pytest.raises(RsgwmError, match="quantised already"):
        compare_remedies(base, adapter, THREE, rows)


def remedy(name, nll, low=0.0, size=100):
    return Remedy(name, nll, nll - 1.0, low, nll - 1.0 + 0.1, 1.0, 0.0, 1.0, size)


def test_the_smallest_of_the_ways_that_are_not_clearly_worse_is_recommended():
    clear = [remedy("plain", 1.5, 0.3), remedy("vector", 1.0), remedy("unfused", 1.2, 0.1, 150)]
    assert recommend(clear)[0] == "vector"
    assert "the least loss: the adapter unfused is worse by 0.2000" in recommend(clear)[1]
    near = [remedy("plain", 1.1, -0.01), remedy("vector", 1.05, -0.2), remedy("unfused", 1.0, 0.0, 5_000_100)]
    name, reason = recommend(near)
    assert name == "plain"
    assert "not clearly worse than the adapter unfused (+0.1000 nats" in reason
    assert "5.0 MB smaller" in reason
    alike = [remedy("plain", 1.1, -0.01), remedy("vector", 1.0)]
    assert recommend(alike)[0] == "plain"
    assert recommend(alike)[1].endswith("and simpler")


def test_error_feedback_is_written_as_it_was_measured(tiny_base, adapter, grams, tmp_path):
    result = fuse(adapter, str(tiny_base), tmp_path / "out", target=THREE, grams=grams, force=True)
    assert result["by_feedback"] == 6
    model, _, _ = written(tmp_path / "out")
    weights = dict(load_base(str(tiny_base), "float32").model.named_modules())
    for name, a, b in adapter.factors():
        layer = dict(model.named_modules())[name]
        fused = weights[name].weight + adapter.spec.scale * (b.T @ a.T)
        dense = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 3)
        expected = round_by_feedback(fused, grams[name].dense(), THREE).dense()
        # The factors are multiplied in another order there, and a value halfway between two steps may go either way.
        assert mx.isclose(dense, expected, atol=1e-4).mean().item() > 0.99
    with pytest.raises(RsgwmError, match="is for formats of few bits"):
        fuse(adapter, str(tiny_base), tmp_path / "float", target="float16", grams=grams)
    fewer = {name: WholeGram(np.eye(8)) for name in grams}
    with pytest.raises(RsgwmError, match="directions of 8 inputs"):
        fuse(adapter, str(tiny_base), tmp_path / "eight", target=THREE, grams=fewer)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tiny_base, tmp_path_factory):
    """Three adapters of one task: plain, through rounding, and without directions; the vector of the first two."""
    tmp_path = tmp_path_factory.mktemp("work")
    rows = make_rows(generate("change", 12, 1, "train"), 12, 0, 1)
    save_corpus(tmp_path / "corpus", rows, TEMPLATES["plain"], {"seed": 1})
    small = ("--rank", 2, "--steps", 3, "--batch-size", 4, "--base", tiny_base, "--corpus", tmp_path / "corpus")
    invoke("train", *small, "--out", tmp_path / "plain")
    invoke("train", *small, "--out", tmp_path / "bare", "--directions", 0)
    invoke("train", *small, "--out", tmp_path / "through", "--qat", "3,32")
    invoke("quantvec", "extract", "--qat", tmp_path / "through", "--plain", tmp_path / "plain", "--out",
           tmp_path / "vector")  # fmt: skip
    invoke("train", *small, "--out", tmp_path / "row", "--qat", "3,symmetric")
    invoke("quantvec", "extract", "--qat", tmp_path / "row", "--plain", tmp_path / "plain", "--out", tmp_path / "rows")
    elsewhere = Adapter.load(tmp_path / "vector")
    elsewhere.manifest["base"] = {"name": "other", "fingerprint": "0" * 64}
    elsewhere.save(tmp_path / "elsewhere")
    return tmp_path


def invoke(*arguments, code=0):
    told = CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])
    assert told.exit_code == code, told.output
    return told


def test_the_command_compares_and_writes_nothing(work):
    before = sorted(path.name for path in work.iterdir())
    rows = ("--data", "groups", "--data-rows", 8)
    told = invoke("fuse", work / "plain", "--compare", "--vector", work / "vector", *rows, "--json")
    result = json.loads(told.stdout.splitlines()[-1])
    assert [row["remedy"] for row in result["remedies"]] == list(REMEDIES)
    assert all({"nll", "kept", "bytes"} <= row.keys() for row in result["remedies"])
    assert result["recommended"] in REMEDIES
    assert result["reason"]
    assert result["quant"] == {"bits": 3, "group_size": 32, "mode": "affine"}
    assert result["rows"] == 8
    assert "take " in told.stderr
    chosen = next(row for row in result["remedies"] if row["remedy"] == result["recommended"])
    assert ("rsgwm fuse needs --min-share" in told.stderr) == (chosen["survives"] < 0.9)
    assert sorted(path.name for path in work.iterdir()) == before
    bare = invoke("fuse", work / "bare", "--compare", "--bits", "3,32", "--data", "groups", "--data-rows", 8)
    assert "error feedback             not tried: the adapter has no directions" in bare.stdout


def test_a_folder_of_pefts_is_compared_like_ours(work, tiny_base):
    """A conversion keeps the directions in its sidecar."""
    invoke("convert", "to-peft", work / "plain", "--out", work / "peft")
    rows = ("--data", "groups", "--data-rows", 8, "--bits", "3,32", "--base", tiny_base, "--json")
    first, second = (
        json.loads(invoke("fuse", work / name, "--compare", *rows).stdout.splitlines()[-1])
        for name in ("plain", "peft")
    )
    assert "feedback" in [row["remedy"] for row in first["remedies"]]
    assert second["remedies"] == first["remedies"]


def test_the_command_fuses_with_a_vector_and_by_feedback(work):
    made = invoke("fuse", work / "plain", "--vector", work / "vector", "--out", work / "out", "--force", "--json")
    result = json.loads(made.stdout.splitlines()[-1])
    assert result["adapter"] == f"{work / 'plain'} + 1 · {work / 'vector'}"
    config = json.loads((work / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 3, "mode": "affine"}
    sums = patch(Adapter.load(work / "plain"), Adapter.load(work / "vector"), 0.5)
    invoke("fuse", work / "plain", "--vector", work / "vector", "--lambda", "0.5", "--out", work / "half", "--force")
    fuse(sums, None, work / "expected", target=THREE, force=True)
    arrays, expected = (mx.load(str(work / name / "model.safetensors")) for name in ("half", "expected"))
    assert all(mx.array_equal(value, expected[name]).item() for name, value in arrays.items())
    four = invoke("fuse", work / "plain", "--vector", work / "vector", "--bits", "4,32", "--out", work / "4", "--force")
    assert "is for 3 bits in groups of 32, not for 4 bits" in four.stderr
    feedback = ("fuse", work / "plain", "--bits", "3,32", "--feedback", "--force", "--json")
    result = json.loads(invoke(*feedback, "--out", work / "feedback").stdout.splitlines()[-1])
    assert result["by_feedback"] == 8
    mxfp4 = ("fuse", work / "plain", "--bits", "4,mxfp4", "--force", "--out", work / "mxfp4")
    invoke(*mxfp4)
    assert load_base(str(work / "mxfp4")).model.layers[0].mlp.up_proj.mode == "mxfp4"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--bits", "4,32", "--format", "4bit"), "give one of them"),
        (("--bits", "7"), "MLX has no 7 bits"),
        (("--bits", "4,32", "--vector", "plain"), "is no quantization vector"),
        (("--format", "4bit", "--vector", "vector"), "give --bits instead of --format"),
        (("--vector", "rows"), "MLX stores no 3 bits (symmetric)"),
        (("--lambda", "2"), "--lambda is for --vector"),
        (("--data", "groups"), "--data is for --compare"),
        (("--feedback", "--format", "float16"), "say to how many with --bits"),
        (("--vector", "elsewhere"), "which have other weights"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(work, monkeypatch, arguments, reason):
    monkeypatch.chdir(work)
    told = invoke("fuse", "plain", *arguments, "--out", "new", "--quiet", code=2)
    assert reason in told.stderr
    assert len(told.stderr.splitlines()) == 1
    assert not (work / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("plain", "--data", "groups"), "say to how many with --bits"),
        (("plain", "--bits", "3,32"), "--compare needs --data"),
        (("plain", "--bits", "3,32", "--data", "groups", "--out", "new"), "leave out --feedback and --out"),
        (("plain", "--bits", "3,64", "--data", "groups"), "does not divide the 32 columns"),
        (("plain", "--bits", "3,32", "--data", "corpus"), "were left out, since it was trained on them"),
    ],
)
def test_what_the_command_cannot_compare(work, monkeypatch, arguments, reason):
    monkeypatch.chdir(work)
    told = invoke("fuse", *arguments, "--compare", "--quiet", code=2)
    assert reason in told.stderr
    assert len(told.stderr.splitlines()) == 1
    assert not (work / "new").exists()


def test_a_vector_is_no_adapter_to_fuse(work, monkeypatch):
    monkeypatch.chdir(work)
    told = invoke("fuse", "vector", "--bits", "3,32", "--out", "new", "--quiet", code=2)
    assert "vector is a quantization vector: put it on an adapter" in told.stderr
    assert not (work / "new").exists()


def test_without_out_there_is_nowhere_to_write(work):
    told = invoke("fuse", work / "plain", "--bits", "3,32", code=2)
    assert "missing option --out" in told.stderr
