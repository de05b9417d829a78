"""``--drafts`` of ``ask``, ``eval`` and ``calibrate`` on the tiny base: what is shown and kept, and what is refused."""

import json

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core import files
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.records import DraftRecord, read_items
from mlx_rsgwm.inference.calibration import FILE
from mlx_rsgwm.inference.draft import CHAINS, SAMPLED

QUESTION = "What is 2 + 2?"


@pytest.fixture
def invoke(make_adapter, tiny_base, tmp_path):
    pair = [make_adapter(seed).save(tmp_path / name) for seed, name in ((1, "drafter"), (2, "verifier"))]
    own = ["--base", tiny_base, "--drafter", pair[0], "--verifier", pair[1], "--max-tokens", 4, "--attempts", 2]

    def run(*words, code=0):
        made = CliRunner().invoke(rsgwm, [str(word) for word in (words[0], *own, *words[1:])])
        assert made.exit_code == code, made.output
        return made

    return run


def result(made):
    return json.loads(made.stdout.splitlines()[-1])


def test_ask_says_of_each_draft_what_kind_it_is(invoke, tmp_path):
    made = invoke("ask", QUESTION, "--drafts", "mixed", "--threshold", 1, "--json")
    answer = result(made)
    assert [step["kind"] for step in answer["steps"]] == [SAMPLED, SAMPLED, *CHAINS]
    assert answer["attempts"] == 10
    assert answer["kind"] in (SAMPLED, *CHAINS)
    shown = [line.split(":")[0] for line in made.stderr.splitlines() if line.startswith("draft ")]
    assert shown == ["draft 1", "draft 2", *(f"draft {number} ({kind})" for number, kind in enumerate(CHAINS, 3))]
    verdicts = [line.split(":")[0].strip() for line in made.stderr.splitlines() if line.startswith("  ")]
    assert verdicts == ["replaced"] * 9 + ["not accepted"]
    (tmp_path / "questions").write_text(f"{QUESTION}\nWhat is 3 + 4?\n")
    rows = result(
        invoke("ask", "--file", tmp_path / "questions", "--drafts", "mixed", "--threshold", 1, "--json")
    )["answers"]  # fmt: skip
    assert {name: rows[0][name] for name in ("answer", "attempts", "kind")} == {
        name: answer[name] for name in ("answer", "attempts", "kind")
    }
    sampled = result(invoke("ask", QUESTION, "--threshold", 1, "--json"))
    assert "kind" not in sampled
    assert [step["kind"] for step in sampled["steps"]] == [SAMPLED] * 2


def test_eval_keeps_the_kind_of_every_draft(invoke, tmp_path):
    out = tmp_path / "report"
    told = result(
        invoke("eval", "--task", "change", "--items", 3, "--timed", 1, "--drafts", "mixed", "--out", out, "--json")
    )
    assert told["k"] == 10
    assert told["pass_at_k"] == {}  # no draws of one distribution
    assert told["metadata"]["loop"]["drafts"] == "mixed"
    records = read_items(out / "items.jsonl")
    assert {tuple(draft.kind for draft in record.drafts) for record in records} == {(SAMPLED, SAMPLED, *CHAINS)}
    assert (out / "report.html").is_file()
    other = invoke("eval", "--task", "change", "--items", 3, "--timed", 1, "--out", out, code=2)
    assert "made with other settings" in other.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drafts", "grafted", "--layer", 9], "layer 9 is out of range: the model has layers 0 to 1"),
        (["--layer", 1], "layer is from 0, and of drafts that are grafted or mixed; found 1"),
        (["--drafts", "mixt"], "'mixt' is not one of"),
        (["--drafts", "grafted", "--attempts", 9], "attempts must be from 1 to 8 with grafted drafts, found 9"),
    ],
)
def test_what_is_refused_is_one_line(invoke, tmp_path, words, message):
    for command in (["ask", QUESTION], ["eval", "--task", "change", "--items", 2, "--out", tmp_path / "out"]):
        refused = [line for line in invoke(*command, *words, code=2).stderr.splitlines() if "rsgwm: error" in line]
        assert len(refused) == 1
        assert message in refused[0]
    assert not (tmp_path / "out").exists()


def test_a_calibration_says_on_which_kind_it_was_fitted(invoke, tmp_path, monkeypatch):
    def judge(question, draft, scores, *more):
        return DraftRecord(draft.text, "1", len(draft.text) % 2 == 0, scores, kind=draft.kind)

    monkeypatch.setattr(judging, "judge", judge)
    held = ("calibrate", "--task", "change", "--items", 12, "--curve", "none", "--drafts-file", tmp_path / "held")
    invoke(*held)
    warned = invoke("ask", QUESTION, "--drafts", "mixed").stderr
    assert "calibrated with another kind of drafts (sampled, now mixed); its threshold" in warned
    assert "take --drafts sampled, or calibrate again" in warned
    path = tmp_path / "verifier" / FILE
    calibration = files.read_json_object(path)
    assert calibration["made_for"].pop("drafts") == SAMPLED
    files.write_json(path, calibration)  # as earlier versions wrote it
    assert "calibrated with another" not in invoke("ask", QUESTION).stderr
    assert "kind of drafts (sampled, now grafted)" in invoke("ask", QUESTION, "--drafts", "grafted").stderr
    before = files.sha256_file(tmp_path / "held")
    other = [line for line in invoke(*held, "--drafts", "mixed", code=2).stderr.splitlines() if "error" in line]
    assert len(other) == 1
    assert "held was made with other settings" in other[0]
    assert files.sha256_file(tmp_path / "held") == before
    made = result(invoke(*held[:-1], tmp_path / "held-mixed", "--drafts", "mixed", "--json"))
    assert (made["drafts"], made["made_for"]["drafts"]) == (120, "mixed")
    assert "calibrated with another" not in invoke("ask", QUESTION, "--drafts", "mixed").stderr
    assert "kind of drafts (mixed, now sampled)" in invoke("ask", QUESTION).stderr
