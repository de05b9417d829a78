"""A user's own file is split by content: no row is on two sides, whatever is done to the file."""

import csv
import io
import json
import random
import time
from collections import Counter

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.row_hashes import RowRecord, folded, record_of, row_hash, row_keys, share_of
from mlx_rsgwm.data.select import select_questions
from mlx_rsgwm.data.synthetic import generate

PURPOSES = ("train", "calibration", "test")


def rows_of(count):
    rng = random.Random(count)
    return [{"question": f"What is {rng.random()} and {n}?", "answer": str(n)} for n in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sides(*paths):
    """The folded questions of every purpose, over all files."""
    found, seen = {}, RowRecord()
    for purpose in PURPOSES:
        chosen = [select_questions(path, purpose, None, 0, seen=seen) for path in paths]
        texts = [question.question for selection in chosen for question in selection.questions]
        for selection in chosen if purpose != "test" else ():
            seen |= RowRecord.of(texts[:3], selection.file_questions)
        found[purpose] = {folded(text) for text in texts}
    return found


@pytest.mark.parametrize("count", [60, 5000])
def test_no_row_is_on_two_sides(tmp_path, count):
    rows = rows_of(count)
    whole = sides(write(tmp_path / "mine.jsonl", rows))
    assert sum(map(len, whole.values())) == count
    assert len(set().union(*whole.values())) == count
    for purpose, share in zip(PURPOSES, (0.6, 0.2, 0.2), strict=True):
        assert abs(len(whole[purpose]) - share * count) < 4 * (share * (1 - share) * count) ** 0.5
    shuffled = random.Random(1).sample(rows, count)
    assert sides(write(tmp_path / "shuffled.jsonl", shuffled)) == whole
    halves = [write(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[::2]), ("b", shuffled[::2]))]
    over_two = sides(write(tmp_path / "rest.jsonl", rows[1::2]), halves[0])
    assert over_two == whole
    respelt = [{**row, "question": f"  {row['question'].upper()}\u00a0\r\n".replace(" ", "  ")} for row in rows]
    assert sides(write(tmp_path / "doubled.jsonl", rows + respelt)) == whole


