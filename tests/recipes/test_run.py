"""A recipe on the tiny base: every stage, resume, what runs again when a setting changes, and bad recipes."""

import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.records import DraftRecord
from mlx_rsgwm.evaluation.report.folder import read_items
from mlx_rsgwm.inference.calibration import Calibration, load_calibration, score_and_threshold
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.recipes.run import load_recipe, run_recipe, shipped_recipes

STAGES = [
    "data-change",
    "data-groups",
    "train-change",
    "train-groups",
    "merge",
    "calibrate",
    "evaluate",
    "export",
]


def test_run_then_resume_then_change(recipe_file, tmp_path):
    out = tmp_path / "out"
    first = run_recipe(load_recipe(recipe_file()), out)
    assert first["executed"] == STAGES
    assert first["draft_verify"]["n"] == 6
    assert len(read_items(out / "report" / "items.jsonl")) == 6
    assert json.loads((out / "summary.json").read_text()) == first
    for role in ("drafter", "verifier"):
        assert Adapter.load(out / role).manifest["merge"]["role"] in ("draft", "verify")
        assert (out / "export" / f"{role}-peft" / "adapter_model.safetensors").is_file()
    assert not (out / "verifier" / "calibration.json").exists(), "nothing a tiny base drafts is right"
    assert (first["score"], first["threshold"]) == ("mean_logprob", 0.7)

    again = run_recipe(load_recipe(recipe_file()), out)
    assert again["executed"] == []
    assert again["draft_verify"] == first["draft_verify"]

    longer = run_recipe(load_recipe(recipe_file(), ["evaluate.items=4"]), out)
    assert longer["executed"] == ["evaluate"]
    assert longer["draft_verify"]["n"] == 8

    remerged = run_recipe(load_recipe(recipe_file(), ["merge.tau_draft=0.4"]), out)
    assert remerged["executed"] == ["merge", "calibrate", "evaluate", "export"]

    retrained = run_recipe(load_recipe(recipe_file(), ["train.learning_rate=0.02"]), out)
    assert retrained["executed"] == [stage for stage in STAGES if not stage.startswith("data-")]


def test_a_changed_run_that_was_killed_leaves_nothing_to_trust(recipe_file, tmp_path, monkeypatch):
    """Run A, kill a changed B once its drafter is written, run A: A's drafter again."""
    out = tmp_path / "out"
    recipe = load_recipe(recipe_file(), ["evaluate.timed=0"])
    run_recipe(recipe, out)
    written = contents(out)

    saved = Adapter.save

    def killed(adapter, folder):
        if folder.name == "verifier":
            raise KeyboardInterrupt
        return saved(adapter, folder)

    monkeypatch.setattr(Adapter, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(recipe_file(), ["evaluate.timed=0", "merge.tau_draft=0.9"]), out)
    monkeypatch.undo()
    assert (out / "drafter" / "adapters.safetensors").read_bytes() != written["drafter/adapters.safetensors"]
    # What follows was made from the same bits, and stands.
    assert run_recipe(recipe, out)["executed"] == ["merge"]
    assert contents(out) == written

    # What is edited or deleted is made again.
    (out / "data" / "change" / "rows.jsonl").unlink()
    (out / "drafter" / "adapter_config.json").write_text("{}")
    (out / "report" / "report.json").unlink()
    assert run_recipe(recipe, out)["executed"] == ["data-change", "merge", "evaluate"]
    assert contents(out) == written


