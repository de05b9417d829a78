"""Running items: the same records whatever was killed and resumed, several seeds, other verifiers, bad input."""

import json
import random
from dataclasses import replace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.evaluation.journal import EvaluationJournal
from mlx_rsgwm.evaluation.judging import judge, verified_tokens
from mlx_rsgwm.evaluation.records import ItemRecord, by_seed, read_items, read_with, write_items
from mlx_rsgwm.evaluation.runner import describe_run, evaluate
from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.inference.loop import DraftVerify

QUESTIONS = generate("change", 7, 1, "test") + generate("groups", 4, 1, "test")


@pytest.fixture
def pipeline(make_loop):
    return make_loop(2, 6)


def untimed(records):
    return [
        replace(
            record,
            latency_ms=None,
            energy_j=None,
            drafts=tuple(replace(draft, latency_ms=None) for draft in record.drafts),
        )
        for record in records
    ]


def run(pipeline, path, **more):
    about = describe_run(pipeline, QUESTIONS, 6)
    return evaluate(pipeline, QUESTIONS, 2, 6, seeds=(1, 2), journal=EvaluationJournal(path, about), **more)


def test_killed_anywhere_and_resumed_equals_the_uninterrupted_run(pipeline, tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = untimed(run(pipeline, path))
    data = path.read_bytes()
    first_line = data.index(b"\n") + 1
    rng = random.Random(0)
    for _ in range(6):
        path.write_bytes(data[: rng.randrange(first_line, len(data))])  # a crash leaves any beginning of the file
        assert untimed(run(pipeline, path)) == whole
    assert untimed(evaluate(pipeline, QUESTIONS, 0, 6, seeds=(1, 2))) == whole


def test_a_whole_journal_asks_the_model_nothing(pipeline, tmp_path, monkeypatch):
    found = run(pipeline, tmp_path / "journal.jsonl")
    monkeypatch.setattr(DraftVerify, "draft_many", lambda *rest: pytest.fail("drafted again"))
    monkeypatch.setattr(DraftVerify, "answer", lambda *rest: pytest.fail("timed again"))
    assert run(pipeline, tmp_path / "journal.jsonl") == found


def test_interrupted_between_batches_keeps_what_was_finished(pipeline, tmp_path, monkeypatch):
    path, calls = tmp_path / "journal.jsonl", []
    real = DraftVerify.draft_many

    def stop(self, *rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(DraftVerify, "draft_many", stop)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, path)
    assert len(EvaluationJournal(path, describe_run(pipeline, QUESTIONS, 6)).items) == 6


def test_a_journal_of_another_run_is_refused_or_replaced(pipeline, tmp_path):
    path = tmp_path / "journal.jsonl"
    EvaluationJournal(path, {"seed": 1, "items": 3})
    with pytest.raises(RsgwmError, match=r"\(seed is 2 now, was 1; items is 4 now, was 3\); choose another place"):
        EvaluationJournal(path, {"seed": 2, "items": 4})
    assert EvaluationJournal(path, {"seed": 2}, replace=True).items == {}
    path.write_text('{"about": {"seed": 2}}\n{"part": "x"}\n')
    with pytest.raises(RsgwmError, match=r"line 2 is damaged"):
        EvaluationJournal(path, {"seed": 2})


def test_records_hold_what_the_report_needs(pipeline, tmp_path):
    records = evaluate(pipeline, QUESTIONS, 2, 6, seeds=(1, 2), drafts=3)
    assert [record.seed for record in records] == [1] * 11 + [2] * 11
    assert list(by_seed(records)) == [1, 2]
    assert records[0].drafts[0].text != records[11].drafts[0].text
    assert sum(record.latency_ms is not None for record in records) == 2
    for record in records:
        assert len(record.drafts) == 3
        assert record.drafts[0].readings.keys() == {"strict", "flexible", "math"}
        assert record.verified_tokens > record.drafted_tokens
        assert read_with(record, "flexible").first.value == record.first.readings["flexible"].value
    write_items(tmp_path / "items.jsonl", records)
    assert read_items(tmp_path / "items.jsonl") == records


def test_other_verifiers_score_the_same_drafts(pipeline):
    own = DraftVerify(pipeline.slots, pipeline.template, "drafter", "drafter", pipeline.config)
    plain = evaluate(pipeline, QUESTIONS[:3], 0)
    both = evaluate(pipeline, QUESTIONS[:3], 0, beside={"self": own})
    for one, other in zip(plain, both, strict=True):
        assert [draft.text for draft in one.drafts] == [draft.text for draft in other.drafts]
        assert set(other.first.scores) == {"yesno", "mean_logprob", "self:yesno"}
        assert other.first.scores["self:yesno"] != other.first.scores["yesno"]
        assert {name: other.first.scores[name] for name in one.first.scores} == one.first.scores


def test_drafts_alone_have_no_scores(pipeline):
    records = evaluate(pipeline, QUESTIONS[:2], 0, scores=())
    assert all(not record.accepted and record.attempts == 1 and not record.first.scores for record in records)


def test_verified_tokens_are_those_of_the_prompts(pipeline):
    draft = Draft(1, (5, 6, 7), True, " 4\n#### 4")
    tokenizer, template = pipeline.tokenizer, pipeline.template
    (found,) = verified_tokens(pipeline, "2 + 2?", [draft])
    assert found["yesno"] == len(template.verify_prompt(tokenizer, "2 + 2?", "4\n#### 4"))
    assert found["mean_logprob"] == len(template.draft_prompt(tokenizer, "2 + 2?")) + 4


def test_abstaining_is_a_refusal():
    question = Question("a", "gsm8k", "q", "", "4")
    drafts = (judge(question, Draft(1, (1,), True, "#### 4"), {"yesno": 0.2}),)
    record = ItemRecord("a", "gsm8k", "q", "4", drafts, "yesno", 0.5, False, 1, 0, abstain=True)
    assert record.returned.status == "no_answer"
    assert record.first.correct
    assert replace(record, abstain=False).returned.correct


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "no questions"),
        ([QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], "given twice: change-test-1-0"),
        ([replace(QUESTIONS[0], gold=" ")], "without a gold answer: change-test-1-0"),
    ],
)
def test_bad_questions(pipeline, questions, message):
    with pytest.raises(RsgwmError, match=message):
        evaluate(pipeline, questions, 0)


def test_items_given_twice_are_refused(tmp_path, pipeline):
    (record,) = evaluate(pipeline, QUESTIONS[:1], 0)
    path = tmp_path / "items.jsonl"
    path.write_text(2 * (json.dumps(record.to_dict()) + "\n"))
    with pytest.raises(RsgwmError, match=r"line 2: item 'change-test-1-0' is already in line 1"):
        read_items(path)
    path.write_text("\n")
    with pytest.raises(RsgwmError, match="holds no items"):
        read_items(path)
