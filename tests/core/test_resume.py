"""Keys, journals and stamps: what is taken for done was done, by the same means, to its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_rsgwm.core import resume
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.resume import Journal, content_key, differing, read_stamp, stamped


def test_a_key_changes_with_everything_it_is_made_of():
    settings = {"a": (1, 2), "b": Path("x")}
    keys = [
        content_key(settings),
        content_key({**settings, "a": [1, 3]}),
        content_key(settings, {"f": "0"}),
        content_key(settings, {"f": "1"}),
        content_key(settings, {"g": "1"}),
        content_key(settings, {"f": "0"}, version=1),
        content_key(settings, {"f": "0"}, version=2),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key({"b": Path("x"), "a": [1, 2]}) == keys[0]


def test_differing_knows_nothing_of_types():
    assert differing({"a": (1, 2), "b": {"c": None}}, {"a": [1, 2], "b": {"c": None}}) == []
    assert differing({"a": 1}, {"b": [3]}) == ["a is None now, was 1", "b is [3] now, was None"]


def rows_of(path, about, **more):
    rows = []
    return Journal(path, about, lambda row, where: rows.append(row["n"]), **more), rows


def test_a_journal_cut_off_at_any_byte_gives_a_beginning_and_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    journal, _ = rows_of(path, {"seed": 1})
    journal.append({"n": number} for number in range(3))
    data = path.read_bytes()
    assert set(json.loads(data.split(b"\n")[0])) == {"key", "about"}
    first = data.index(b"\n") + 1
    for size in range(first, len(data) + 1):
        path.write_bytes(data[:size])
        journal, rows = rows_of(path, {"seed": 1})
        assert rows == list(range(data[:size].count(b"\n") - 1))
        journal.append([{"n": 9}])
        assert rows_of(path, {"seed": 1})[1] == [*rows, 9]
    path.write_bytes(data + b"\0" * 100)  # as some file systems leave a file after a power cut
    assert rows_of(path, {"seed": 1})[1] == [0, 1, 2]
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", ["a.jsonl", "[a]*?.jsonl"])
def test_shards_are_read_whatever_the_name(tmp_path, name):
    rows_of(tmp_path / name, {"seed": 1})[0].append([{"n": 0}])
    rows_of(tmp_path / name, {"seed": 1}, shard=2)[0].append([{"n": 2}])
    assert sorted(rows_of(tmp_path / name, {"seed": 1}, shard=1)[1]) == [0, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_no_journal_of_this_is_refused_and_stays(tmp_path):
    path = tmp_path / "j.jsonl"
    damaged = json.dumps({"key": "0", "about": {"seed": 1}})
    for text in ("a text of mine", "[]\n", '{"format": "x"}\n', damaged + "\n"):
        path.write_text(text)
        with pytest.raises(RsgwmError, match="is not a journal of this version"):
            rows_of(path, {"seed": 1})
        assert path.read_text() == text
    path.write_text("")
    assert rows_of(path, {"seed": 1})[1] == []
    with pytest.raises(RsgwmError, match=r"made with other settings \(seed is 2 now, was 1\); choose another place"):
        rows_of(path, {"seed": 2})
    path.write_text('{"about": {"seed": 2}}\n{"n": 4}\n')  # as older versions wrote it
    assert rows_of(path, {"seed": 2})[1] == [4]
    path.write_text('{"about": {"seed": 2}}\n{"m": 4}\n')
    with pytest.raises(RsgwmError, match="line 2 is damaged"):
        rows_of(path, {"seed": 2})


def test_a_shard_of_something_else_goes_with_what_it_belonged_to(tmp_path):
    path = tmp_path / "j.jsonl"
    for shard in (0, 1):
        rows_of(path, {"seed": 1}, shard=shard)[0].append([{"n": shard}])
    assert rows_of(path, {"seed": 2}, replace=True)[1] == []
    assert rows_of(path, {"seed": 2})[1] == []  # nothing is left to be refused by
    assert [file.name for file in tmp_path.iterdir()] == ["j.jsonl"]


@pytest.mark.parametrize(
    "text", ["a text of mine\n", '{"format": "mlx-rsgwm/adapter"}\n', '{\n  "about": {}\n}\n', "[]"]
)
def test_only_a_journal_is_replaced_by_a_journal(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(RsgwmError, match="is not a journal of this version"):
        rows_of(path, {"seed": 1}, replace=True)
    assert path.read_text() == text
    path.write_text('{"key": "0", "about": {"seed": 1}}\n')  # one that was damaged
    assert rows_of(path, {"seed": 1}, replace=True)[1] == []


def test_a_row_longer_than_any_is_refused_and_what_follows_stays(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    rows_of(path, {"seed": 1})[0].append([{"n": 0}, {"n": 1, "text": "x" * 500}, {"n": 2}])
    before = path.read_bytes()
    monkeypatch.setattr(resume, "LARGEST_ROW", 300)
    with pytest.raises(RsgwmError, match="line 3 is longer than any row"):
        rows_of(path, {"seed": 1})
    assert path.read_bytes() == before


def test_a_stamp_goes_before_the_work_and_comes_back_last(tmp_path):
    path = tmp_path / "made" / "stamp.json"

    def fail():
        assert not path.exists()
        raise KeyboardInterrupt

    assert stamped(path, "a", lambda: {"x": (1,)}) == {"key": "a", "x": [1]}
    assert stamped(path, "a", fail) == {"key": "a", "x": [1]}
    with pytest.raises(KeyboardInterrupt):
        stamped(path, "b", fail)
    assert read_stamp(path) is None
    for damaged in ("", "{", "[]", "\0"):
        path.write_text(damaged)
        assert stamped(path, "a", dict) == {"key": "a"}
