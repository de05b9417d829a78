"""``rsgwm merge`` at the edge: what it refuses in one line, its limit, and its list without torch."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from click.testing import CliRunner

import mlx_rsgwm as rs
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.merging.methods import METHODS
from mlx_rsgwm.models.adapter import Adapter


def run(*arguments):
    return CliRunner().invoke(rsgwm, ["merge", *map(str, arguments)])


@pytest.fixture
def three(make_adapter, tmp_path):
    return [make_adapter(seed).save(tmp_path / f"a{seed}") for seed in range(3)]


@pytest.mark.parametrize("method", ["linear", "karcher", "dare_linear", "breadcrumbs", "magnitude_prune"])
def test_weights_that_cancel_end_with_2_and_write_nothing(three, tmp_path, method):
    weights = [item for weight in (0.1, 0.2, -0.3) for item in ("--weight", weight)]
    done = run(*three, "--method", method, *weights, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "weights must not sum to zero" in done.output
    assert not (tmp_path / "out").exists()


def test_a_limit_of_ones_own(three, tmp_path):
    command = [*three[:2], "--method", "linear", "--weight", 1, "--weight", -0.99, "--out", tmp_path / "out"]
    refused = run(*command)
    assert refused.exit_code == 2
    assert "the limit is 40" in refused.output
    allowed = run(*command, "--largest", 1000, "--json")
    assert allowed.exit_code == 0
    told = json.loads(allowed.output.splitlines()[-1])["merge"]
    assert told["diagnosis"]["overall"]["growth"] > 40
    assert any("times as large" in warning for warning in told["warnings"])
    assert Adapter.load(tmp_path / "out").manifest["merge"]["largest"] == 1000


def test_directions_are_recollected_from_rows_of_each_adapter(three, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("Ben has 43 coins.\nThere are 30 eggs in a bag.\n", encoding="utf-8")
    one = ("--recollect", rows)
    refused = run(*three[:2], *one, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "one corpus for each in their order: 2 adapters, 1 corpora" in refused.output
    assert not (tmp_path / "out").exists()
    done = run(*three[:2], *one, *one, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"directions of {three[1]}: recollected from 2 draft rows" in done.output
    merge = Adapter.load(tmp_path / "out").manifest["merge"]
    assert merge["method"] == "regmean"
    assert [each["rows"] for each in merge["recollected"]] == [{"draft": 2}] * 2
    by_library = rs.merge(three[:2], recollect=[rows, rows])
    assert by_library.manifest["merge"]["recollected"] == merge["recollected"]
    for name, array in Adapter.load(tmp_path / "out").weights.items():
        assert mx.array_equal(array, by_library.weights[name])


def test_the_list_needs_no_torch():
    code = """
import atexit, sys
atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules))
import mlx_rsgwm as rs
from mlx_rsgwm.cli.main import rsgwm
rsgwm(['merge', '--list'])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_the_list_fits_a_screen_and_all_of_it_is_behind_an_option():
    usual, everything = run("--list").output.splitlines(), run("--list", "--all").output.splitlines()
    assert len(usual) <= 23
    assert max(map(len, usual)) < 80
    names = [line.split()[0] for line in usual if line[0] != " "]
    assert names[:3] == ["auto", "regmean", "rsgwm"]
    assert set(names[1:-1]) < set(METHODS)
    assert [line.split(": ")[0] for line in everything if line[0] != " "] == list(METHODS)
    assert set(json.loads(run("--list", "--json").output.splitlines()[-1])) == set(METHODS)


def test_the_method_goes_by_the_adapters_and_is_told(three, tmp_path):
    done = run(*three[:2], "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.output.splitlines() if "was chosen" in line)
    assert (
        line == "rsgwm was chosen: every adapter has importance, and not every one directions (--method takes another)"
    )
    again = run(tmp_path / "out", three[0], "--dry-run").output
    assert f"warning: {tmp_path / 'out'} was merged from {three[0]}, which counts again here" in again
