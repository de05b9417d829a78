"""The one reader of JSON lines: what ends a line, which line it is, and files that are something else."""

import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.json_lines import read_json_lines, read_json_rows
from mlx_rsgwm.data.loading import load_data
from mlx_rsgwm.data.mlx_lm_rows import load_examples

ROWS = [{"text": f"row {number}"} for number in range(4)]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\u000b"])
def test_lines_are_those_of_an_editor(tmp_path, mark, end, separator):
    text = separator.join(("a", "b")) if separator != "\u000b" else "a\\u000bb"
    rows = [json.dumps({"text": text}, ensure_ascii=False), "", "  ", '{"text": 1}', "{oops", ""]
    path = tmp_path / "a.jsonl"
    path.write_bytes((mark + end.join(rows)).encode())
    found = read_json_lines(path)
    assert [row.number for row in found] == [1, 4, 5]
    assert found[1].value == {"text": 1}
    assert isinstance(found[2].value, ValueError)
    assert len(found[0].value["text"]) >= 3


def test_an_array_is_told_from_lines(tmp_path):
    path = tmp_path / "a.json"
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n" + json.dumps(ROWS)):
        path.write_text(text)
        assert read_json_rows(path) == ("row", [(number, row) for number, row in enumerate(ROWS, 1)])
        assert load_examples(path, False).rows == tuple(ROWS)
    path.write_text("[]")
    assert read_json_rows(path) == ("row", [])
    path.write_text("[1]\n[2]\n")
    assert read_json_rows(path) == ("line", [(1, [1]), (2, [2])])
    path.write_text(json.dumps({"data": ROWS}, indent=2))
    with pytest.raises(RsgwmError, match=r"is one JSON object over several lines .its rows may be under 'data'"):
        read_json_rows(path)
    path.write_text(json.dumps(ROWS, indent=2)[:-3])
    with pytest.raises(RsgwmError, match="begins as a JSON array but is not valid JSON"):
        read_json_rows(path)


def test_files_that_are_no_utf8_text(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for data, message in (
        (lines.encode("utf-16"), "not UTF-8 text but UTF-16; save it as UTF-8"),
        (lines.encode("utf-16-le"), "not UTF-8 text but UTF-16 or binary"),
        ((lines + '{"text": "für"}').encode("latin-1"), "in line 5; save it as UTF-8"),
    ):
        path.write_bytes(data)
        with pytest.raises(RsgwmError, match=message):
            read_json_lines(path)
    with pytest.raises(RsgwmError, match="is a folder, not a file"):
        read_json_lines(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("nowhere.jsonl", r"nowhere\.jsonl does not exist"),
        ("", r"holds neither a corpus .no manifest\.json; make one with: rsgwm data build. nor train.jsonl"),
    ],
)
def test_missing_training_data_is_said_to_be_missing(tmp_path, name, message):
    with pytest.raises(RsgwmError, match=message):
        load_data(tmp_path / name, None)


def test_rows_are_named_by_their_lines(tmp_path, base):
    path = tmp_path / "train.jsonl"
    path.write_text('\n\n{"messages": [{"role": "user", "content": "a"}]}\n\n\n{"messages": []}\n')
    with pytest.raises(RsgwmError, match=r"line 6: messages is not a list"):
        load_examples(path, False)
    path.write_text('\n\n{"prompt": "a", "completion": "b"}\n\n\n{"prompt": "c", "completion": "d"}\n')
    rows, _ = load_examples(path, True).token_rows(base.tokenizer, 100, "drop")
    assert [row.id for row in rows] == ["train.jsonl:3", "train.jsonl:6"]


def test_training_data_of_the_hub_is_no_folder():
    from pathlib import Path

    with pytest.raises(
        RsgwmError, match="owner/rows does not exist; where it is a data set of the Hub, write its rows"
    ):
        load_data(Path("owner/rows"), None)
