"""``rsgwm pool sweep`` on the tiny base: defaults, resuming, and bad input in one line."""

import json

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])


def test_a_sweep_and_a_longer_one(pool, tiny_base, tmp_path):
    common = (*pool, "--base", tiny_base, "--items", 2, "--max-tokens", 3, "--out", tmp_path / "sweep", "--json")
    found = invoke("pool", "sweep", *common, "--methods", "linear,slerp", "--with", f"joint={pool[0]}")
    assert found.exit_code == 0, found.output
    summary = json.loads(found.stdout.splitlines()[-1])
    assert summary["tasks"] == {"change": 2, "compare": 2}
    assert {row["name"] for row in summary["rows"]} == {"base", "change", "compare", "joint", "linear", "slerp"}
    assert "Retention against joint" in found.stderr
    for name in ("sweep.json", "sweep.md", "items.json"):
        assert (tmp_path / "sweep" / name).is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "measured").iterdir()}
    longer = invoke("pool", "sweep", *common, "--methods", "linear,slerp,karcher", "--with", f"joint={pool[0]}")
    assert longer.exit_code == 0, longer.output
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "measured").iterdir()}
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()


def test_questions_of_ones_own(pool, tiny_base, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n{"question": "What is 2 + 1?", "answer": "3"}\n')
    found = invoke(
        "pool", "sweep", *pool, "--base", tiny_base, "--methods", "linear", "--task", rows, "--max-tokens", 3,
        "--out", tmp_path / "sweep",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "draft accuracy (n = 2)" in found.stdout
    assert "linear" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "linaer"], "unknown method 'linaer'; did you mean 'linear'"),
        (["--methods", "rsgwm:tau=0"], "tau must be in (0, 1)"),
        (["--task", "nonsense"], "unknown task 'nonsense'"),
        (["--with", "joint"], "wants NAME=VALUE"),
        (["--with", "change={pool}/compare"], "several are called change"),
        (["--with", "joint={pool}/none"], "does not exist"),
        (["--items", "0"], "not in the range x>=1"),
        (["--template", "plian"], "did you mean 'plain'?"),
        (["--weight", "1", "--methods", "linear", "--max-tokens", "2"], "1 weights for 2 adapters"),
    ],
)
def test_bad_input(pool, tiny_base, tmp_path, arguments, message):
    given = [argument.format(pool=tmp_path / "pool") for argument in arguments]
    found = invoke("pool", "sweep", *pool, "--base", tiny_base, "--items", "2", "--out", tmp_path / "sweep", *given)
    assert found.exit_code == 2, found.output
    errors = [line for line in found.stderr.splitlines() if line.startswith("rsgwm: error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_task_nobody_knows_has_to_be_given(make_adapter, tiny_base, tmp_path):
    folders = [make_adapter(seed).save(tmp_path / f"one{seed}") for seed in range(2)]
    found = invoke("pool", "sweep", *folders, "--base", tiny_base, "--out", tmp_path / "sweep")
    assert found.exit_code == 2
    assert "no held-out items for one0, one1; say what to evaluate on with --task" in found.stderr
