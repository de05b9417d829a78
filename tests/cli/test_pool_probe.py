"""``rsgwm pool train --probe``: young adapters decide, and training goes on to the same bits."""

import json

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core import files

NAMES = ("change", "groups", "prices")
SMALL = ("--rank", 4, "--alpha", 8, "--batch-size", 4, "--epochs", 4, "--draft-rows", 12, "--verify-rows", 4)


def train(tiny_base, out, *more):
    tasks = [word for name in NAMES for word in ("--task", name)]
    words = ["pool", "train", "--base", tiny_base, *tasks, "--out", out, *SMALL, *more, "--json"]
    return CliRunner().invoke(rsgwm, [str(word) for word in words])


def told(done):
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def bits(out):
    kinds = ("adapters", "importance", "directions")
    return {f"{name}/{kind}": files.sha256_file(out / name / f"{kind}.safetensors") for name in NAMES for kind in kinds}


def test_a_probed_pool_ends_in_the_bits_of_one_that_was_not(tiny_base, tmp_path):
    told(train(tiny_base, tmp_path / "plain"))
    probed = train(tiny_base, tmp_path / "probed", "--probe", 0.25)
    result = told(probed)
    assert bits(tmp_path / "probed") == bits(tmp_path / "plain")
    assert result["trained"] == [*NAMES]
    assert result["probe"]["at"] == 0.25
    assert [pair["members"] for pair in result["probe"]["pairs"]] == [
        ["change", "groups"], ["change", "prices"], ["groups", "prices"]
    ]  # fmt: skip
    assert "a rule of the measures decided, retention is not forecast; the package's predictors were" in probed.stderr


def test_it_may_stop_after_the_probe_and_go_on_later(tiny_base, tmp_path):
    told(train(tiny_base, tmp_path / "plain"))
    result = told(train(tiny_base, tmp_path / "pool", "--probe", 0.25, "--stop-after-probe"))
    assert "trained" not in result
    assert not any((tmp_path / "pool" / name / "adapters.safetensors").exists() for name in NAMES)
    again = told(train(tiny_base, tmp_path / "pool", "--probe", 0.25, "--stop-after-probe", "--resume"))
    assert again["probe"] == result["probe"]
    told(train(tiny_base, tmp_path / "pool", "--resume"))
    assert bits(tmp_path / "pool") == bits(tmp_path / "plain")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--stop-after-probe",), "--predictors and --stop-after-probe are for --probe"),
        (("--probe", 0.25, "--rounds", 2), "--probe looks at adapters that are trained apart"),
        (("--probe", 1), "1.0 is not in the range 0<x<1"),
    ],
)
def test_refusals_write_nothing(tiny_base, tmp_path, more, reason):
    done = train(tiny_base, tmp_path / "pool", *more)
    assert done.exit_code == 2
    assert reason in done.stderr + done.stdout
    assert not (tmp_path / "pool").exists()
