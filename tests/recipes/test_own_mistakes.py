"""A recipe with a verifier trained on the drafter's own mistakes: a pair of its own beside one that is as it was."""

import json

import pytest
import yaml
from click.testing import CliRunner

from mlx_rsgwm.cli.run import render, run
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.corpus import load_corpus
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.records import DraftRecord
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.recipes import estimate, own_mistakes
from mlx_rsgwm.recipes.own import TEXT
from mlx_rsgwm.recipes.run import load_recipe, run_recipe

TASKS = ("change", "groups")
BEFORE = [*(f"{work}-{task}" for work in ("data", "train") for task in TASKS), "merge", "calibrate", "evaluate"]
OWN = [f"{work}-own-mistakes" for work in ("draft", "verifier", "calibrate", "evaluate")]
SECTION = {"items": 6, "attempts": 2, "rows": 4}


@pytest.fixture
def recipe(tiny_base, tmp_path):
    def write(section=SECTION, tasks=TASKS, settings=()):
        values = {
            "base": str(tiny_base),
            "data": {"tasks": [str(task) for task in tasks], "rows": 24, "verify_share": 0.5, "calibration_items": 2},
            "train": {"rank": 4, "alpha": 8, "epochs": 1, "batch_size": 4, "learning_rate": 1e-2},
            "merge": {"method": "linear"},
            "loop": {"attempts": 2, "max_tokens": 6, "threshold": "auto"},
            "evaluate": {"items": 3, "timed": 0},
            "export": {"parity": False},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values | ({"own_mistakes": section} if section is not None else {})))
        return load_recipe(str(path), settings)

    return write


def report_of(out):
    return json.loads((out / "report" / "report.json").read_text())


