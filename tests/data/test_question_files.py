"""Files of one's own questions: JSON lines, tables and mlx-lm's rows, and what is refused by line."""

import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.questions import Question, load_jsonl
from tests.data.row_files import write


@pytest.mark.parametrize(
    ("answer", "rationale", "gold"),
    [
        ("1 + 1 = <<1+1=2>>2\n#### 2", "1 + 1 = 2", "2"),
        ("first\n\n####\n$1,080\n", "first", "$1,080"),
        ("#### (1, 4)", "", "(1, 4)"),
        ("Half of 3 is \\boxed{\\frac32}.", "Half of 3 is \\boxed{\\frac32}.", "\\frac32"),
        ("$\\boxed{2^{10}}$", "", "2^{10}"),
        ("9 - 2 = 7\nSo the answer is COVID-19.", "9 - 2 = 7\nSo the answer is COVID-19.", "COVID-19"),
        ("first\nthen\nParis", "", "first\nthen\nParis"),
        ("#### Heading\nParis", "", "#### Heading\nParis"),
        ("Paris", "", "Paris"),
        ("$1,080", "", "$1,080"),
        ("007", "", "007"),
        ("So he has 5 apples.", "", "So he has 5 apples."),
        (True, "", "yes"),
        (43.0, "", "43"),
        (0.35, "", "0.35"),
        (0.6666666667, "", "0.6666666667"),
        (1e-7, "", "0.0000001"),
        (12345678901234567890, "", "12345678901234567890"),
    ],
)
def test_any_jsonl(tmp_path, answer, rationale, gold):
    path = write(tmp_path / "mine.jsonl", {"question": "Q", "answer": answer})
    assert load_jsonl(path) == [Question("mine-1", "mine", "Q", rationale, gold)]


@pytest.mark.parametrize(
    ("answer", "rationale", "gold"),
    [
        ("So he has 5 apples.", "So he has 5 apples.", "5"),
        ("From 10-5 we have −3", "From 10-5 we have −3", "-3"),
        ("$1,080", "", "1080"),
        ("1 + 1 = 2\n#### 2 apples", "1 + 1 = 2", "2"),
        (7, "", "7"),
    ],
)
def test_a_row_may_ask_for_a_number(tmp_path, answer, rationale, gold):
    path = write(tmp_path / "mine.jsonl", {"question": "Q", "answer": answer, "answer_type": "number"})
    assert load_jsonl(path) == [Question("mine-1", "mine", "Q", rationale, gold)]


def test_answer_types(tmp_path):
    path = tmp_path / "mine.jsonl"
    write(path, {"question": "Q", "answer": "The answer is 5.\n#### 5", "answer_type": "text"})
    assert load_jsonl(path)[0].gold == "The answer is 5.\n#### 5"
    write(path, {"question": "Q", "answer": "none", "answer_type": "number"}, {**OWN, "answer_type": "integer"})
    with pytest.raises(RsgwmError, match=r"line 1: answer_type is number, and there is none.*line 2: answer_type must"):
        load_jsonl(path)
    write(path, {**OWN, "task": "t" * 81}, {**OWN, "rationale": ["a"]}, {**OWN, "task": "a\nb"})
    with pytest.raises(RsgwmError, match=r"line 1: task must be.*line 2: rationale is not text.*line 3: task must be"):
        load_jsonl(path)
    write(path, {**OWN, "rationale": float("nan"), "id": float("nan")})
    assert load_jsonl(path) == [Question("mine-1", "mine", "Q", "", "A")]


OWN = {"question": "Q", "answer": "A"}


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({**OWN, "prompt": "You are a pirate."}, "prompt"),
        ({**OWN, "context": "Q stands for quick."}, "context"),
        ({**OWN, "input": "7, 8"}, "input"),
        ({**OWN, "passage": ["One.", "Two."]}, "passage"),
        ({**OWN, "system": "Be brief."}, "system"),
        ({**OWN, "messages": [{"role": "user", "content": "Another?"}]}, "messages"),
        ({"prompt": "Q", "completion": "A", "article": "Long."}, "article"),
        ({"prompt": "Q", "completion": "A", "messages": [{"role": "system", "content": "Be brief."}]}, "messages"),
    ],
)
def test_what_stands_beside_a_question_is_not_lost(tmp_path, row, lost):
    with pytest.raises(RsgwmError, match=f"line 1: it has {lost} beside its question .*which would not be asked"):
        load_jsonl(write(tmp_path / "mine.jsonl", row))


