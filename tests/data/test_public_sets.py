"""Public question sets: the real slices, the Hub's shapes and the local ones, and rows with something wrong in them."""

import re
import sys
import types

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.numbers import parse_number
from mlx_rsgwm.data.public_sets import SOURCES
from mlx_rsgwm.data.questions import Question, load_questions
from tests.data.row_files import DATA, needs_data, write


@needs_data
@pytest.mark.parametrize(
    ("task", "split", "count", "gold"),
    [
        ("gsm8k", "train", 2000, r"-?[0-9]+(\.[0-9]+)?"),
        ("gsm8k", None, 600, r"-?[0-9]+(\.[0-9]+)?"),
        ("math", "test", 400, r"(?s).+"),
        ("commonsense_qa", None, 400, "[A-E]"),
        ("strategyqa", None, 229, "yes|no"),
        ("mawps", "singleeq", 254, r"[0-9./]+"),
        ("svamp", None, 500, r"-?[0-9./]+"),
    ],
)
def test_real_slices(task, split, count, gold):
    questions = load_questions(task, split, DATA)
    assert len(questions) == count
    assert len({question.id for question in questions}) == count
    for question in questions:
        assert question.task == task
        assert question.question
        assert re.fullmatch(gold, question.gold), question
        assert "<<" not in question.rationale
        assert question.answer.endswith(f"#### {question.gold}")


@needs_data
def test_first_gsm8k_rows_word_for_word():
    first = load_questions("gsm8k", "train", DATA, limit=1)[0]
    assert first.gold == "72"
    assert first.rationale == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
    )
    thousands = [q for q in load_questions("gsm8k", "train", DATA) if parse_number(q.gold) > 999]
    assert thousands
    assert not any("," in question.gold for question in thousands)


@needs_data
def test_order_slice_and_seed():
    everything = load_questions("svamp", "test", DATA)
    assert load_questions("svamp", "test", DATA, limit=5, offset=3) == everything[3:8]
    shuffled = load_questions("svamp", "test", DATA, seed=1)
    assert shuffled != everything
    assert sorted(q.id for q in shuffled) == sorted(q.id for q in everything)
    assert load_questions("svamp", "test", DATA, seed=1, limit=7) == shuffled[:7]


ROWS = {
    "gsm8k": ({"question": "Q?", "answer": "2*5=<<2*5=10>>10\n#### 1,010"}, Question("", "", "Q?", "2*5=10", "1010")),
    "math": (
        {"problem": "P", "level": "1", "type": "A", "solution": r"so $\boxed{\frac{1}{\{2\}}}$ ok"},
        Question("", "", "P", r"so $\boxed{\frac{1}{\{2\}}}$ ok", r"\frac{1}{\{2\}}"),
    ),
    "commonsense_qa": (
        {
            "id": "x",
            "question": "Where?",
            "question_concept": "c",
            "choices": {"label": ["A", "B"], "text": ["bank", "mall"]},
            "answerKey": "B",
        },
        Question("x", "", "Where?\nA. bank\nB. mall", "", "B"),
    ),
    "strategyqa": (
        {"qid": "s", "term": "t", "question": "Is it?", "answer": True, "facts": "One. Two."},
        Question("s", "", "Is it?", "One. Two.", "yes"),
    ),
    "mawps": ({"id": "m", "question": "How many?", "result": "43"}, Question("", "", "How many?", "", "43")),
    "svamp": (
        {"ID": "c-1", "Body": "There are 2", "Question": "How many?", "Answer": "145.0"},
        Question("c-1", "", "There are 2. How many?", "", "145"),
    ),
}


