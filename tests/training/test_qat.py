"""Training through rounding: what is trained, scored and recorded is the model of few bits."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.models.rounded_weights import rounded_weights
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.layers import adapted, target_modules
from mlx_rsgwm.training.loop import check_layers, train
from mlx_rsgwm.training.losses import held_out_loss
from tests.training.test_variants import quantised

THREE = QuantFormat(3, 32)


def rounded_loss(base, adapter, corpus, quant):
    rows, _ = corpus.token_rows(base.tokenizer, 1024, "drop")
    modules = target_modules(base.model, adapter.spec)
    with adapted(base.model, modules, adapter.spec, adapter.weights), rounded_weights(base.model, quant):
        return held_out_loss(base.model, rows, 4)


def test_held_out_losses_are_those_of_the_rounded_model(base, corpus, config):
    before = dict(tree_flatten(base.model.parameters()))
    settings = config(qat=THREE, learning_rate=1e-2, epochs=3)
    adapter = train(base, corpus, settings, corpus)
    assert all(value is before[name] for name, value in tree_flatten(base.model.parameters()))
    told = adapter.manifest["held_out_loss"]
    assert told["after"] == pytest.approx(rounded_loss(base, adapter, corpus, THREE), rel=1e-6)
    assert told["after"] != pytest.approx(rounded_loss(base, adapter, corpus, None), rel=1e-4)
    start = replace(adapter, weights={**adapter.init})
    assert told["before"] == pytest.approx(rounded_loss(base, start, corpus, THREE), rel=1e-6)
    assert told["after"]["draft"] < told["before"]["draft"]
    assert adapter.manifest["config"]["qat"] == {"bits": 3, "group_size": 32, "mode": "affine"}
    assert adapter.manifest["memory"]["estimate"] > train(base, corpus, config()).manifest["memory"]["estimate"]


def test_it_learns_what_rounding_would_take(base, corpus, config):
    """At 2 bits the rounded model of a run through rounding is better than that of a run without."""
    two = QuantFormat(2, 32)
    settings = config(learning_rate=2e-2, epochs=6)
    through = rounded_loss(base, train(base, corpus, replace(settings, qat=two)), corpus, two)
    beside = rounded_loss(base, train(base, corpus, settings), corpus, two)
    assert sum(through.values()) < sum(beside.values())


def test_recomputed_blocks_give_the_same_weights(base, corpus, config):
    settings = config(qat=THREE, steps=3)
    first, second = (train(base, corpus, replace(settings, recompute=recompute)) for recompute in (False, True))
    for name, value in first.weights.items():
        np.testing.assert_allclose(np.array(value), np.array(second.weights[name]), rtol=1e-4, atol=1e-6)
    other = train(base, corpus, replace(settings, qat=QuantFormat(2, 32)))
    assert not all(mx.allclose(value, other.weights[name]).item() for name, value in first.weights.items())


def test_settings(config):
    described = config(qat=THREE).describe()
    assert TrainConfig.from_mapping({**described, "keys": tuple(described["keys"])}) == config(qat=THREE)
    assert "qat" not in config().describe()
    with pytest.raises(RsgwmError, match="qat is for lora adapters"):
        config(qat=THREE, fine_tune_type="dora")
    with pytest.raises(RsgwmError, match="qat is for lora adapters"):
        TrainConfig.from_mapping({"rounds": {"count": 2, "mode": "accumulate"}, "qat": {"bits": 4}})
    with pytest.raises(RsgwmError, match="MLX has no 4 bits in groups of 7"):
        TrainConfig.from_mapping({"qat": {"bits": 4, "group_size": 7}})


def test_a_recipe_learns_before_any_data_is_read(base, config):
    check_layers(base.model, config(qat=THREE))
    with pytest.raises(RsgwmError, match="the group does not divide the 32 columns"):
        check_layers(base.model, config(qat=QuantFormat(4, 64)))


@pytest.mark.parametrize(
    ("qat", "bits", "reason"),
    [
        ("4,32", 8, "quantised already (8 bits)"),
        ("4", 0, "the group does not divide the 32 columns"),
        ("7", 0, "MLX has no 7 bits"),
        ("4,48", 0, "supported group sizes are"),
        ("four", 0, "is not BITS[,group,mode]"),
    ],
)
def test_bad_input_is_one_line(tiny_base, corpus, tmp_path, qat, bits, reason):
    place = quantised(tiny_base, tmp_path / "packed", bits) if bits else tiny_base
    out = tmp_path / "out"
    arguments = ["train", "--base", place, "--corpus", tmp_path / "corpus", "--out", out, "--steps", 1, "--qat", qat]
    told = CliRunner().invoke(rsgwm, [*map(str, arguments), "--quiet"])
    assert told.exit_code == 2
    assert reason in told.stderr
    assert len(told.stderr.splitlines()) == 1
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("command", ["train", "pool train"])
def test_a_quantised_base_is_refused_before_rows_and_weights_are_read(tiny_base, tmp_path, monkeypatch, command):
    """A large base and its rows take minutes."""
    place = quantised(tiny_base, tmp_path / "packed", 8)
    monkeypatch.setattr("mlx_rsgwm.training.job.load_data", None)
    monkeypatch.setattr("mlx_rsgwm.models.base.load_base", None)
    arguments = [*command.split(), "--base", place, "--corpus", tmp_path, "--out", tmp_path / "out", "--qat", "4,32"]
    told = CliRunner().invoke(rsgwm, [*map(str, arguments), "--quiet"])
    assert told.exit_code == 2
    assert "quantised already (8 bits)" in told.stderr


def test_the_commands(tiny_base, corpus, tmp_path):
    small = ["--rank", 2, "--steps", 2, "--batch-size", 2, "--base", tiny_base, "--corpus", tmp_path / "corpus"]
    for command, out in ((["train"], "single"), (["pool", "train"], "pool")):
        arguments = [*command, *small, "--qat", "3,symmetric", "--out", tmp_path / out, "--json"]
        told = CliRunner().invoke(rsgwm, [*map(str, arguments)])
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout.splitlines()[-1])["out"] == str(tmp_path / out)
    for folder in (tmp_path / "single", tmp_path / "pool" / "corpus"):
        qat = Adapter.load(folder).manifest["config"]["qat"]
        assert qat == {"bits": 3, "group_size": 0, "mode": "symmetric"}
