"""mlx-lm's data formats: the same tokens as mlx-lm's own data sets, and errors that name lines."""

import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.loading import load_data
from mlx_rsgwm.data.mlx_lm_rows import load_examples
from mlx_rsgwm.data.questions import load_jsonl

ROWS = {
    "chat": [
        {"messages": [{"role": "user", "content": f"{n} and 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(5)
    ],
    "completions": [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(5)],
    "text": [{"text": f"{n} times two is {2 * n}."} for n in range(5)],
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", list(ROWS))
def test_tokens_are_those_of_mlx_lm(base, tmp_path, kind, mask):
    from types import SimpleNamespace

    from mlx_lm.tuner.datasets import create_dataset

    if kind == "text" and mask:
        pytest.skip("text has no prompt")
    examples = load_examples(write(tmp_path / "train.jsonl", ROWS[kind]), mask)
    assert examples.format == kind
    rows, dropped = examples.token_rows(base.tokenizer, 512, "drop")
    theirs = create_dataset(ROWS[kind], base.tokenizer, SimpleNamespace(mask_prompt=mask))
    assert dropped == 0
    for index, row in enumerate(rows):
        tokens, offset = theirs.process(theirs[index])
        assert list(row.tokens) == tokens
        assert row.prompt_length == max(1, offset)
        assert row.id == f"train.jsonl:{index + 1}"
        assert row.role == "draft"


def test_long_rows_are_dropped_or_cut_and_counted(base, tmp_path):
    rows = [{"text": "short"}, {"text": "a text that is quite a bit longer than the other one"}]
    examples = load_examples(write(tmp_path / "a.jsonl", rows), False)
    kept, dropped = examples.token_rows(base.tokenizer, 20, "drop")
    assert (len(kept), dropped) == (1, 1)
    kept, dropped = examples.token_rows(base.tokenizer, 20, "cut")
    assert (len(kept), dropped) == (2, 0)
    assert len(kept[1].tokens) == 20
    assert [row.cut for row in kept] == [False, True]
    with pytest.raises(RsgwmError, match=r"every row of .*a\.jsonl is longer than 3 tokens"):
        examples.token_rows(base.tokenizer, 3, "drop")
    masked = load_examples(write(tmp_path / "b.jsonl", ROWS["completions"]), True)
    prompt = masked.token_rows(base.tokenizer, 512, "drop")[0][0].prompt_length
    with pytest.raises(RsgwmError, match="longer than"):  # no part of the completion would be left
        masked.token_rows(base.tokenizer, prompt, "cut")


def test_a_folder_brings_its_held_out_rows(tmp_path):
    write(tmp_path / "d" / "train.jsonl", ROWS["chat"])
    assert load_data(tmp_path / "d", None)[1] is None
    write(tmp_path / "d" / "valid.jsonl", ROWS["chat"][:2])
    data, held = load_data(tmp_path / "d", None, True)
    assert (len(data.rows), len(held.rows)) == (5, 2)
    assert data.hash != load_data(tmp_path / "d", None, False)[0].hash
    single, none = load_data(tmp_path / "d" / "train.jsonl", None)
    assert len(single.rows) == 5
    assert none is None
    with pytest.raises(RsgwmError, match="are the same"):
        load_data(tmp_path / "d", tmp_path / "d")


@pytest.mark.parametrize(
    ("lines", "mask", "message"),
    [
        ("", False, "holds no rows"),
        ('{"text": "a"}\n{"text"', False, "line 2: not valid JSON"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', False, "line 2: no row of text"),
        ('{"question": "a"}', False, "line 1: no row of a known format; the formats are completions: prompt"),
        ('{"text": 3}', False, "line 1: text is not text"),
        ('{"messages": []}', False, "line 1: messages is not a list of messages"),
        ('{"messages": [{"content": "a"}]}', False, "line 1: a message has no role"),
        ('{"text": "a"}', True, "plain text, which has no prompt"),
        ("[1]", False, "line 1: no row"),
        ('{"text": 1}\n' * 9, False, "line 1, line 2, line 3 and 6 more: text is not text$"),
    ],
)
def test_bad_files(tmp_path, lines, mask, message):
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(RsgwmError, match=message):
        load_examples(path, mask)


def test_questions_are_no_training_rows(tmp_path):
    """A file of the other kind is named as that, and not line by line."""
    rows = [{"question": f"What is {n}?", "answer": n, "id": n} for n in range(30)]
    mine, table = write(tmp_path / "mine.jsonl", rows), tmp_path / "mine.CSV"
    table.write_text("question,answer\nWhat?,1\n")
    with pytest.raises(
        RsgwmError, match=r"mine\.jsonl: questions and answers, and no training rows; .* rsgwm data build --task"
    ) as told:
        load_examples(mine, False)
    assert "line" not in str(told.value).removeprefix(str(tmp_path))
    with pytest.raises(RsgwmError, match=r"mine\.CSV is a table, .* rsgwm data build --task"):
        load_examples(table, False)
    with pytest.raises(RsgwmError, match="line 1, line 2, line 3 and 2 more: no question, it has text; rows need"):
        load_jsonl(write(tmp_path / "rows.jsonl", ROWS["text"]))


def test_a_row_without_an_answer_is_trained_whole_or_refused(base, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    rows, _ = load_examples(path, False).token_rows(base.tokenizer, 100, "drop")
    assert rows[0].prompt_length == 1
    with pytest.raises(RsgwmError, match=r"a\.jsonl:1: its last message is the user's"):
        load_examples(path, True).token_rows(base.tokenizer, 100, "drop")


def test_no_chat_template_is_an_error(tmp_path):
    class Bare:
        chat_template = None

    with pytest.raises(RsgwmError, match="need a chat template"):
        load_examples(write(tmp_path / "a.jsonl", ROWS["chat"]), True).token_rows(Bare(), 100, "drop")