def test_a_verifier_is_trained_beside_the_pair(recipe, tmp_path):
    out = tmp_path / "out"
    first = run_recipe(recipe(), out)
    assert first["executed"] == [*BEFORE, *OWN, "export"]

    trained = Adapter.load(out / "own-mistakes" / "verifier")
    corpus = load_corpus(out / "own-mistakes" / "data")
    merged = Adapter.load(out / "verifier")
    assert trained.manifest["warm_start"]["hash"] == merged.manifest["files"]["adapters.safetensors"]
    assert trained.manifest["config"]["epochs"] == 1
    assert (trained.spec.rank, trained.spec.scale) == (merged.spec.rank, merged.spec.scale)
    assert (out / "own-mistakes/verifier/adapters.safetensors").read_bytes() != (
        out / "verifier/adapters.safetensors"
    ).read_bytes()
    assert corpus.manifest["counts"] == {task: {"draft": 0, "verify": 4} for task in TASKS}
    (origin,) = corpus.manifest["negatives"]["from"]
    assert origin["files"] == Adapter.load(out / "drafter").manifest["files"], "the merged drafter made the mistakes"
    assert not (out / "own-mistakes" / "drafter").exists()

    alone = run_recipe(recipe(None), tmp_path / "alone")
    assert alone["executed"] == [*BEFORE, "export"]
    for file in ("drafter/adapters.safetensors", "verifier/adapters.safetensors", "report/items.jsonl"):
        assert (out / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    for figures in ("draft_verify", "verifier", "oracle", "by_task"):
        assert first[figures] == alone[figures], "never mixed with the pair without more training"


def test_its_figures_have_a_row_of_their_own(recipe, tmp_path):
    out = tmp_path / "out"
    summary = run_recipe(recipe(), out)
    own = report_of(out / "own-mistakes")
    told = summary["draft_verify_own_mistakes"]
    assert {name: told[name] for name in own["draft_verify"]} == own["draft_verify"]
    assert told["rows"] == 8
    without = own["metadata"]["beside"]["report"]
    assert without["draft_verify"] == report_of(out)["draft_verify"]
    assert "beside" not in report_of(out)["metadata"]
    for name in ("report.md", "report.html"):
        page = (out / "own-mistakes" / "report" / name).read_text()
        assert "With and without more training" in page
        for label in ("without more training", "verifier trained on the drafter's own mistakes"):
            assert label in page.replace("&#x27;", "'")
    assert "With and without" not in (out / "report" / "report.md").read_text()
    (line,) = [line for line in render(summary, out).splitlines() if line.startswith("draft–verify, verifier trained")]
    assert line.count("[") == 3, "a rate each for right, accepted, accepted and right; of none accepted none is false"


def test_only_training_questions_are_drafted_on(recipe, tmp_path):
    """None that the pool, the calibration or the test has, where a family has others."""
    out = tmp_path / "out"
    run_recipe(recipe(), out)
    drafted_on = {row.question for row in load_corpus(out / "own-mistakes" / "data").rows}
    trained_on = {row.question for task in TASKS for row in load_corpus(out / "data" / task).rows}
    assert drafted_on
    assert drafted_on.isdisjoint(trained_on)
    for purpose in ("calibration", "test"):
        asked = {row.question for task in TASKS for row in select_questions(task, purpose, 100, 42).questions}
        assert drafted_on.isdisjoint(asked)


def test_what_is_done_again_when_something_changes(recipe, tmp_path):
    out = tmp_path / "out"
    run_recipe(recipe(None), out)
    added = run_recipe(recipe(), out)
    assert added["executed"] == OWN, "a finished run gets the pair, and nothing else is done again"
    assert run_recipe(recipe(), out)["executed"] == []
    longer = run_recipe(recipe(settings=["own_mistakes.epochs=2"]), out)
    assert longer["executed"] == OWN[1:]
    more = run_recipe(recipe(settings=["own_mistakes.epochs=2", "own_mistakes.attempts=3"]), out)
    assert more["executed"] == OWN
    assert more["draft_verify"] == added["draft_verify"]
    off = run_recipe(recipe(None), out)
    assert off["executed"] == []
    assert "draft_verify_own_mistakes" not in off


def test_killed_and_run_again_it_comes_to_the_same(recipe, tmp_path, monkeypatch):
    def kill(*arguments, **options):
        raise KeyboardInterrupt

    for moment in ("save_corpus", "finish", "beside"):  # once all is drafted, trained, asked
        monkeypatch.setattr(own_mistakes, moment, kill)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(), tmp_path / "killed")
        monkeypatch.undo()
    resumed = run_recipe(recipe(), tmp_path / "killed")
    assert resumed["executed"] == [OWN[-1], "export"]
    run_recipe(recipe(), tmp_path / "whole")
    for file in ("data/rows.jsonl", "verifier/adapters.safetensors", "report/items.jsonl"):
        both = [(tmp_path / name / "own-mistakes" / file).read_bytes() for name in ("killed", "whole")]
        assert both[0] == both[1], file


def test_one_task_s_adapter_is_trained_on(recipe, tmp_path):
    out = tmp_path / "out"
    summary = run_recipe(recipe(tasks=["change"]), out)
    assert summary["executed"] == ["data-change", "train-change", "calibrate", "evaluate", *OWN, "export"]
    started = Adapter.load(out / "own-mistakes/verifier").manifest["warm_start"]["hash"]
    assert started == Adapter.load(out / "pool/change").manifest["files"]["adapters.safetensors"]
    assert report_of(out / "own-mistakes")["metadata"]["merge"]["method"] is None


def test_the_pool_verifies_and_the_merged_verifier_is_trained(recipe, tmp_path):
    out = tmp_path / "out"
    run_recipe(recipe(settings=["loop.verifier=pool/*"]), out)
    started = Adapter.load(out / "own-mistakes/verifier").manifest["warm_start"]["hash"]
    assert started == Adapter.load(out / "verifier").manifest["files"]["adapters.safetensors"]
    drafts = [json.loads(line) for line in (out / "own-mistakes/report/items.jsonl").read_text().splitlines()]
    assert all(not draft.get("adapters") for item in drafts for draft in item["drafts"])