@pytest.mark.parametrize("task", sorted(SOURCES))
def test_hub_shape(task, monkeypatch):
    row, expected = ROWS[task]
    calls = []

    def load_dataset(name, config, *, split, revision):
        calls.append((name, config, split, revision))
        return [{**row, "id": f"{row['id']}{len(calls)}"} if "id" in row else row] if len(calls) == 1 else []

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (found,) = load_questions(task, "dev", revision="abc")
    source = SOURCES[task]
    assert [call[0] for call in calls] == [source.hub] * len(source.configs)
    assert calls[0][2:] == (source.splits.get("dev", "dev"), "abc")
    assert (found.question, found.rationale, found.gold) == (expected.question, expected.rationale, expected.gold)
    assert found.task == task


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(*rest, **named):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(RsgwmError, match="openai/gsm8k from the Hub: no route; give a local folder") as caught:
        load_questions("gsm8k")
    assert "\n" not in str(caught.value)


def test_local_commonsense_and_strategy_shapes(tmp_path):
    choices = [{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}]
    write(
        tmp_path / "commonsense_qa" / "dev.jsonl",
        {"id": "1", "answerKey": "A", "question": {"stem": "Where?", "choices": choices}},
    )
    write(tmp_path / "strategyqa" / "dev.jsonl", {"qid": "2", "question": "?", "answer": False, "facts": ["a.", "b."]})
    assert load_questions("commonsense_qa", "dev", tmp_path)[0].question == "Where?\nA. bank\nB. mall"
    assert load_questions("strategyqa", "dev", tmp_path)[0] == Question("2", "strategyqa", "?", "a. b.", "no")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"test\.jsonl is empty"),
        (["", "  "], r"test\.jsonl is empty"),
        ([{"question": "Q", "answer": "#### 1"}, "{oops"], r"test\.jsonl: line 2: not valid JSON"),
        (["", {"question": "Q", "answer": "no mark"}], r"line 2: no gold answer"),
        ([{"question": "Q", "answer": "####  "}], r"line 1: no gold answer"),
        ([{"question": "", "answer": "#### 1"}], r"line 1: no question"),
        ([{"question": 7, "answer": "#### 1"}], r"line 1: question is not text"),
        (["[1]"], r"line 1: expected a JSON object, found list"),
        ([{"answer": "#### 1"}, {"question": "Q"}], r"line 1: no question; line 2: no answer"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, rows, message):
    write(tmp_path / "gsm8k" / "test.jsonl", *rows)
    with pytest.raises(RsgwmError, match=message) as caught:
        load_questions("gsm8k", "test", tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_things_say_what_is_there(tmp_path):
    write(tmp_path / "svamp" / "test.jsonl", {"Body": "b", "Question": "q", "Answer": 1.0})
    with pytest.raises(RsgwmError, match=r"data folder .*nowhere does not exist"):
        load_questions("svamp", "test", tmp_path / "nowhere")
    with pytest.raises(RsgwmError, match="has no folder gsm8k; there is svamp"):
        load_questions("gsm8k", "test", tmp_path)
    with pytest.raises(RsgwmError, match="has no split 'train'; there is test"):
        load_questions("svamp", "train", tmp_path)
    with pytest.raises(RsgwmError, match=r"unknown task 'nope'; known are gsm8k"):
        load_questions("nope", "test", tmp_path)
    with pytest.raises(RsgwmError, match="limit must be at least 1"):
        load_questions("svamp", "test", tmp_path, limit=0)
    with pytest.raises(RsgwmError, match="offset must be"):
        load_questions("svamp", "test", tmp_path, offset=1)


def test_labels_that_are_missing_or_wrong(tmp_path):
    choices = [{"label": "A", "text": "bank"}]
    question = {"stem": "Where?", "choices": choices}
    write(tmp_path / "commonsense_qa" / "test.jsonl", {"question": question}, {"question": question, "answerKey": "Z"})
    with pytest.raises(RsgwmError, match=r"line 1: no gold answer.*line 2: answerKey 'Z' is not one"):
        load_questions("commonsense_qa", "test", tmp_path)
    write(tmp_path / "math" / "test.jsonl", {"problem": "p", "solution": r"\boxed{1"})
    with pytest.raises(RsgwmError, match="line 1: no gold answer: solution has no"):
        load_questions("math", "test", tmp_path)