def test_the_papers_merge_beside_another(recipe_file, tmp_path):
    sections = {"merge": {"method": "regmean"}, "paper": {"method": "rsgwm"}}
    summary = run_recipe(load_recipe(recipe_file(**sections), ["evaluate.timed=0"]), tmp_path / "both")
    assert summary["executed"] == [*STAGES[:-1], "merge-paper", "calibrate-paper", "evaluate-paper", "export"]
    beside = json.loads((tmp_path / "both" / "paper" / "report" / "report.json").read_text())
    assert summary["draft_verify_paper"] == {**beside["draft_verify"], "drafter": beside["drafter"]}

    alone = run_recipe(load_recipe(recipe_file(), ["evaluate.timed=0"]), tmp_path / "alone")
    assert "draft_verify_paper" not in alone
    for file in ("drafter/adapters.safetensors", "verifier/adapters.safetensors", "report/items.jsonl"):
        of_paper = (tmp_path / "both" / "paper" / file).read_bytes()
        assert of_paper == (tmp_path / "alone" / file).read_bytes()
        assert of_paper != (tmp_path / "both" / file).read_bytes()

    settings = ["evaluate.timed=0", "paper.tau_draft=0.4"]
    again = run_recipe(load_recipe(recipe_file(**sections), settings), tmp_path / "both")
    assert again["executed"] == ["merge-paper", "calibrate-paper", "evaluate-paper"]


