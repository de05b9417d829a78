"""Quantization vectors: exact differences and sums, what their manifests tell, and what is refused."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.merging.quantisation_vector import extract, patch, stacked, vector_format
from mlx_rsgwm.merging.vector_weight import WEIGHTS, choose_weight
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.training.rounded_losses import rounded_nats

QAT = {"bits": 3, "group_size": 32, "mode": "affine"}
KEYS = ("self_attn.q_proj", "mlp.down_proj")


def update(adapter, module):
    """ΔW of a module, float64; zero where it has none."""
    if f"{module}.lora_a" not in adapter.weights:
        return 0.0
    a, b = (np.array(adapter.weights[f"{module}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    return adapter.spec.scale * a @ b


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])


@pytest.fixture
def twins(make_adapter):
    """An adapter trained through rounding and its plain twin, in name."""
    through, plain = make_adapter(1, rank=4), make_adapter(2, rank=6, scale=0.5, keys=KEYS)
    through.manifest["config"] = {"rank": 4, "seed": 42, "qat": QAT}
    plain.manifest["config"] = {"rank": 6, "seed": 42}
    return through, plain


def test_a_vector_is_the_exact_difference(twins):
    through, plain = twins
    vector = extract(through, plain)
    modules = set(through.modules()) | set(plain.modules())
    assert set(vector.modules()) == modules
    assert vector.spec.rank == 10
    for module in modules:
        np.testing.assert_allclose(
            update(vector, module), update(through, module) - update(plain, module), rtol=1e-6, atol=1e-7
        )
    assert vector.manifest["kind"] == "quantization_vector"
    assert vector.manifest["quantization"] == QAT
    assert vector.manifest["base"] == through.manifest["base"]
    assert vector.manifest["trained_differently"] == ["rank"]
    assert vector_format(vector) == QuantFormat(3, 32)
    assert vector.manifest["sources"]["qat"]["sha256"] == through.content_hash()


@pytest.mark.parametrize("weight", [1.0, -0.5, 0.0])
def test_a_patched_adapter_is_the_exact_sum(twins, make_adapter, weight):
    receiver, vector = make_adapter(5, rank=3, scale=1.5), extract(*twins)
    patched = patch(receiver, vector, weight)
    assert patched.spec.rank == 13
    for module in vector.modules():
        expected = update(receiver, module) + weight * update(vector, module)
        np.testing.assert_allclose(update(patched, module), expected, rtol=1e-6, atol=1e-7)
    told = patched.manifest["quantization_vector"]
    assert (told["lambda"], told["zero_shot"], told["quantization"]) == (weight, True, QAT)
    assert patched.manifest["template"] == receiver.manifest["template"]
    assert not patched.problems()


def test_the_donor_patched_with_its_own_vector_is_the_adapter_trained_through_rounding(twins):
    through, plain = twins
    ceiling = patch(plain, extract(through, plain))
    told = ceiling.manifest["quantization_vector"]
    assert (told["of_itself"], told["zero_shot"]) == (True, False)
    for module in ceiling.modules():
        np.testing.assert_allclose(update(ceiling, module), update(through, module), rtol=1e-5, atol=1e-6)


def test_what_is_no_vector_of_these_two(twins, make_adapter, make_base_of):
    through, plain = twins
    vector = extract(through, plain)
    for arguments, reason in (
        ((plain, through), "was not trained through rounding"),
        ((through, through), "was trained through rounding to 3 bits in groups of 32"),
    ):
        with pytest.raises(RsgwmError, match=reason):
            extract(*arguments)
    with pytest.raises(RsgwmError, match="is no quantization vector"):
        patch(plain, through)
    dora = make_adapter(3)
    dora.spec = vector.spec.__class__(4, 2.0, 0.0, dora.spec.keys, -1, "dora")
    with pytest.raises(RsgwmError, match="is not LoRA on linear layers"):
        patch(dora, vector)
    other = make_adapter(4)
    other.manifest["base"] = {**other.manifest["base"], "fingerprint": "0" * 64 + "-1-2"}
    with pytest.raises(RsgwmError, match="which have other weights"):
        patch(other, vector)
    with pytest.raises(RsgwmError, match="which have other weights"):
        extract(through, other)
    vector.manifest["quantization"] = {"bits": 4, "group_size": 33}
    with pytest.raises(RsgwmError, match="MLX has no 4 bits in groups of 33"):
        patch(plain, vector)
    vector.manifest["quantization"] = ["4"]
    with pytest.raises(RsgwmError, match="damaged"):
        patch(plain, vector)


def test_the_chosen_weight_is_the_best_of_those_tried(base, twins, make_adapter, tmp_path):
    receiver, vector = make_adapter(5), extract(*twins)
    rows = make_rows(generate("change", 10, 1, "train"), 10, 0, 1)
    corpus = save_corpus(tmp_path / "corpus", rows, TEMPLATES["plain"], {"seed": 1})
    token_rows, _ = corpus.token_rows(base.tokenizer, 1024, "drop")
    choice = choose_weight(base, receiver, vector, token_rows, seed=3)
    losses = {}
    for weight in WEIGHTS:
        sums = [
            rounded_nats(base, stacked([(receiver, 1.0), (vector, weight)]), vector_format(vector), [row])
            for row in token_rows
        ]
        losses[weight] = sum(nats.sum() for nats, _ in sums) / sum(counts.sum() for _, counts in sums)
    assert choice.weight == min(losses, key=losses.get)
    assert choice.loss == pytest.approx(min(losses.values()), rel=1e-4)
    assert list(choice.losses.values()) == pytest.approx(list(losses.values()), rel=1e-4)
    assert choice.nested >= choice.loss - 1e-9
    with pytest.raises(RsgwmError, match="4 rows are too few"):
        choose_weight(base, receiver, vector, token_rows[:4])


@pytest.fixture(scope="module")
def work(tiny_base, tmp_path_factory):
    """Corpora of two tasks; of the first an adapter trained through rounding, one without and their vector, of the
    second an adapter. Beside the vector there are some that are none."""
    tmp_path = tmp_path_factory.mktemp("work")
    small = ("--rank", 2, "--steps", 2, "--batch-size", 4, "--base", tiny_base)
    for task in ("change", "groups"):
        rows = make_rows(generate(task, 8, 1, "train"), 8, 0, 1)
        save_corpus(tmp_path / "corpus" / task, rows, TEMPLATES["plain"], {"seed": 1})
        told = invoke("train", "--corpus", tmp_path / "corpus" / task, "--out", tmp_path / task, *small)
        assert told.exit_code == 0, told.output
    through = ("--corpus", tmp_path / "corpus/change", "--out", tmp_path / "through", "--qat", "2,32")
    assert invoke("train", *through, *small).exit_code == 0
    twins = ("--qat", tmp_path / "through", "--plain", tmp_path / "change")
    assert invoke("quantvec", "extract", *twins, "--out", tmp_path / "vector").exit_code == 0
    patched = ("quantvec", "apply", tmp_path / "groups", "--vector", tmp_path / "vector")
    assert invoke(*patched, "--out", tmp_path / "with-vector").exit_code == 0
    shutil.copytree(tiny_base, tmp_path / "another")
    arrays = mx.load(str(tmp_path / "another/model.safetensors"))
    first = min(arrays)
    mx.save_safetensors(
        str(tmp_path / "another/model.safetensors"), {**arrays, first: arrays[first] + 1}, {"format": "pt"}
    )
    for name, changes in (
        ("other", {"base": {"name": "elsewhere", "fingerprint": "0" * 64}}),
        ("seven", {"quantization": {"bits": 7, "group_size": 32, "mode": "affine"}}),
        ("wide", {"quantization": {"bits": 4, "group_size": 64, "mode": "affine"}}),
    ):
        changed(tmp_path, "vector", name, changes)
    return tmp_path


def changed(folder, name, copy, changes):
    """A copy of an adapter with other entries in its manifest, or without those that are None."""
    shutil.copytree(folder / name, folder / copy)
    manifest = {**json.loads((folder / copy / "manifest.json").read_text()), **changes}
    entries = {key: value for key, value in manifest.items() if value is not None}
    (folder / copy / "manifest.json").write_text(json.dumps(entries))
    return folder / copy


def result(told):
    assert told.exit_code == 0, told.output
    return json.loads(told.stdout.splitlines()[-1])


def test_the_commands(work):
    twins = ("--qat", work / "through", "--plain", work / "change")
    made = invoke("quantvec", "extract", *twins, "--out", work / "made", "--json")
    assert result(made)["trained_differently"] == []
    assert (result(made)["rank"], result(made)["quantization"]["bits"]) == (4, 2)
    apply = ("quantvec", "apply", work / "groups", "--vector", work / "made", "--json")
    zero_shot = result(invoke(*apply, "--out", work / "patched"))
    assert (zero_shot["lambda"], zero_shot["zero_shot"]) == (1.0, True)
    assert Adapter.load(work / "patched").spec.rank == 6
    itself = invoke("quantvec", "apply", work / "change", "--vector", work / "vector", "--out", work / "itself")
    assert "its own vector, which is the ceiling and no transfer" in itself.stdout
    half = invoke(*apply, "--lambda", "0.5", "--out", work / "half")
    assert result(half)["lambda"] == 0.5
    chosen = invoke(*apply, "--choose", work / "corpus/groups", "--out", work / "chosen")
    assert result(chosen)["zero_shot"] is False
    assert result(chosen)["choice"]["rows"] == 8
    assert "NOT NEW" in chosen.stderr
    assert "not zero-shot" in chosen.stderr
    loss = invoke("adapter", "loss", "--corpus", work / "corpus/groups", "--adapter", work / "patched", "--json")
    assert result(loss)["trained_on"][str(work / "patched")] == 1.0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("extract", "--qat", "change", "--plain", "groups"), "was not trained through rounding"),
        (("extract", "--qat", "through", "--plain", "through"), "was trained through rounding to 2 bits"),
        (("extract", "--qat", "through", "--plain", "nowhere"), "does not exist"),
        (("apply", "groups", "--vector", "through"), "is no quantization vector"),
        (("apply", "groups", "--vector", "vector", "--lambda", "nan"), "is not a finite number"),
        (("apply", "groups", "--vector", "vector", "--lambda", "1", "--choose", "corpus/groups"), "leave out --lambda"),
        (("apply", "groups", "--vector", "other"), "which have other weights"),
        (("apply", "groups", "--vector", "seven"), "MLX has no 7 bits"),
        (("apply", "groups", "--vector", "vector", "--lambda", "1e38"), "is not in the range"),
        (("apply", "through", "--vector", "vector"), "was trained through rounding to 2 bits"),
        (("apply", "vector", "--vector", "vector"), "is a quantization vector"),
        (("apply", "with-vector", "--vector", "vector"), "has a quantization vector on it already"),
        (("apply", "groups", "--vector", "vector", "--base", "another"), "groups was made for"),
        (("extract", "--qat", "through", "--plain", "vector"), "is a quantization vector"),
        (("extract", "--qat", "through", "--plain", "with-vector"), "has a quantization vector on it already"),
        (("apply", "groups", "--vector", "wide", "--choose", "corpus/groups"), "does not divide the 32 columns"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(work, monkeypatch, arguments, reason):
    monkeypatch.chdir(work)
    told = invoke("quantvec", *arguments, "--out", "new", "--quiet")
    assert told.exit_code == 2, told.output
    assert reason in told.stderr
    assert len([line for line in told.stderr.splitlines() if not line.startswith("NOT NEW")]) == 1
    assert not (work / "new" / "manifest.json").exists()


def test_a_quantised_base_cannot_choose(work, tiny_base, tmp_path):
    from tests.training.test_variants import quantised

    packed = quantised(tiny_base, tmp_path / "packed", 4)
    groups, vector = (changed(work, name, f"{name}-of-any-base", {"base": None}) for name in ("groups", "vector"))
    told = invoke("quantvec", "apply", groups, "--vector", vector, "--base", packed, "--choose", work / "corpus/groups",
                  "--out", work / "new", "--quiet")  # fmt: skip
    assert told.exit_code == 2
    assert "quantised already (4 bits)" in told.stderr.splitlines()[-1]
    assert "--dequantize" in told.stderr
