"""Rows of every format are recognised by what they ask: labels, markers, other fields and spelling do not count."""

import itertools
import json

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.asked import bare, parts
from mlx_rsgwm.data.corpus import CorpusRow, save_corpus
from mlx_rsgwm.data.loading import load_data
from mlx_rsgwm.data.mlx_lm_rows import load_examples
from mlx_rsgwm.data.row_hashes import RowRecord, row_keys
from mlx_rsgwm.data.template import find_template

QUESTION = "A train leaves at 3:15, and it takes 40 minutes. When does it arrive?"
ANSWER = "It arrives at 3:55."


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def written(question, answer):
    """The same row in the ways that people write it, by name."""
    below = "Below is a task.\n\n### Instruction:\n"
    system = {"role": "system", "content": "Be short."}
    marked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return {
        "completions": {"prompt": question, "completion": answer},
        "with an id": {"id": 7, "source": "x", "prompt": question, "completion": answer},
        "spaced": {"prompt": f"  {question.upper()}\r\n", "completion": answer},
        "chat": chat(question, answer),
        "in parts": chat([{"type": "text", "text": question}], answer),
        "with a system prompt": {"messages": [system, *chat(question, answer)["messages"]]},
        "labelled": {"prompt": f"Question: {question}\nAnswer:", "completion": answer},
        "on one line": {"prompt": f"Q: {question} A:", "completion": answer},
        "german": {"prompt": f"Frage: {question}\nAntwort:", "completion": answer},
        "alpaca": {"prompt": f"{below}{question}\n\n### Response:\n", "completion": answer},
        "instructed": {"prompt": f"Solve this step by step.\n\n{question}", "completion": answer},
        "markdown": {"prompt": f"**Question:** {question}\n**Answer:**", "completion": answer},
        "tagged": {"prompt": f"<question>\n{question}\n</question>", "completion": answer},
        "separated": {"prompt": f"{question}\n\n###\n\n", "completion": answer},
        "numbered": {"prompt": f"12. {question}", "completion": answer},
        "quoted": {"prompt": f'Solve: "{question}"', "completion": answer},
        "in a context": {"prompt": f"Context: a river.\n\nQuestion: {question}\n\nAnswer: ", "completion": answer},
        "text": {"text": f"Question: {question}\nAnswer: {answer}"},
        "chatml text": {"text": f"{marked}{answer}<|im_end|>\n"},
        "llama text": {"text": f"<s>[INST] {question} [/INST] {answer}</s>"},
        "header": {"text": f"<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>{answer}"},
        "zephyr text": {"text": f"<|user|>\n{question}</s>\n<|assistant|>\n{answer}</s>"},
        "deepseek text": {"text": f"<｜begin▁of▁sentence｜><｜User｜>{question}<｜Assistant｜>{answer}"},
        "vicuna text": {"text": f"A chat with an assistant. USER: {question} ASSISTANT: {answer}</s>"},
        "guanaco text": {"text": f"### Human: {question}### Assistant: {answer}"},
        "gemma text": {"text": f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{answer}"},
    }  # fmt: skip


def examples_of(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(path, False)


@pytest.mark.parametrize(
    "question", [QUESTION, "What is 3 + 4?", "3たす4は？", "Name x.\nThen name y, at last.", "Sum 1, 2"]
)
def test_a_question_is_recognised_in_every_format(tmp_path, question):
    other = "Which is the longest river of all those that were named?"
    for name, row in written(question, ANSWER).items():
        record = examples_of(tmp_path, row).record()
        found = record.has(row_keys(question))
        # A short line below an instruction of several lines is taken for a heading.
        assert found == (name not in {"Name x.\nThen name y, at last.": ("german", "instructed"),
                                      "Sum 1, 2": ("instructed",)}.get(question, ())), name  # fmt: skip
        assert not record.has(row_keys(other)), name
        assert RowRecord.from_description(json.loads(json.dumps(record.describe())), "") == record


def test_two_formats_of_one_row_are_one_row(tmp_path):
    whole = {
        "completions",
        "with an id",
        "spaced",
        "chat",
        "in parts",
        "with a system prompt",
        "labelled",
        "on one line",
    }
    keys = {}
    for name, row in written(QUESTION, ANSWER).items():
        record = examples_of(tmp_path, row).record()
        keys[name] = record
    for (first, one), (second, other) in itertools.combinations(keys.items(), 2):
        if not whole & {first, second}:
            continue  # each may quote the other's question beside its own; a whole question decides
        assert one.used & (other.used | other.parts) or one.parts & other.used, (first, second)


def test_an_instruction_that_all_rows_share_is_no_question(tmp_path):
    shared = "Answer the following question in one short sentence.\n\n"
    rows = [{"prompt": f"{shared}What is {n} times {n}?", "completion": str(n * n)} for n in range(8)]
    trained = examples_of(tmp_path, *rows[:4]).record()
    assert not any(trained.has(row_keys(row["prompt"])) for row in rows[4:])
    assert all(trained.has(row_keys(row["prompt"])) for row in rows[:4])
    assert all(trained.has(row_keys(f"What is {n} times {n}?")) for n in range(4))


def test_bare_leaves_what_is_no_label():
    for text in ("Which of these is a\nsolution", "Input the number 3 now", "Is it true that 1 < 2 > 0?"):
        assert bare(text) == text
    assert list(parts("One line alone is its own whole.")) == []
    document = "\n".join(f"This is line number {n} of a long text." for n in range(100)) + "\nWho wrote all of this?"
    assert list(parts(document)) == ["Who wrote all of this?"]


def test_several_turns_are_known_whole_and_one_by_one(tmp_path):
    said = ["Hi", "Tell me about the river Elbe, please.", "And its source?"]
    turns = [{"role": role, "content": text} for text in said for role in ("user", "assistant")]
    record = examples_of(tmp_path, {"messages": turns}).record()
    assert all(record.has(row_keys(text)) for text in said)
    other = examples_of(tmp_path, {"messages": [*turns[:2], {"role": "user", "content": "Name a sea."}]}).record()
    assert not record.used & other.used


def held_out(tmp_path, rows, again):
    for name, part in (("train", rows), ("held", again)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return load_data(tmp_path / "train.jsonl", tmp_path / "held.jsonl")


@pytest.mark.parametrize("name", ["with an id", "spaced", "chat", "in parts", "with a system prompt", "labelled"])
def test_the_same_rows_are_no_held_out_rows(tmp_path, name):
    rows = [written(f"What is {n} + 1?", f"{n + 1}") for n in range(4)]
    with pytest.raises(RsgwmError, match="held-out rows and training rows are the same"):
        held_out(tmp_path, [row["completions"] for row in rows], [row[name] for row in rows[1:]][::-1])
    new = [*(row["completions"] for row in rows), {"prompt": "new", "completion": "new"}]
    assert held_out(tmp_path, [row["completions"] for row in rows], new)
    answered = [{"prompt": "What is 1 + 1?", "completion": "two"}]  # other answers are not refused, but told
    assert held_out(tmp_path, [row["completions"] for row in rows], answered)


def test_a_corpus_and_rows_of_its_questions(tmp_path):
    row = CorpusRow("a/draft", "a", "draft", QUESTION, ANSWER)
    judged = CorpusRow("a/verify", "a", "verify", QUESTION, ANSWER, False)
    save_corpus(tmp_path / "corpus", [row, judged], find_template("plain"), {})
    (tmp_path / "same.jsonl").write_text(json.dumps(chat(QUESTION, ANSWER, id=1)) + "\n")
    with pytest.raises(RsgwmError, match="held-out rows and training rows are the same"):
        load_data(tmp_path / "corpus", tmp_path / "same.jsonl")
    save_corpus(tmp_path / "other", [CorpusRow("b", "b", "verify", QUESTION, ANSWER, True)], find_template("plain"), {})
    assert load_data(tmp_path / "corpus", tmp_path / "other")


def test_tool_calls_are_a_part_of_an_answer(tmp_path):
    def call(name):
        asked = chat("Weather in Oslo?", "")
        return {"messages": [asked["messages"][0], {"role": "assistant", "tool_calls": [{"function": {"name": name}}]}]}

    assert held_out(tmp_path, [call("now")], [call("later")])
    with pytest.raises(RsgwmError, match="are the same"):
        held_out(tmp_path, [call("now")], [call("now")])
