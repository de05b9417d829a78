"""What in a row is the gold answer: marks, numbers, and golds that keep their meaning."""

import pytest

from mlx_rsgwm.data.gold_answers import marked_answer
from mlx_rsgwm.data.numbers import parse_number, write_number
from mlx_rsgwm.data.questions import load_jsonl, load_questions
from tests.data.row_files import DATA, needs_data, write_file

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


@needs_data
def test_math_golds_keep_their_meaning_as_rows_of_ones_own(tmp_path):
    questions = load_questions("math", "test", DATA)
    rows = [{"id": q.id, "question": q.question, "answer": q.gold} for q in questions]
    assert [q.gold for q in load_jsonl(write_file(tmp_path / "mine.jsonl", rows))] == [q.gold for q in questions]


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