def in_every_form(folder, rows):
    """Files of the same rows: as programs and spreadsheets write them, in mlx-lm's forms, put together of two files."""
    mixed = random.Random(2).sample(rows, len(rows))
    pairs = [(row["question"], row["answer"]) for row in mixed]
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in pairs
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    texts = {
        "crlf.jsonl": "\ufeff" + "".join(line + "\r\n" for line in lines),
        "cr.jsonl": "\r".join(lines),
        "two-in-one.jsonl": "\ufeff" + "\n".join(lines[:20]) + "\n\n\ufeff" + "\n".join(lines[20:]),
        "array.json": json.dumps(mixed, indent=1),
        "array.jsonl": json.dumps(mixed, ensure_ascii=False),
        "prompts.jsonl": "\n".join(
            json.dumps({"prompt": question, "completion": answer}) for question, answer in pairs
        ),
        "chats.jsonl": "\n".join(json.dumps({"messages": messages}) for messages in turns),
    }
    for name, delimiter, mark, end in (
        ("comma.csv", ",", "", "\r\n"), ("excel.csv", ";", "\ufeff", "\r\n"),
        ("tab.csv", "\t", "", "\n"), ("tab.tsv", "\t", "\ufeff", "\r\n"),
    ):  # fmt: skip
        table = io.StringIO()
        writer = csv.DictWriter(table, ["Answer", "Question"], delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows({"Question": question, "Answer": answer} for question, answer in pairs)
        texts[name] = mark + table.getvalue()
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
        yield str(folder / name)


def test_no_row_is_on_two_sides_in_any_form(tmp_path):
    """Trained on in one form, calibrated and asked in another; with questions that hold what could end a row."""
    odd = ("", "\u2028next", '\nsecond line; "quoted", and more', " — naïve café ½", "\ttab", ", 'a'; b|c", " {x} [y]")
    rows = [{**row, "question": row["question"] + odd[n % 7]} for n, row in enumerate(rows_of(60))]
    plain = write(tmp_path / "mine.jsonl", rows)
    expected = sides(plain)
    assert len(set().union(*expected.values())) == 60
    trained = RowRecord.of(expected["train"], [row["question"] for row in rows])
    for path in in_every_form(tmp_path, rows):
        assert sides(path) == expected, path
        asked = select_questions(path, "test", None, 0, seen=trained)
        assert {folded(question.question) for question in asked.questions} == expected["test"]
        assert not any(trained.has(row_keys(question.question)) for question in asked.questions)


def test_the_split_is_fixed():
    """Adapters that exist were trained by it; these values must never change."""
    texts = ["What is 1 + 1?", "Wie spät ist es?", "何時ですか", "x" * 10_000, "Is 2 < 3?", "", "a", "b", "c", "d"]
    assert [row_hash(text).hex() for text in texts[:4]] == DIGESTS
    assert [share_of(text) for text in texts] == SHARES
    assert share_of(" what IS\n1 +\u00a01?") == share_of(texts[0])
    assert row_hash("What is 1 - 1?") != row_hash(texts[0])


DIGESTS = ["99f829c3d56f", "ce22a51a089e", "2c1ec51322cc", "e4ee97ec2527"]
SHARES = ["train", "calibration", "train", "train", "test", "train", "train", "calibration", "train", "test"]


def test_a_file_given_only_as_a_test_is_used_whole(tmp_path):
    path = write(tmp_path / "mine.jsonl", rows_of(60))
    assert len(select_questions(path, "test", None, 0).questions) == 60
    elsewhere = RowRecord.of(["another question"], ["another question"])
    assert len(select_questions(path, "test", None, 0, seen=elsewhere).questions) == 60
    trained = select_questions(path, "train", 10, 0)
    seen = RowRecord.of([question.question for question in trained.questions], trained.file_questions)
    chosen = select_questions(path, "test", None, 0, seen=seen)
    assert chosen.split == "test"
    assert {share_of(question.question) for question in chosen.questions} == {"test"}
    assert f"{len(chosen.questions)} of 60 rows, from its test share" in chosen.note(path)
    part = write(tmp_path / "part.jsonl", rows_of(60)[30:])
    assert select_questions(part, "test", None, 0, seen=seen).split == "test"
    grown = write(tmp_path / "grown.jsonl", [*rows_of(60), {"question": "new", "answer": "1"}])
    assert select_questions(grown, "test", None, 0, seen=seen).split == "all"  # and is then refused
    assert len(select_questions(grown, "train", None, 0, split="all").questions) == 61
    with pytest.raises(RsgwmError, match="the split of a file is train, calibration, test or all, found 'dev'"):
        select_questions(path, "test", None, 0, split="dev")
    single = write(tmp_path / "single.jsonl", rows_of(1))
    purpose = next(name for name in PURPOSES if name != share_of(rows_of(1)[0]["question"]))
    with pytest.raises(RsgwmError, match=f"none of its 1 rows falls into its {purpose} share"):
        select_questions(single, "train", None, 0, split=purpose)


def test_records_of_rows_travel():
    record = RowRecord.of(["a", "b", "A "], ["a", "b", "c"])
    described = json.loads(json.dumps(record.describe()))
    assert described["rows"] == 2
    assert RowRecord.from_description(described, "x") == record
    assert len(json.dumps(RowRecord.of(map(str, range(10_000))).describe())) < 81_000
    other = record_of({}, "imported")
    assert (record | other).unknown == ("imported",)
    assert RowRecord.from_description((record | other).describe(), "x") == record | other
    assert record_of({"data": {"row_hashes": described}}, "x") == record
    for damaged in ({}, {"used": "abc", "not_used": ""}, {"used": "AAAA", "not_used": ""}, {"used": 3}, [], "text"):
        with pytest.raises(RsgwmError, match="m: row_hashes is damaged"):
            RowRecord.from_description(damaged, "m")
    counts = Counter(row_hash(str(number)) for number in range(100_000))
    assert len(counts) == 100_000


@pytest.mark.parametrize(
    ("count", "told"), [(2**31, "are more than the 100000"), (60_000, "cannot give 60000 distinct")]
)
def test_more_generated_questions_than_there_are_end_soon(count, told):
    started = time.process_time()
    with pytest.raises(RsgwmError, match=told):
        generate("groups", count, 0, "test")
    assert time.process_time() - started < 20
