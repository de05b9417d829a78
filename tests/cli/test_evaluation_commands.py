"""eval, report, compare, controls, tables on the tiny base: each works, resumes, refuses bad input in one line."""

import json
import shutil

import pytest
import yaml
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core import files
from mlx_rsgwm.core.folders import LOCK_FILE
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.inference.loop import DraftVerify


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])


def result(found):
    assert found.exit_code == 0, found.output + str(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory):
    values = {
        "name": "tiny",
        "base": str(tiny_base),
        "data": {"tasks": ["change", "groups"], "rows": 24, "verify_share": 0.5, "calibration_items": 2},
        "train": {"rank": 4, "alpha": 8, "epochs": 1, "batch_size": 4, "learning_rate": 1e-2},
        "loop": {"attempts": 2, "max_tokens": 6, "threshold": "auto"},
        "evaluate": {"items": 3, "timed": 0},
        "export": {"parity": False, "peft": False},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    found = invoke("run", recipe, "--out", out, "--json")
    assert found.exit_code == 0, found.output
    return out


def evaluate(run, tiny_base, out, *more):
    return invoke(
        "eval", "--base", tiny_base, "--drafter", run / "drafter", "--verifier", run / "verifier", "--task", "change",
        "--items", 4, "--timed", 1, "--max-tokens", 5, "--attempts", 2, "--out", out, *more, "--json",
    )  # fmt: skip


def test_eval_records_seeds_drafts_and_contamination(run, tiny_base, tmp_path, monkeypatch):
    more = ("--sampling-seeds", 2, "--draft-count", 3, "--slice", "seeded", "--corpus", run / "data" / "change",
            "--score", "yesno")  # fmt: skip
    found = result(evaluate(run, tiny_base, tmp_path / "a", *more))
    assert found["seeds"]["seeds"] == [42, 43]
    assert set(found["pass_at_k"]) == {"1", "2", "3"}
    assert found["metadata"]["contamination"]["exact"] == 0
    assert found["metadata"]["tasks"][0]["slice"] == "seeded"
    assert found["metadata"]["template"]["name"] == "plain"
    assert found["metadata"]["loop"]["sampling"]["temperature"] == 0.7
    assert len(found["latency_ms"]["draft_verify"]) == 1
    assert (tmp_path / "a" / "report.html").is_file()
    monkeypatch.setattr(DraftVerify, "draft_many", lambda *rest: pytest.fail("drafted again"))
    again = result(evaluate(run, tiny_base, tmp_path / "a", *more))
    assert again["accuracy"] == found["accuracy"]
    other = evaluate(run, tiny_base, tmp_path / "a", *more, "--temperature", 0.9)
    assert other.exit_code == 2
    assert "journal.jsonl was made with other settings (" in other.stderr


def test_report_and_compare(run, tiny_base, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        result(evaluate(run, tiny_base, tmp_path / name, "--timed", 0, "--seed", 42, "--temperature", seed / 2))
    before = json.loads((tmp_path / "a" / "report.json").read_text())
    (tmp_path / "a" / "report.html").unlink()
    found = result(invoke("report", "write", tmp_path / "a", "--json"))
    assert found["draft_verify"] == before["draft_verify"]
    assert (tmp_path / "a" / "report.html").is_file()
    compared = invoke("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c.md", "--json")
    assert result(compared)["n"] == 4
    assert "McNemar" in (tmp_path / "c.md").read_text()
    assert "4 items in common" in compared.stderr


def test_controls(run, tiny_base, tmp_path, monkeypatch):
    run = shutil.copytree(run, tmp_path / "run")
    for name in ("drafter", "verifier"):  # the same pair as the paper's: it must come out level
        shutil.copytree(run / name, run / "paper" / name)
    arguments = (
        "report", "controls", run, "--base", tiny_base, "--items", 4, "--calibration-items", 2, "--sampling-seeds", 2,
        "--attempts", 2, "--draft-count", 3, "--max-tokens", 6, "--out", tmp_path / "c", "--json",
    )  # fmt: skip
    shown = invoke(*arguments)
    found = result(shown)
    names = [row["name"] for row in found["systems"]]
    assert names[:2] == ["drafter once", "draft–verify"]
    assert {"joint adapter", "source adapter change", "source adapter groups", "base", "majority of 2"} <= set(names)
    assert "directly trained verifier" in names
    assert found["n"] == 8
    assert found["seeds"] == [42, 43]
    rows = {row["name"]: row for row in found["systems"]}
    assert rows["draft–verify, the paper's merge"]["accuracy"] == rows["draft–verify"]["accuracy"]
    assert rows["drafter once, the paper's merge"]["accuracy"] == rows["drafter once"]["accuracy"]
    assert [judge["name"] for judge in found["judges"]] == [
        "merged verifier", "drafter itself", "directly trained verifier"
    ]  # fmt: skip
    assert "Verifiers on the same drafts" in (tmp_path / "c" / "controls.md").read_text()
    assert (tmp_path / "c" / "joint" / "manifest.json").is_file()
    assert "draft–verify" in (tmp_path / "c" / "controls.md").read_text()
    monkeypatch.setattr(DraftVerify, "draft_many", lambda *rest: pytest.fail("drafted again"))
    (tmp_path / "c" / "joint" / LOCK_FILE).touch()  # as a kill at the very end of its training leaves it
    again = result(invoke(*arguments))
    assert again == found
    assert not (tmp_path / "c" / "joint" / LOCK_FILE).exists()


def test_tables(recipe, tmp_path):
    found = invoke(
        "report", "tables", 1, "--recipe", recipe, "--items", 2, "--timed", 1, "--out", tmp_path / "t", "--json"
    )  # fmt: skip
    assert [row["name"] for row in result(found)["rows"]] == ["Single-GWM", "GWM-DV-V2"]
    assert "GWM-DV-V2, paper" in found.stderr
    assert "0.0575" in found.stderr
    assert "0.0575" in (tmp_path / "t" / "table-1" / "table-1.md").read_text()
    written = files.read_json_object(tmp_path / "t" / "table-1" / "table-1.json")
    assert written["overlap"]["items"] == 0
    assert written["overlap"]["asked"] == 4


def test_tables_refuse_what_will_be_trained_on_before_training(recipe, tmp_path, monkeypatch):
    from mlx_rsgwm.recipes import train_stages

    monkeypatch.setattr(train_stages, "train", lambda *rest, **more: pytest.fail("trained"))
    rows = [{"question": row.question.upper(), "answer": row.gold} for row in generate("change", 2, 42, "train")]
    rows += [{"question": row.question, "answer": row.gold} for row in generate("change", 2, 42, "calibration")]
    rows.append({"question": "Is this one new?", "answer": "yes"})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = invoke("report", "tables", 1, "--recipe", recipe, "--task", tmp_path / "own.jsonl", "--out", tmp_path / "t")
    assert found.exit_code == 2
    assert "4 of 5 test questions were trained or calibrated on (default: data/change 2, default: calibration 2)" in (
        found.stderr
    )
    assert not (tmp_path / "t").exists()


PAIR = ("--drafter", "{run}/drafter", "--verifier", "{run}/verifier")  # read before the questions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "write", "{tmp}"], "holds no report.json"),
        (["compare", "{tmp}", "{tmp}"], "holds no report.json"),
        (["report", "controls", "{tmp}", "--out", "{tmp}/c"], "lacks drafter, verifier"),
        (["report", "tables", "1", "--recipe", "nonesuch", "--out", "{tmp}/t"], "no recipe 'nonesuch'"),
        (["report", "tables", "4"], "'4' is not one of its values; there are 1, 2, 3"),
        (["report", "tables", "3", "--variant", "odd:x=1"], "expected NAME:KEY=VALUE"),
        (["report", "tables", "2", "--items", "0"], "not in the range x>=1"),
        (["eval", "--task", "change", "--slice", "last"], "there are first, seeded"),
        (["eval", "--task", "change", "--items", "0"], "not in the range x>=1"),
        (["eval", "--task", "change", "--timed", "-1"], "not in the range x>=0"),
        (["eval", "--task", "change", "--refusal", "("], "is not a regular expression"),
        (["eval", *PAIR, "--task", "change", "--corpus", "{tmp}/none"], "none does not exist"),
        (["eval", *PAIR, "--task", "{tmp}/twice.jsonl"], "is already that of line 1"),
        (["eval", *PAIR, "--task", "{tmp}/missing-gold.jsonl"], "no gold answer"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, message):
    row = {"question": "q", "answer": "1", "id": "a"}
    (tmp_path / "twice.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    (tmp_path / "missing-gold.jsonl").write_text(json.dumps({**row, "answer": ""}) + "\n")
    found = invoke(*(argument.format(tmp=tmp_path, run=run) for argument in arguments), "--json")
    assert found.exit_code == 2, found.output
    errors = [line for line in found.stderr.splitlines() if line.startswith("rsgwm: error:")]
    assert len(errors) == 1
    assert message in errors[0]
