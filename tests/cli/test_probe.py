"""``rsgwm probe`` as it is typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.probe.table import read_table


def run(*words):
    done = CliRunner().invoke(rsgwm, [*map(str, words), "--quiet", "--json"])
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def folders(make_adapter, tmp_path):
    return [make_adapter(seed).save(tmp_path / "pool" / f"task-{seed}") for seed in range(3)]


def test_measure_writes_the_table_it_prints(folders, tmp_path):
    out = tmp_path / "table.jsonl"
    code, printed = run("probe", "measure", tmp_path / "pool", "--out", out)
    assert code == 0
    rows = read_table(out).rows
    assert [row["adapters"] for row in printed["pairs"]] == [list(row.adapters) for row in rows]
    assert printed["pairs"][2]["measures"] == rows[2].measures
    assert (len(rows), printed["at"]) == (3, 1.0)


def test_measure_refuses_in_one_line(folders, tmp_path):
    out = tmp_path / "table.jsonl"
    code, printed = run("probe", "measure", *folders[:2], "--at", 0.05, "--out", out)
    assert (code, out.exists()) == (2, False)
    assert "has no snapshot at 0.05 (there are: none)" in printed["error"]
    code, printed = run("probe", "measure", folders[0], folders[0], "--out", out)
    assert (code, out.exists()) == (2, False)
    assert "two are called" in printed["error"]
