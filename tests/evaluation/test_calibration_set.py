"""Held-out drafts: collected once, kept, refused for anything else, and fitted on."""

import json
from dataclasses import replace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.scoring import area_under_roc
from mlx_rsgwm.data.row_hashes import RowRecord
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.calibration_set import calibrate, collect, header_of
from mlx_rsgwm.evaluation.judging import label_drafts
from mlx_rsgwm.evaluation.records import DraftRecord
from mlx_rsgwm.evaluation.runner import evaluate
from mlx_rsgwm.inference.calibration import Calibration, NothingToTellApart, load_calibration, save_calibration
from mlx_rsgwm.inference.identity import describe_pipeline, pipeline_identity
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.scores import Combination, Scorer

QUESTIONS = generate("change", 6, 7, "calibration")


@pytest.fixture
def pipeline(make_loop):
    return make_loop(2, 6)


def test_items_hold_the_drafts_with_what_the_verifier_says(pipeline):
    items = collect(pipeline, QUESTIONS, seed=1, batch_rows=4)
    drafted = pipeline.draft_many([question.question for question in QUESTIONS], 2)
    for question, item, drafts in zip(QUESTIONS, items, drafted, strict=True):
        assert item.id == question.id
        assert item.texts == tuple(draft.text for draft in drafts)
        for draft, said in zip(drafts, item.signals, strict=True):
            alone = pipeline.reader.signals([question.question], [draft])[0]
            assert said.yesno == pytest.approx(alone.yesno, rel=1e-3)
            assert said.mean == pytest.approx(alone.mean, rel=1e-3)
            assert said.tokens == alone.tokens
        gold = pipeline.reader.signals([question.question], [pipeline.as_draft(question.answer)])[0]
        assert item.pair[0].mean == pytest.approx(gold.mean, rel=1e-3)
        assert item.pair[1].mean != item.pair[0].mean


def test_a_file_spares_the_drafting_and_belongs_to_its_settings(pipeline, tmp_path, monkeypatch):
    file = tmp_path / "kept" / "drafts.jsonl"
    items = collect(pipeline, QUESTIONS, seed=1, file=file)
    header = json.loads(file.read_text().splitlines()[0])["about"]
    assert header["attempts"] == 2
    monkeypatch.setattr(DraftVerify, "draft_many", lambda *_: pytest.fail("drafted again"))
    assert collect(pipeline, QUESTIONS, seed=1, file=file) == items
    with pytest.raises(RsgwmError, match=r"made with other settings \(questions is [^;]*\); choose"):
        collect(pipeline, QUESTIONS[:3], seed=1, file=file)
    pipeline.config = replace(pipeline.config, attempts=3, sampling=Sampling(temperature=1.0, max_tokens=6))
    with pytest.raises(RsgwmError, match=r"\(attempts is 3 now, was 2; temperature is 1.0 now, was [^;]*\)"):
        collect(pipeline, QUESTIONS, seed=1, file=file)
    file.write_text("questions\n")
    with pytest.raises(RsgwmError, match="is not a journal of this version"):
        collect(pipeline, QUESTIONS, seed=1, file=file)


def test_identity_follows_the_weights(pipeline, make_adapter, tmp_path):
    found = {}
    for seed in (2, 3):
        adapter = make_adapter(seed)
        adapter.save(tmp_path / str(seed))
        pipeline.slots.load("verifier", adapter)
        found[seed] = pipeline_identity(pipeline)
    assert {name for name, value in found[2].items() if found[3][name] != value} == {"verifier"}


