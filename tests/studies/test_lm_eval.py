"""lm-evaluation-harness beside us: what its filters say of the same drafts, and our pipeline as its model."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.evaluation.judging import judge
from mlx_rsgwm.evaluation.records import ItemRecord
from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.studies.lm_eval import (
    disagreements,
    drive,
    lm_eval_readings,
    loglikelihood,
    make_model,
    question_of,
    until,
)

pytest.importorskip("lm_eval")


@pytest.fixture
def pipeline(make_loop):
    return make_loop(2, 5)


def test_its_filters_read_as_it_does():
    texts = [
        "so 5\n#### 18",
        "The answer is $18.50.",
        "nothing",
        "#### 1,080\nQuestion: more?\n#### 3",
        "a 7. It is (5)",
    ]
    found = lm_eval_readings(texts, ["18", "18.5", "1", "1080", "5"])
    assert found["strict-match"] == [("18", True), (None, False), (None, False), ("1,080", True), (None, False)]
    # Its flexible-extract takes a full stop for a number of its own, and keeps the one after a price.
    assert found["flexible-extract"][0] == ("18", True)
    assert found["flexible-extract"][3][1] is True


def test_every_disagreement_is_listed():
    rows = [("10", "so 2 * 5 = 10 units."), ("18", "#### 18"), ("7", "7 out of 12"), ("4", "#### Answer: 4")]
    records = []
    for index, (gold, text) in enumerate(rows):
        question = Question(f"g{index}", "gsm8k", "q", "", gold)
        draft = judge(question, Draft(1, (1,), True, text), {})
        records.append(ItemRecord(f"g{index}", "gsm8k", "q", gold, (draft,), "", 1.0, False, 1, 0))
    found = {(row["item"], row["filter"]): row for row in disagreements(records)}
    assert ("g1", "strict-match") not in found
    assert found["g2", "flexible-extract"]["theirs"] == "12"
    assert found["g2", "flexible-extract"]["ours"] == "7"
    assert not found["g2", "flexible-extract"]["theirs_correct"]
    # Its strict pattern takes no word between marker and number; a reader does.
    assert found["g3", "strict-match"]["ours"] == "4"
    assert not found["g3", "strict-match"]["theirs_correct"]
    assert ("g0", "flexible-extract") not in found


def test_question_and_stops():
    assert question_of("Question: What is 2 + 2?\nAnswer:") == "What is 2 + 2?"
    assert question_of("Question: a?\nAnswer: 1\n\nQuestion: b\nc?\nAnswer:") == "b\nc?"
    assert question_of("Say something") == "Say something"
    assert until("a</s>b\nQuestion: c", ["Question:", "</s>"]) == "a"
    assert until("abc", []) == "abc"


def test_loglikelihood_is_the_drafters(pipeline):
    context, continuation = "What is", " 2 + 2?"
    found, greedy = loglikelihood(pipeline, context, continuation)
    ids = pipeline.tokenizer.encode(context + continuation)
    start = len(pipeline.tokenizer.encode(context))
    with pipeline.slots.using("drafter"):
        logits = np.array(pipeline.slots.model(mx.array([ids]))[0], dtype=np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert found == pytest.approx(sum(logprobs[at - 1, ids[at]] for at in range(start, len(ids))), abs=1e-3)
    assert greedy is all(logits[at - 1].argmax() == ids[at] for at in range(start, len(ids)))
    assert loglikelihood(pipeline, "", "a")[0] < 0
    assert loglikelihood(pipeline, "a", "") == (0.0, True)
    with pytest.raises(RsgwmError, match="pipeline or drafter"):
        make_model(pipeline, "verifier")


@pytest.mark.parametrize("role", ["pipeline", "drafter"])
def test_lm_eval_drives_it(pipeline, role, tmp_path):
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    found = drive(pipeline, [task], role, 2, 0)
    scores = found["results"]["tiny_numbers"]
    assert math.isfinite(next(value for key, value in scores.items() if key.startswith("exact_match,")))
    texts = [sample["resps"][0][0] for sample in found["samples"]["tiny_numbers"]]
    questions = [row["question"] for row in rows[:2]]
    expected = (
        [drafts[0].text for drafts in pipeline.draft_many(questions, 1)]
        if role == "drafter"
        else [answer.text for answer in pipeline.answer_many(questions)]
    )
    assert texts == expected


@pytest.mark.parametrize("task", ["nosuch", {"task": "x", "dataset_path": 7}])
def test_what_is_no_task_is_said(pipeline, task):
    with pytest.raises(RsgwmError, match="lm_eval cannot use the task"):
        drive(pipeline, [task], "drafter", 1, 0)
