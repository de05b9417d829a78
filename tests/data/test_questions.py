"""Loaders on the real slices, on both shapes of a row, and on files with something wrong in them."""

import csv
import json
import os
import re
import sys
import types
from pathlib import Path

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.gold_answers import marked_answer
from mlx_rsgwm.data.numbers import parse_number, write_number
from mlx_rsgwm.data.public_sets import SOURCES
from mlx_rsgwm.data.questions import Question, load_jsonl, load_questions

DATA = Path(os.environ.get("RSGWM_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data slices: set RSGWM_DATA to a folder of them")


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


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


# What people's files hold as answers, and what was once made of it.
GOLDS = (
    "Apollo 11", "2^10", "10:30", "COVID-19", "(2, 3)", "2024-05-01", "(1,4)", "2x^2-18", "\\sqrt{10}", "$5", "50%",
    "3 1/2", "1,000", "6/4", "-0", "+49 30 1234567", "192.168.0.1", "v2.0.1", "B", "yes", "3 apples", "№ 7", "１２",
    "٣٤", "H2O", "1e5", "x=5", "[1, 2)", "{1, 2}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "two\u2028lines", "a\nb",
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_golds_are_what_the_rows_say(tmp_path, suffix):
    from mlx_rsgwm.data.corpus import make_rows

    rows = [
        {"id": f"r{number}", "question": f"Question {number}?", "answer": gold} for number, gold in enumerate(GOLDS)
    ]
    questions = load_jsonl(write_file(tmp_path / f"mine{suffix}", rows))
    assert [question.gold for question in questions] == list(GOLDS)
    assert [question.id for question in questions] == [row["id"] for row in rows]
    drafted = make_rows(questions, len(questions), 0, 0)
    assert [row.answer.removeprefix("####").strip() for row in drafted] == list(GOLDS)


def write_file(path, rows):
    """The same rows as JSON lines, a JSON array, CSV or TSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
        elif path.suffix == ".json":
            json.dump(rows, file, indent=1)
        else:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


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


@needs_data
def test_math_golds_keep_their_meaning_as_rows_of_ones_own(tmp_path):
    questions = load_questions("math", "test", DATA)
    rows = [{"id": q.id, "question": q.question, "answer": q.gold} for q in questions]
    assert [q.gold for q in load_jsonl(write_file(tmp_path / "mine.jsonl", rows))] == [q.gold for q in questions]


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


def test_numbers_keep_their_style():
    assert write_number(parse_number("1,080") * 10, like="1,080") == "10,800"
    assert write_number(parse_number("5.5"), like="4.00") == "5.50"
    assert write_number(parse_number("0.25"), like=".5") == ".25"
    assert write_number(parse_number("-2/3")) == "-2/3"
    assert parse_number("12 34") is None
    assert parse_number("1/0") is None
    assert parse_number("--3") is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"\boxed{1} or \boxed{-1}", ("", "1, -1")),
        ("Write #### before a heading.", None),
        (r"Use \boxed{x} to frame the result", None),
        (r"It costs \$3, so \boxed{x} is a frame for things", None),
        ("#### heading\ntext", None),
        ("a\n#### 42", ("a", "42")),
        ("x = 3 #### 42", ("x = 3", "42")),
        ("5 #### 6 #### 7", ("5 #### 6", "7")),
        ("<<1+1=2>>so\n#### COVID-19", ("so", "COVID-19")),
        ("a\n####", ("a", "")),
        (r"$\boxed{\$5}$", ("", r"\$5")),
        (r"so $\boxed{12}$ dollars for the book.", (r"so $\boxed{12}$ dollars for the book.", "12")),
        (r"\[\boxed{(1,2)}\] which we also got above", (r"\[\boxed{(1,2)}\] which we also got above", "(1,2)")),
        ("The answer is 42.", ("The answer is 42.", "42")),
        ("COVID-19", None),
    ],
)
def test_only_a_mark_that_gives_the_answer_is_a_mark(answer, expected):
    assert marked_answer(answer) == expected


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