CHANGES = {
    "draft_template": lambda p: setattr(p, "template", TEMPLATES["chat"]),
    "template": lambda p: setattr(p, "verify_template", TEMPLATES["chat"]),
    "attempts": lambda p: setattr(p, "config", replace(p.config, attempts=5)),
    "top_p": lambda p: setattr(p, "config", replace(p.config, sampling=replace(p.config.sampling, top_p=0.5))),
    "drafter": lambda p: setattr(p, "drafter", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_calibration_changes_a_run(pipeline, name):
    before, run = pipeline_identity(pipeline), describe_pipeline(pipeline)
    CHANGES[name](pipeline)
    after = pipeline_identity(pipeline)
    assert [field for field in before if before[field] != after[field]] == [name]
    assert describe_pipeline(pipeline) != run


def test_what_earlier_versions_kept_stays_of_use(pipeline, half_right, tmp_path):
    """They recorded one template: such drafts go on where the prompts are one, such a calibration is compared by it."""
    now = pipeline_identity(pipeline)
    assert "draft_template" not in header_of(pipeline, QUESTIONS)
    calibration = calibrate(pipeline, QUESTIONS, seed=1)
    save_calibration(tmp_path, calibration)
    stored = json.loads((tmp_path / "calibration.json").read_text())
    del stored["made_for"]["draft_template"]
    (tmp_path / "calibration.json").write_text(json.dumps(stored))
    earlier = load_calibration(tmp_path)
    pipeline.template = TEMPLATES["chat"]
    assert earlier.differences(now) == earlier.differences(pipeline_identity(pipeline)) == []
    assert calibration.differences(pipeline_identity(pipeline)) == ["draft_template"]
    assert header_of(pipeline, QUESTIONS)["draft_template"] == TEMPLATES["chat"].hash


@pytest.fixture
def half_right(monkeypatch):
    """A tiny random model answers nothing right; let every draft with an even number of letters count as right."""

    def judge(question, draft, scores, *more):
        return DraftRecord(draft.text, "1", len(draft.text) % 2 == 0, scores)

    monkeypatch.setattr(judging, "judge", judge)


@pytest.mark.parametrize("right", [False, True])
def test_drafts_that_are_all_right_or_all_wrong_calibrate_nothing(pipeline, monkeypatch, right):
    monkeypatch.setattr(judging, "judge", lambda question, draft, *more: DraftRecord(draft.text, "1", right))
    with pytest.raises(NothingToTellApart, match=f"{'all' if right else 'none'} of 12 drafts of 6 questions are right"):
        calibrate(pipeline, QUESTIONS, seed=1)
    with pytest.raises(RsgwmError, match="no held-out questions"):
        calibrate(pipeline, [], seed=1)


def test_a_calibration_says_what_it_was_made_of(pipeline, half_right):
    texts = [question.question for question in QUESTIONS]
    made = calibrate(pipeline, QUESTIONS, seed=1, record=RowRecord.of(texts, ["another"]))
    assert (made.items, made.drafts) == (6, 12)
    assert made.made_for == pipeline_identity(pipeline)
    assert RowRecord.from_description(made.row_hashes, "") == RowRecord.of(texts, ["another"])


def test_perturbed_pairs_are_scored_right_against_wrong(pipeline, half_right):
    items = collect(pipeline, QUESTIONS, seed=1)
    found = calibrate(pipeline, QUESTIONS, seed=1)
    values = [signals.mean_logprob for item in items for signals in item.pair]
    assert found.perturbed_auroc["mean_logprob"] == area_under_roc(values, [True, False] * len(items))


def test_the_combined_score_comes_with_what_is_kept_beside_the_verifier(pipeline, make_adapter, tmp_path):
    combination = Combination((0.0, -1.0, -4.0, 8.0), (1.0,) * 4, (0.5, 1.0, 0.2, 0.0), 0.3)
    config = replace(pipeline.config, score="combined", threshold=0.4)
    arguments = (pipeline.slots, pipeline.template, "drafter", "verifier", config)
    with pytest.raises(RsgwmError, match="rsgwm calibrate"):
        DraftVerify(*arguments)
    verifier = make_adapter(2)
    verifier.save(tmp_path)
    pipeline.slots.load("verifier", verifier)
    save_calibration(tmp_path, Calibration("combined", 0.4, combination, {}, {}, {}, {}, 6, 12, 0))
    calibrated = DraftVerify(*arguments)
    records = evaluate(calibrated, QUESTIONS, timed=0)
    for record, item in zip(records, collect(pipeline, QUESTIONS, seed=1), strict=True):
        for draft, signals in zip(record.drafts, item.signals, strict=True):
            assert set(draft.scores) == {"yesno", "mean_logprob", "combined"}
            assert draft.scores["mean_logprob"] == pytest.approx(signals.mean_logprob, rel=1e-3)
            assert draft.scores["yesno"] == pytest.approx(signals.yesno, rel=1e-3)
            assert draft.scores["combined"] == pytest.approx(Scorer("combined", combination).value(signals), rel=1e-3)
        for mode in ("sequential", "parallel"):
            calibrated.config = replace(config, mode=mode)
            answer = calibrated.answer(record.question)
            assert (answer.text, answer.attempts) == (record.returned.text, record.attempts)
            assert answer.score == pytest.approx(record.returned.scores["combined"], rel=1e-3)
    assert calibrated.answer_many([QUESTIONS[0].question])[0].text == records[0].returned.text
    assert DraftVerify(*arguments[:4], pipeline.config, calibration=None).scores == ("yesno", "mean_logprob")


def test_drafts_of_several_adapters_are_labelled_together(pipeline, base, make_adapter, monkeypatch):
    pipeline.slots.load("other", make_adapter(5))
    second = DraftVerify(pipeline.slots, pipeline.template, "other", None, pipeline.config)
    found = label_drafts([pipeline, second], QUESTIONS, batch_rows=8)
    assert [len(item) for item in found] == [4] * 6
    expected = second.draft_many([question.question for question in QUESTIONS], 2)
    assert [item[2][0] for item in found] == [drafts[0].text for drafts in expected]
    assert not any(correct for item in found for _, correct in item)
    gold = QUESTIONS[0]
    monkeypatch.setattr(
        DraftVerify, "draft_many", lambda *_: [[pipeline.as_draft(gold.answer)] for _ in range(len(QUESTIONS))]
    )
    assert label_drafts([pipeline], QUESTIONS)[0][0][1]