def contents(out):
    """Every file that does not hold times, by name."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and path.suffix in (".safetensors", ".jsonl", ".json")
        and path.name not in ("summary.json", "manifest.json", "report.json")
        and path.parent.name != "stages"
        and ".former" not in path.parts
    }


def test_changed_data_files_are_noticed(recipe_file, tmp_path):
    questions = tmp_path / "mine.jsonl"

    def write(first):
        rows = [
            {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(first, 40)
        ]
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    settings = [f"data.tasks=[{questions}, change]", "evaluate.timed=0"]
    write(1)
    run_recipe(load_recipe(recipe_file(), settings), tmp_path / "out")
    assert run_recipe(load_recipe(recipe_file(), settings), tmp_path / "out")["executed"] == []
    write(2)
    executed = run_recipe(load_recipe(recipe_file(), settings), tmp_path / "out")["executed"]
    assert executed[:2] == [f"data-{questions.stem}", f"train-{questions.stem}"]
    assert "train-change" not in executed
    assert executed[2:] == ["merge", "calibrate", "evaluate", "export"]


def test_same_recipe_same_bytes(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(), ["evaluate.timed=0"])
    summaries = [run_recipe(recipe, tmp_path / name) for name in ("one", "two")]
    assert summaries[0]["draft_verify"] == summaries[1]["draft_verify"]
    for file in ("drafter/adapters.safetensors", "verifier/adapters.safetensors", "report/items.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_interrupted_run_keeps_what_was_finished(recipe_file, tmp_path, monkeypatch):
    from mlx_rsgwm.recipes import run as module

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "merge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(recipe_file()), tmp_path / "out")
    monkeypatch.undo()
    resumed = run_recipe(load_recipe(recipe_file()), tmp_path / "out")
    assert resumed["executed"] == ["merge", "calibrate", "evaluate", "export"]


def test_shipped_recipes_are_valid():
    assert shipped_recipes() == ["demo", "paper", "rounds"]
    paper = load_recipe("paper")
    assert paper.data.rows == 810
    assert sum(sum(paper.data.budget(task)) for task in paper.data.tasks) == 810
    assert (paper.train.rank, paper.train.alpha, paper.train.dropout, paper.train.epochs) == (16, 32, 0.05, 2)
    assert (paper.merge.tau_draft, paper.merge.tau_verify, paper.loop.attempts) == (0.3, 0.5, 3)
    assert load_recipe("demo").base == "smollm2-135m"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trian.epochs=1"], "unknown key 'trian', did you mean 'train'"),
        (["train.epoch=1"], r"unknown key 'train\.epoch', did you mean 'epochs'"),
        (["train.epochs=many"], r"train\.epochs"),
        (["train.epochs=0"], "epochs = 0 is out of range"),
        (["loop.score=vibes"], "score must be auto or one of"),
        (["merge.tau_draft=1.5"], "tau must be in"),
        (["data.tasks=[]"], "at least one task"),
        (["data.tasks=[a/mine.jsonl, b/mine.jsonl]"], "must differ in their file names"),
        (["epochs"], "expected key=value"),
        (["name.x=1"], "name is not a section"),
        (["train={"], "not valid YAML"),
        (["loop.threshold=5"], r"threshold must be in \[0, 1\], found 5"),
        (["loop.threshold=high"], "threshold must be auto or a number"),
        (["loop.attempts=0"], "attempts must be from 1 to 10000"),
        (["loop.temperature=-1"], "temperature must be 0 or more"),
        (["loop.top_p=0"], "top_p must be in"),
        (["loop.max_tokens=0"], "max_tokens must be at least 1"),
        (["seed=-1"], "seed must be in"),
        (["train.seed=-1"], "seed = -1 is out of range"),
        (["train.validate_every=5"], "held-out rows"),
        (["data.tasks=[change]", "paper={}"], "another merge of a pool, and data.tasks names one task"),
        (["data.tasks=[change, chnage]"], "unknown task 'chnage'"),
        (["data.tasks=[change, none.jsonl]"], "none.jsonl does not exist"),
        (["data.tasks=[change, gsm8k]", "data.folder=none"], "folder none does not exist"),
        (["data.folder=~nosuchuser/x"], "there is no user nosuchuser"),
        (["data.calibration_items=0"], "calibration_items must be at least 1"),
        (["data.verify_share=0"], "no rows that teach to verify"),
        (["template=none"], "unknown template 'none'"),
        (["merge.method=tise"], "did you mean 'ties'"),
        (["merge.method=regmean", "train.directions=0"], "regmean needs directions, and train.directions is 0"),
        (["merge.method=regmean", "data.verify_share=0"], "regmean needs directions of both roles"),
        (["merge.parameters={desnity: 1}"], "has no parameter 'desnity'"),
        (["merge.weights=[1]"], "1 weights for 2 adapters"),
        (["merge.method=linear", "merge.weights=[0.1, -0.1000000001]"], "must not sum to zero"),
        (["merge.method=task_arithmetic", "merge.weights=[0, 0]"], "every weight is zero"),
        (["merge.method=task_arithmetic", "merge.weights=[1e40, 1]"], "weights must not be above 1e"),
        (["merge.weights=[1, -0.5]"], "rsgwm averages: weights must not be negative"),
        (["merge.parameters={signal: foo}"], "no signal foo is recorded; there are all, draft, verify"),
        (["train.fine_tune_type=dora"], "only lora adapters can be merged"),
        (["data.tasks=[change, Change.jsonl]"], "must differ in their file names"),
        (["data.tasks=[caf\u00e9.jsonl, cafe\u0301.csv]"], "must differ in their file names"),
        (["data.tasks=[change, .mine.jsonl]"], "must not begin with a dot"),
        (["data.calibration_items=0", "loop.score=combined", "loop.threshold=0.5"], "calibration_items must be at"),
        (["merge.method=linear", "merge.weights=[1, -1]"], "must not sum to zero"),
        (["merge.rank=0"], "rank must be at least 1"),
        (["evaluate.items=0"], "items must be at least 1"),
        (["evaluate.timed=-1"], "timed must be at least 0"),
        (["evaluate.batch_rows=0"], "batch_rows must be at least 1"),
        (["evaluate.tasks=[nonesuch]"], "unknown task 'nonesuch'"),
        (["evaluate.tasks=[none.jsonl]"], "none.jsonl does not exist"),
        (["export.tolerance=0"], "tolerance must be above 0"),
        (["base="], "base"),
        (["train.keys=q_proj"], r"train\.keys: input should be a list, found 'q_proj'"),
        (["train.rank=true"], r"train\.rank: expected a number, found True"),
        (["data.rows=yes"], r"data\.rows: expected a number, found True"),
        (["loop.threshold=on"], r"loop\.threshold: expected a number, found True"),
        (["merge.weights=[1, true]"], r"merge\.weights: expected a number"),
    ],
)
def test_bad_settings_are_one_line(recipe_file, settings, message):
    with pytest.raises(RsgwmError, match=message) as caught:
        load_recipe(recipe_file(), settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("setting", "message"), [("train.rank=999", "rank 999"), ("train.keys=[q_prok]", "q_prok")])
def test_a_config_that_the_base_does_not_take_is_told_before_the_first_stage(recipe_file, tmp_path, setting, message):
    with pytest.raises(RsgwmError, match=message):
        run_recipe(load_recipe(recipe_file(), [setting]), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(
    ("score", "threshold", "settled"),
    [("auto", "auto", ("yesno", 0.9)), ("yesno", "auto", ("yesno", 0.9)),
     ("mean_logprob", "auto", ("mean_logprob", 0.7)),
     ("auto", 0.2, ("yesno", 0.2)), ("mean_logprob", 0.2, ("mean_logprob", 0.2))],
)  # fmt: skip
def test_a_threshold_is_that_of_its_score(score, threshold, settled):
    calibration = Calibration("yesno", 0.9, None, {}, {}, {}, {}, 4, 8, 4)
    assert score_and_threshold(score, threshold, calibration) == settled
    uncalibrated = "mean_logprob" if score == "auto" else score, 0.7 if threshold == "auto" else threshold
    assert score_and_threshold(score, threshold, None) == uncalibrated


def test_a_recipe_calibrates_the_score_that_it_names(recipe_file, tmp_path, monkeypatch):
    asked = []

    def calibrate(pipeline, questions, *arguments, score="auto", **options):
        asked.append(score)
        return Calibration(score, 0.25, None, {}, {}, {}, {}, 4, 8, 4)

    monkeypatch.setattr("mlx_rsgwm.recipes.run.calibrate", calibrate)
    settings = ["loop.score=yesno", "evaluate.items=1", "evaluate.timed=0", "loop.max_tokens=2", "export.peft=false"]
    summary = run_recipe(load_recipe(recipe_file(), settings), tmp_path / "out")
    assert asked == ["yesno"]
    assert (summary["score"], summary["threshold"]) == ("yesno", 0.25)


def test_missing_recipes(tmp_path):
    with pytest.raises(RsgwmError, match="did you mean 'demo'"):
        load_recipe("demos")
    with pytest.raises(RsgwmError, match="does not exist"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_the_pool_of_a_run_verifies(recipe_file, tmp_path, monkeypatch):
    """Calibrated and evaluated by all its adapters; the merged verifier is made and left alone."""
    monkeypatch.setenv("RSGWM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"

    def judge(question, draft, scores, *more):
        return DraftRecord(draft.text, "1", len(draft.text) % 2 == 0, scores)

    monkeypatch.setattr(judging, "judge", judge)
    settings = ["loop.verifier=pool/*", "data.calibration_items=6", "evaluate.timed=0"]
    recipe = load_recipe(recipe_file(), settings)
    first = run_recipe(recipe, out)
    assert first["executed"] == STAGES
    assert first["verifiers"] == ["pool/change", "pool/groups"]
    calibration = load_calibration(out / "pool-verifier")
    assert len(calibration.made_for["verifier"]) == 2
    assert (first["score"], first["threshold"]) == (calibration.score, calibration.threshold)
    assert not (out / "verifier" / "calibration.json").exists()
    (cached,) = (tmp_path / "cache" / "calibrations").iterdir()
    assert load_calibration(cached) == calibration, "rsgwm ask --verifier out/pool finds it"
    for item in read_items(out / "report" / "items.jsonl"):
        for draft in item.drafts:
            assert set(draft.adapters["mean_logprob"]) == {"pool/change", "pool/groups"}
    assert run_recipe(recipe, out)["executed"] == []
    mean = run_recipe(load_recipe(recipe_file(), [*settings, "loop.combine=mean"]), out)
    assert mean["executed"] == ["calibrate", "evaluate"]
    with pytest.raises(RsgwmError, match=r"loop.verifier: 'pool/x' matches none of verifier, pool/change, pool/groups"):
        load_recipe(recipe_file(), ["loop.verifier=pool/x"])
