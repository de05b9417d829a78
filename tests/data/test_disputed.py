"""The same question with two gold answers: told by row numbers where it is trained, refused where it is asked."""

import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.data.batching import row_notes
from mlx_rsgwm.data.build import build_corpus
from mlx_rsgwm.data.disputed import same_answer
from mlx_rsgwm.data.mlx_lm_rows import load_examples
from mlx_rsgwm.data.select import select_questions

ROWS = [
    {"question": "How many legs has a spider?", "answer": "8"},
    {"question": "How many legs has an ant?", "answer": "6"},
    {"question": "how many legs  has a spider?", "answer": "6"},
    {"question": "How many legs has an ant?", "answer": "1 + 5 = 6\n#### 6.0"},
]


def write(path, rows):
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))  # rows begin in line 2
    return path


@pytest.mark.parametrize("purpose", ["test", "calibration"])
def test_what_is_asked_must_have_a_single_answer(tmp_path, purpose):
    mine = write(tmp_path / "mine.jsonl", ROWS)
    with pytest.raises(RsgwmError, match=r"the same question has two .*: lines 2 \('8'\) and 4 \('6'\); only one"):
        select_questions(str(mine), purpose, None, 0, split="all")
    sound = write(tmp_path / "sound.jsonl", ROWS[:2] + ROWS[3:])
    assert len(select_questions(str(sound), purpose, None, 0, split="all").questions) == 3


def test_rows_of_a_json_array_are_counted_as_such(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps([ROWS[0], ROWS[2], ROWS[1], {**ROWS[1], "answer": "five"}]))
    with pytest.raises(RsgwmError, match=r"2 questions have two .*: rows 1 \('8'\) and 2 \('6'\), rows 3 .* and 4 "):
        select_questions(str(tmp_path / "mine.json"), "test", None, 0)


def test_building_a_corpus_tells(tmp_path):
    told = []

    class Told(Progress):
        def message(self, text):
            told.append(text)

    mine = write(tmp_path / "mine.jsonl", ROWS)
    build_corpus(str(mine), tmp_path / "corpus", split="all", progress=Told())
    assert any(
        "mine.jsonl: the same question has two different gold answers: lines 2 ('8') and 4" in one for one in told
    )
    told.clear()
    build_corpus(str(write(tmp_path / "sound.jsonl", ROWS[:2])), tmp_path / "sound", split="all", progress=Told())
    assert not any("different gold" in one for one in told)


@pytest.mark.parametrize("form", ["completions", "chat"])
def test_training_rows_tell(base, tmp_path, form):
    def row(question, answer):
        if form == "completions":
            return {"prompt": question, "completion": answer}
        said = (("user", question), ("assistant", answer))
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    pairs = [("A?", "Yes"), ("B?", "1 + 1 = 2\n#### 2"), ("A?", "No"), ("B?", "Two, as one and one are.\n#### 2")]
    data = load_examples(write(tmp_path / "train.jsonl", [row(*pair) for pair in pairs]), True)
    rows, _ = data.token_rows(base.tokenizer, 512, "drop")
    assert [note for note in row_notes(rows) if "two different answers" in note] == [
        "the same prompt has two different answers, and all of them are trained (2 of 4 rows: train.jsonl lines 2, 4)"
    ]


def test_a_system_message_makes_another_question(base, tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": said}, *(
            {"role": role, "content": content} for role, content in (("user", "Hi"), ("assistant", said))
        )]} for said in ("Be brief.", "Be verbose.")
    ]  # fmt: skip
    tokens, _ = load_examples(write(tmp_path / "t.jsonl", rows), True).token_rows(base.tokenizer, 512, "drop")
    assert not row_notes(tokens)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("5", "5.0", True),
        ("1/2", "0.5", True),
        ("Paris", " paris.", True),
        ("$1,080", "1080", True),
        ("2 + 3 = 5\n#### 5", "It is 5.\n#### 5", True),
        ("2 + 3 = 5\n#### 5", "5", True),
        (r"so \boxed{5}", "3 + 3 = 6\n#### 6", False),
        ("2 + 3 = 5\n#### 5", "6", False),
        ("2 + 3 = 5\n#### 5", "As two and three make five, it has to be so.", True),  # nobody can tell
        ("Paris", "Lyon", False),
        ("A", "B", False),
        ("", "Lyon", False),
    ],
)
def test_same_answer(one, other, same):
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same
