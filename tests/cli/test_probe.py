"""``rsgwm probe`` as it is typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.probe.outcomes import read_outcomes
from mlx_rsgwm.probe.table import read_table
from tests.outside.commands import write_study


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


def test_measure_on_data(folders, tmp_path, base):
    out = tmp_path / "table.jsonl"
    words = ("--data", "change", "--data", "groups", "--data-rows", 8, "--base", base.path, "--out", out)
    code, printed = run("probe", "measure", *folders[:2], *words)
    assert code == 0, printed
    table = read_table(out)
    assert table.about["data"]["own_rows"] == [8, 8]
    assert table.about["data"]["shared_rows"] == 8
    assert table.rows[0].measures["cka.median"] <= 1
    code, printed = run("probe", "measure", *folders, *words)
    assert (code, "once for all adapters or once for each: 3 adapters, 2" in printed["error"]) == (2, True)


def test_outcomes_of_a_trained_pool(tmp_path, tiny_base):
    """Everything that the command line adds: rows of the adapters' own tasks, sets, going on, the table."""
    small = ("--rank", 2, "--alpha", 4, "--steps", 2, "--batch-size", 2, "--draft-rows", 4, "--verify-rows", 0)
    tasks = ("--task", "change", "--task", "groups", "--task", "prices")
    code, _ = run("pool", "train", "--base", tiny_base, *tasks, *small, "--out", tmp_path / "pool")
    assert code == 0
    out = tmp_path / "outcomes.jsonl"
    words = ("probe", "outcomes", tmp_path / "pool", "--data-rows", 8, "--sets", 1, "--items", 2, "--out", out)
    code, printed = run(*words, "--methods", "linear")
    assert code == 0, printed
    assert [row["merges"] for row in printed["methods"]] == ["4"]
    first = out.read_text()
    code, printed = run(*words, "--methods", "linear,norm_equalised", "--utility", "tokens")
    assert (code, [row["method"] for row in printed["methods"]]) == (0, ["linear", "norm_equalised"])
    assert out.read_text().startswith(first)
    outcomes = read_outcomes(out)
    assert sorted(outcomes.tasks.values()) == ["change", "groups", "prices"]
    assert (outcomes.about["rows"][str(tmp_path / "pool" / "change")], len(outcomes.rows)) == (8, 6 + 8)
    early = tmp_path / "early.jsonl"
    code, printed = run("probe", "measure", tmp_path / "pool", "--at", 0.05, "--out", early)
    assert (code, printed["at"], len(printed["pairs"])) == (0, 0.05, 3)
    assert "training_gradient_cosine" in printed["pairs"][0]["measures"]
    assert "fisher_overlap" in printed["pairs"][0]["measures"]
    assert sorted(printed["pairs"][0]["tasks"]) == ["change", "groups"]


def test_fit_and_report(tmp_path):
    table, outcomes, out = (tmp_path / name for name in ("table.jsonl", "outcomes.jsonl", "predictors"))
    write_study(table, outcomes)
    code, printed = run("probe", "fit", table, outcomes, "--fit", "ridge", "--fit", "fingerprint", "--out", out)
    assert code == 0, printed
    assert sorted(path.name for path in out.iterdir()) == [
        f"linear.{kind}.predictor.json" for kind in ("fingerprint", "ridge")
    ]
    code, shown = run("probe", "report", out, "--html", tmp_path / "page.html")
    assert (code, len(shown["predictors"])) == (0, 2)
    assert shown["predictors"][1]["spearman"] == printed["predictors"][0]["spearman"]
    assert set(shown["fingerprints"]) == {"linear"}
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 + bool(shown["fingerprints"]["linear"])
    code, printed = run("probe", "fit", table, outcomes, "--methods", "ties", "--out", tmp_path / "other")
    assert (code, (tmp_path / "other").exists()) == (2, False)
    assert "no method 'ties'" in printed["error"]


def test_decide_and_apply(folders, tmp_path):
    out = tmp_path / "decided"
    code, printed = run("probe", "decide", *folders, "--apply", "--out", out)
    assert code == 0, printed
    assert (len(printed["pairs"]), printed["predicted"]) == (3, False)
    assert printed["written"] == [str(out / "merged")]
    assert load_adapter(out / "merged").manifest["kind"] == "merged"
    code, printed = run("probe", "decide", *folders, "--apply", "--out", out, "--table", tmp_path / "none")
    assert (code, "decided exists and is not an empty folder" in printed["error"]) == (2, True)  # before any work
    code, printed = run("probe", "decide", *folders, "--apply")
    assert (code, "--apply and --out belong together" in printed["error"]) == (2, True)
    code, printed = run("probe", "decide", *folders, "--predictors", tmp_path / "none")
    assert (code, "holds no predictor" in printed["error"]) == (2, True)