@pytest.mark.parametrize(
    "row",
    [
        {**OWN, "prompt": "Q"},
        {**OWN, "prompt": ""},
        {**OWN, "context": None, "passage": float("nan"), "input": []},
        {"question": "Read this:\nOne.  Two.\nHow many?", "answer": "2", "passage": "One. Two."},
        {**OWN, "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Long, so A"}]},
        {"prompt": "Q", "completion": "A", "instruction": "Q"},
        {**OWN, "source": "a book", "level": 3},
    ],
)
def test_what_a_question_holds_may_stand_beside_it(tmp_path, row):
    assert load_jsonl(write(tmp_path / "mine.jsonl", row))[0].gold in ("A", "2")


def test_tables(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('\ufeffId;Question;Answer\n\n7;"two\nlines; and ""more""";3,5\n8;Q;1\n', encoding="utf-8")
    assert [(q.id, q.question, q.gold) for q in load_jsonl(path)] == [
        ("7", 'two\nlines; and "more"', "3,5"),
        ("8", "Q", "1"),
    ]
    path.write_text("question,answer\nQ,A\n\nQ2,a,b\nQ3,\nQ4\n")
    with pytest.raises(RsgwmError, match=r"line 4: 3 cells.*line 5: no gold answer.*line 6: 1 cells"):
        load_jsonl(path)
    path.write_text("What is 1?,1\n")
    with pytest.raises(RsgwmError, match="line 1 must be a header with question and answer, found what is 1"):
        load_jsonl(path)
    path.write_text("question,answer,question\na,b,c\n")
    with pytest.raises(RsgwmError, match="the header names question twice"):
        load_jsonl(path)
    path.write_text('question,answer\nQ,"never closed\nQ2,A\n')
    with pytest.raises(RsgwmError, match="line 2: not valid CSV"):
        load_jsonl(path)
    path.write_text("question,answer\nQ," + "x" * 200_000 + "\n")
    assert len(load_jsonl(path)[0].gold) == 200_000
    table = tmp_path / "mine.jsonl"
    table.write_text("question,answer\nQ,A\n")
    with pytest.raises(RsgwmError, match=r"is a table, not JSON lines; name it mine\.csv"):
        load_jsonl(table)


def test_any_jsonl_optional_fields(tmp_path):
    row = {"id": 7, "task": "geo", "question": "Q\u2028?", "answer": "Paris", "rationale": "It is in France."}
    path = tmp_path / "mine.jsonl"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_jsonl(path) == [Question("7", "geo", "Q\u2028?", "It is in France.", "Paris")]
    assert load_jsonl(path, "other")[0].task == "other"
    write(path, row, row)
    with pytest.raises(RsgwmError, match=r"line 2: id '7' is already that of line 1"):
        load_jsonl(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RsgwmError, match="not UTF-8"):
        load_jsonl(path)
    with pytest.raises(RsgwmError, match="does not exist"):
        load_jsonl(tmp_path / "gone.jsonl")
    write(path, {"question": "Q", "answer": None}, '{"question": "Q", "answer": NaN}')
    with pytest.raises(RsgwmError, match=r"line 1: no gold answer in answer; line 2: answer is not finite"):
        load_jsonl(path)


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "What is 1 + 1?", "completion": "1 + 1 = 2\n#### 2"}, ("What is 1 + 1?", "1 + 1 = 2", "2")),
        ({"prompt": " Capital of France? ", "completion": " Paris"}, ("Capital of France?", "", "Paris")),
        ({"prompt": "Q", "completion": "COVID-19", "id": "c"}, ("Q", "", "COVID-19")),
        ({"prompt": "Q", "completion": 3.50}, ("Q", "", "3.5")),
        ({"question": "asked", "answer": "A", "prompt": "asked", "completion": "B"}, ("asked", "", "A")),
        (chat(("user", "Q\nmore"), ("assistant", "so\n#### 7")), ("Q\nmore", "so", "7")),
        (chat(("user", [{"text": "a"}, {"type": "text", "text": "b"}]), ("assistant", "A")), ("a\nb", "", "A")),
        (chat(("user", "Q"), ("assistant", "<think>\n3 or 4\n</think>\n\n4")), ("Q", "<think>\n3 or 4\n</think>", "4")),
    ],
)  # fmt: skip
def test_rows_of_mlx_lm_are_questions(tmp_path, row, expected):
    question = load_jsonl(write(tmp_path / "valid.jsonl", row))[0]
    assert (question.question, question.rationale, question.gold) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat(("system", "Be short."), ("user", "Q"), ("assistant", "A")), "system message.*write it into"),
        (chat(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")), "are user, assistant, user"),
        (chat(("user", "Q")), "messages are user, and only"),
        (chat(("user", "Q"), ("assistant", None)), "no text in the answer"),
        (chat(("user", [{"type": "image", "url": "x"}]), ("assistant", "A")), "more than text"),
        (chat(("user", ["Q", 5]), ("assistant", "A")), "more than text"),
        ('{"question": "Q", "answer": "A", "question": "R"}', r"not valid JSON \('question' is given twice\)"),
        ({"messages": "Q"}, "not a list of messages"),
        ({"prompt": "Q", "completion": " "}, "no gold answer: completion is empty"),
        ({"prompt": ["Q"], "completion": "A"}, "prompt is not text"),
        ({"prompt": "Q", "answer": "A"}, "it has prompt, answer; rows need question and answer, or prompt"),
        ({"question": "Which?", "choices": ["sea", "sky"], "answer": 1}, "choices that its question does not show"),
        ({"question": "Which?", "options": {"A": "sea", "B": "sky"}, "answer": "B"}, "options that its question does"),
        ({"text": "Q A"}, "no question, it has text; rows need"),
        ({"instruction": "Q", "output": "A"}, "no question, it has instruction, output; rows need"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "no question, it has conversations; rows need"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_asked_are_refused_by_name(tmp_path, row, message):
    with pytest.raises(RsgwmError, match=f"line 1: .*{message}") as caught:
        load_jsonl(write(tmp_path / "valid.jsonl", row))
    assert "\n" not in str(caught.value)


def test_a_table_of_prompts_and_completions(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt;completion\nQ, and more;#### 4\n")
    assert [(q.question, q.gold) for q in load_jsonl(path)] == [("Q, and more", "4")]


def test_rows_of_every_form_are_the_same_rows(tmp_path):
    """What is trained on in one form is recognised when it is asked in another."""
    from mlx_rsgwm.data.mlx_lm_rows import load_examples
    from mlx_rsgwm.data.row_hashes import row_keys

    text = "A train leaves at 3.\nIt takes two hours.\nWhen does it arrive?"
    forms = (
        {"prompt": text, "completion": "5"},
        chat(("user", text), ("assistant", "5")),
        chat(("user", [{"type": "text", "text": part} for part in text.split("\n")]), ("assistant", "5")),
    )
    for trained in forms:
        record = load_examples(write(tmp_path / "train.jsonl", trained), True).record()
        for row in (*forms, {"question": text, "answer": "5"}):
            question = load_jsonl(write(tmp_path / "test.jsonl", row))[0]
            assert record.has(row_keys(question.question))


def test_the_same_error_of_many_rows_is_said_once(tmp_path):
    rows = [{"question": f"Q{n}", "answer": ""} for n in range(8)]
    rows[4] = {"question": 7, "answer": "A"}
    with pytest.raises(RsgwmError) as told:
        load_jsonl(write(tmp_path / "mine.jsonl", *rows))
    assert str(told.value).partition("mine.jsonl: ")[2] == (
        "line 1, line 2, line 3 and 4 more: no gold answer: answer is empty; line 5: question is not text: '7'"
    )