def test_it_is_forecast(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "_measure", lambda *_: estimate.Speed(1e-3, 1e-2, 4))  # whatever else runs here
    recipe()
    arguments = [str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    ahead = CliRunner().invoke(run, arguments, catch_exceptions=False)
    stages = json.loads(ahead.stdout.splitlines()[-1])["stages"]
    assert list(stages) == [*BEFORE, *OWN, "export"]
    longer = CliRunner().invoke(run, [*arguments, "--set", "own_mistakes.items=6000"], catch_exceptions=False)
    assert json.loads(longer.stdout.splitlines()[-1])["stages"][OWN[0]] > 10 * stages[OWN[0]]
    assert all(stages[name] != 1.0 for name in OWN), "each from what it does, and not the second of a short stage"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["own_mistakes.items=0"], "items must be at least 1"),
        (["own_mistakes.attempts=0"], "attempts must be at least 1"),
        (["own_mistakes.epochs=-1"], "epochs must be at least 1"),
        (["own_mistakes.rows=3"], "rows must be even"),
        (["own_mistakes.rows=0"], "rows must be even and at least 2"),
        (["own_mistakes.row=4"], r"unknown key 'own_mistakes\.row', did you mean 'rows'"),
        (["own_mistakes=yes"], "own_mistakes"),
        (["own_mistakes.true_equations=3"], "true_equations"),
    ],
)
def test_bad_values_are_one_line(recipe, settings, message):
    with pytest.raises(RsgwmError, match=message) as caught:
        recipe(settings=settings)
    assert "\n" not in str(caught.value)


def test_more_questions_than_a_family_has_are_told_before_any_training(recipe, tmp_path):
    with pytest.raises(RsgwmError, match="more than the"):
        run_recipe(recipe(settings=["own_mistakes.items=100000000"]), tmp_path / "out")
    assert not (tmp_path / "out" / "data").exists()


def write_questions(path, answer, count=60):
    rows = [{"question": f"What is {n} + 3?", "answer": answer(n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_short_file_is_drafted_on_again(recipe, tmp_path, capsys):
    """All of its training share is trained on; what was drafted on is recorded."""
    file = write_questions(tmp_path / "sums.jsonl", lambda n: f"{n} + 3 = {n + 3}\n#### {n + 3}", 40)
    share = len(select_questions(str(file), "train", None, 42).questions)
    section = {**SECTION, "items": 100, "rows": 100}
    out = tmp_path / "out"
    summary = run_recipe(recipe(section, [file], ["data.calibration_items=1"]), out)
    told = load_corpus(out / "own-mistakes" / "data").manifest["negatives"]
    trained_on = {row.question for row in load_corpus(out / "data" / "sums").rows}
    assert told["trained_on"] == {str(file): len(trained_on)}
    assert told["counts"][str(file)]["drafts"] == 2 * share
    assert summary["draft_verify_own_mistakes"]["rows"] <= 100


def test_without_any_wrong_answer_the_run_says_so(recipe, tmp_path, monkeypatch):
    """Everything but the own pair is kept."""
    monkeypatch.setattr(judging, "judge", lambda q, draft, scores, *more: DraftRecord(draft.text, "1", True, scores))
    file = write_questions(tmp_path / "texts.jsonl", lambda n: "yes, quite so")
    out = tmp_path / "out"
    settings = ["data.verify_share=0", "loop.threshold=0.5", "loop.score=mean_logprob"]
    with pytest.raises(RsgwmError, match="no draft is wrong") as caught:
        run_recipe(recipe(SECTION, [file], settings), out)
    assert "\n" not in str(caught.value)
    assert report_of(out)["draft_verify"]["accuracy"]["value"] == 1
    assert run_recipe(recipe(None, [file], settings), out)["executed"] == ["export"]


def test_the_written_recipe_has_the_section_in_comments(recipe):
    start = TEXT.index("# own_mistakes:")
    lines = TEXT[start : TEXT.index("loop:", start)].splitlines()
    section = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))["own_mistakes"]
    assert recipe(section).own_mistakes == recipe({}).own_mistakes, "the defaults"
    assert recipe(None).own_mistakes is None
