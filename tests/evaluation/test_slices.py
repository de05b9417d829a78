"""Fixed slices: the same items whenever the same are asked for, with where they come from."""

import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.slices import Slice, read_slice


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"What is {n}?", "answer": n, "id": f"q{n}"}) + "\n" for n in range(30))
    )
    return path


def test_first_and_seeded(rows):
    first, about = read_slice(Slice(str(rows), 5))
    assert [question.id for question in first] == ["q0", "q1", "q2", "q3", "q4"]
    assert (about["slice"], about["seed"], about["items"]) == ("first", None, 5)
    drawn, told = read_slice(Slice(str(rows), 5, "seeded", 7))
    again, _ = read_slice(Slice(str(rows), 5, "seeded", 7))
    other, _ = read_slice(Slice(str(rows), 5, "seeded", 8))
    assert drawn == again != other
    assert told["sha256"] != about["sha256"]
    assert read_slice(Slice(str(rows), 10, "seeded", 7))[0][:5] == drawn


def test_families_and_folders(data_folder):
    found, about = read_slice(Slice("change", 3))
    assert len(found) == 3
    assert about["source"] == "embedded"
    found, about = read_slice(Slice("gsm8k", 4, folder=data_folder))
    assert found[0].gold == "18"
    assert (about["split"], about["revision"]) == ("test", None)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"task": "nonesuch"}, "unknown task 'nonesuch'"),
        ({"task": "change", "limit": 0}, "at least 1"),
        ({"task": "change", "how": "last"}, "slice must be one of first, seeded"),
        ({"task": "missing.jsonl"}, "does not exist"),
    ],
)
def test_bad_slices(wanted, message):
    with pytest.raises(RsgwmError, match=message):
        read_slice(Slice(**wanted))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": ""}', "line 2: no gold answer"),
        ('{"question": "q"}', "line 2: no gold answer"),
        ("{broken", "line 2: not valid JSON"),
        ('{"question": "q", "answer": 1, "id": "a"}', "line 2: id 'a' is already that of line 1"),
    ],
)
def test_bad_rows_name_their_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "p", "answer": 1, "id": "a"}\n' + line + "\n")
    with pytest.raises(RsgwmError, match=message):
        read_slice(Slice(str(path)))
