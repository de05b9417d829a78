"""Public data sets for studies: train and test never meet, also where there is one split."""

from __future__ import annotations

import json

import pytest

from mlx_rsgwm.bench.merge_study import training_rows
from mlx_rsgwm.bench.public_tasks import SHARED_OUT, public_questions
from mlx_rsgwm.core.errors import RsgwmError

ROWS = {
    "gsm8k": lambda n: {"question": f"What is {n} and 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"},
    "svamp": lambda n: {"ID": str(n), "Body": f"Ann has {n} pens.", "Question": "How many?", "Answer": float(n)},
    "mawps": lambda n: {"question": f"How many are {n} pens?", "result": str(n)},
}


@pytest.fixture
def data(tmp_path):
    """Thirty rows of every split of three data sets; splits that are shared out have the same rows twice."""
    for task, row in ROWS.items():
        (tmp_path / task).mkdir()
        for place, split in enumerate(SHARED_OUT.get(task, ("train", "test"))):
            first = 0 if task == "mawps" and place == 1 else 30 * place
            lines = "".join(json.dumps(row(n)) + "\n" for n in range(first, first + 30))
            (tmp_path / task / f"{split}.jsonl").write_text(lines)
    return tmp_path


@pytest.mark.parametrize("task", ROWS)
def test_a_question_is_trained_or_tested_on(data, task):
    train, test = (public_questions(task, purpose, 100, 0, data) for purpose in ("train", "test"))
    texts = [question.question for question in train]
    assert len(set(texts)) == len(texts) >= 10
    assert test
    assert not {question.question for question in test} & set(texts)
    assert texts != [question.question for question in public_questions(task, "train", 100, 1, data)]
    assert [q.question for q in public_questions(task, "train", 5, 0, data)] == texts[:5]


def test_rows_of_a_public_task(data):
    rows = training_rows("svamp", 0, data)
    assert {row.role for row in rows} == {"draft", "verify"}
    assert all(row.task == "svamp" for row in rows)


def test_no_public_task(data):
    with pytest.raises(RsgwmError, match="'sums' is no public data set"):
        public_questions("sums", "train", 1, 0, data)
