"""``rsgwm ask`` with one adapter or a base, and with a file of questions in any form, stopped and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.asked_files import AskedRow, read_asked

# A shell's background job, such as a test run, ignores Ctrl-C and hands that on.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from mlx_rsgwm.cli.main import main; main()"
)

QUESTIONS = ["What is 2 + 2?", "What is 3 + 4?", "And, what is 5 + 5?"]
SHORT = ("--max-tokens", "4", "--quiet")


def ask(*arguments, code=0, **options):
    made = CliRunner().invoke(rsgwm, ["ask", *map(str, arguments)], **options)
    assert made.exit_code == code, made.output
    return made


def result(made):
    return json.loads(made.stdout.splitlines()[-1])


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions"
    path.write_text("\n".join(QUESTIONS))
    return path


FORMS = {
    "lines": "\n".join(QUESTIONS) + "\n\n",
    "json lines": "".join(json.dumps({"question": text}) + "\n" for text in QUESTIONS),
    "prompts": "".join(json.dumps({"prompt": text, "completion": "x"}) + "\n" for text in QUESTIONS),
    "array": json.dumps([{"question": text} for text in QUESTIONS], indent=1),
    "array of texts": json.dumps(QUESTIONS),
    "chats": "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in QUESTIONS),
    "csv": "Question,answer\n" + "".join(f'"{text}",1\n' for text in QUESTIONS),
    "semicolons": "\ufeffid;QUESTION \n" + "".join(f"{n};{text}\n" for n, text in enumerate(QUESTIONS)),
    "tsv": "question\n" + "".join(f"{text}\n" for text in QUESTIONS[:2]) + f'"{QUESTIONS[2]}"\n',
    "windows": "\r\n".join(QUESTIONS),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".txt", ".jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_what_stands_in_it(tmp_path, form, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(FORMS[form].encode())
    assert [row.question for row in read_asked(path)] == QUESTIONS


def test_ids_and_places_are_those_of_the_file(tmp_path):
    path = tmp_path / "q"
    path.write_text('{"id": "a", "question": "x"}\n\n{"id": 7, "question": "y"}\n{"question": " z "}\n')
    assert read_asked(path) == [AskedRow(1, "x", "a"), AskedRow(3, "y", 7), AskedRow(4, "z")]
    path.write_text("[easy] What is 1 + 1?\n{x} What?\n")
    assert len(read_asked(path)) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.csv", "Frage,Antwort\nx,y\n", "header with a column question, found frage, antwort; rename 'frage'"),
        ("q.csv", "id,questions\n1,y\n", "rename 'questions' to question"),
        ("q.csv", "question,question\nx,y\n", "the header names question twice"),
        ("q", "question,answer\nx\n", "line 2: 1 cells where the header has 2"),
        ("q", '{"question": 3}\n', "line 1: no text under question, prompt or messages; it has question"),
        ("q", '{"question": "x"}\n{"text": "y"}\n{"text": "z"}\n', "line 2, line 3: no text under question"),
        ("q", '{"question": "x"}\n{"question": " "}\n', "line 2: its question is empty; fill it in"),
        ("q", '{"question": "x"\n', "line 1: not valid JSON"),
        ("q", '{"rows": [\n{"question": "x"}\n]}', "its rows may be under 'rows'"),
        ("q", '{"question": "x?", "context": "a river"}', "it has context beside its question"),
        ("q", '{"question": "x?", "id": [1]}', "id must be a text or a whole number"),
        ("q", "\n \n", "holds no question; write one a line"),
        ("q", b"caf\xe9\n", "not UTF-8 text: invalid continuation byte at byte 3, in line 1; save it as UTF-8"),
        ("q", "Hi\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_questions(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RsgwmError) as caught:
        read_asked(tmp_path / name)
    assert message in str(caught.value)


def test_one_adapter_a_base_and_a_fused_model_answer_alone(make_adapter, tiny_base, tmp_path):
    folder = make_adapter(1).save(tmp_path / "a")
    alone = ask(QUESTIONS[1], "--adapter", folder, *SHORT)
    named = result(ask(QUESTIONS[1], "--adapter", folder, *SHORT, "--json"))
    assert named["by"] == str(folder)
    assert alone.stdout.count(named["answer"]) == 1
    base = result(ask(QUESTIONS[1], "--base", tiny_base, *SHORT, "--json"))
    assert base["by"] == str(tiny_base)
    assert base["answer"] != named["answer"]
    fused = CliRunner().invoke(rsgwm, ["fuse", str(folder), "--out", str(tmp_path / "fused")])
    assert fused.exit_code == 0, fused.output
    merged = result(ask(QUESTIONS[1], "--base", tmp_path / "fused", "--template", "plain", *SHORT, "--json"))
    assert merged["answer"] == named["answer"]


def test_a_question_alone_and_in_a_file_get_one_answer(make_adapter, tmp_path, questions):
    folder = make_adapter(1).save(tmp_path / "a")
    alone = [result(ask(text, "--adapter", folder, *SHORT, "--json"))["answer"] for text in QUESTIONS]
    for size in (1, 8):
        rows = result(ask("--file", questions, "--adapter", folder, *SHORT, "--batch-rows", size, "--json"))["answers"]
        assert [row["answer"] for row in rows] == alone
    printed = ask("--file", questions, "--adapter", folder, *SHORT).stdout.splitlines()
    assert printed[::2] == QUESTIONS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["q", "--adapter", "a", "--drafter", "a", "--verifier", "b"], "--adapter answers alone"),
        (["q", "--adapter", "a", "--threshold", "0.5", "--abstain"], "--threshold, --abstain: only a drafter with a"),
        (["q", "--drafter", "a"], "--adapter a for one that answers alone"),
        (["q", "--drafter", "a", "--verifier", "b", "--system", "x"], "a pair is asked in the words"),
        (["q"], "nobody to ask: name an adapter (--adapter)"),
        (["q", "--out", "x", "--base", "y"], "--out keeps the answers to --file"),
    ],
)
def test_what_does_not_go_together(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    made = ask(*arguments, code=2)
    assert message in made.stderr
    assert len(made.stderr.splitlines()) == 1


def test_answers_are_kept_in_the_order_of_the_questions(make_adapter, tmp_path, questions):
    folder, out = make_adapter(1).save(tmp_path / "a"), tmp_path / "answers.jsonl"
    made = ask("--file", questions, "--adapter", folder, *SHORT, "--out", out, "--json")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["row"], row["question"]) for row in rows] == list(enumerate(QUESTIONS, 1))
    assert rows == result(made)["answers"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "answers.jsonl", "questions"]
    again = ask("--file", questions, "--adapter", folder, *SHORT, "--out", out, code=2)
    assert "is there already, and no unfinished run beside it" in again.stderr
    same = ask("--file", questions, "--adapter", folder, "--out", questions, code=2)
    assert f"{questions} holds the questions; give another --out" in same.stderr
    device = ask("--file", questions, "--adapter", folder, "--out", os.devnull, code=2)
    assert f"'{os.devnull}' is a device; name a file or folder" in device.stderr
    assert "standard input holds no question" in ask("--file", "-", "--adapter", folder, code=2, input="").stderr
    assert "is a folder; name a file" in ask("--file", questions, "--adapter", folder, "--out", tmp_path, code=2).stderr


def test_a_stopped_run_goes_on_at_any_row(make_adapter, tmp_path, questions, monkeypatch):
    from mlx_rsgwm.cli import ask as module

    folder, out = make_adapter(1).save(tmp_path / "a"), tmp_path / "answers.jsonl"
    command = ("--file", questions, "--adapter", folder, *SHORT, "--out", out)
    ask(*command)
    whole = out.read_bytes()
    out.unlink()
    original, asked = module._alone, []

    def stops(speaker, texts, batch_rows):
        for index, row in original(speaker, texts, batch_rows):
            asked.append(texts[index])
            yield index, row
            if len(asked) < len(QUESTIONS):
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "_alone", stops)
    for done in (1, 2):
        made = ask(*command, code=130)
        assert f"interrupted: {done} of 3 answers are in {out}; the same command goes on from there" in made.stderr
        assert len(out.read_text().splitlines()) == done
        if done == 1:
            other = ask(*command, "--temperature", "0.1", code=2)
            assert (
                "answers.jsonl.journal was made with other settings (temperature is 0.1 now, was 0.7)" in other.stderr
            )
    (tmp_path / "others").write_text("What else?")
    wrong = ask("--file", tmp_path / "others", *command[2:], code=2)
    assert "answers.jsonl.journal keeps 2 answers to other questions; give another --out" in wrong.stderr
    with open(f"{out}.journal", "ab") as file:
        file.write(b'{"place": 2, "ro')  # what a kill leaves
    ask(*command)
    assert sorted(asked) == sorted(QUESTIONS), "each was asked once"
    assert out.read_bytes() == whole


def test_a_changed_question_is_asked_anew_and_told(make_adapter, tmp_path, questions, monkeypatch):
    from mlx_rsgwm.cli import ask as module

    folder, out = make_adapter(1).save(tmp_path / "a"), tmp_path / "answers.jsonl"
    command = ("--file", questions, "--adapter", folder, "--max-tokens", 4, "--out", out)
    original = module._alone

    def stops(speaker, texts, batch_rows):
        for count, answered in enumerate(original(speaker, texts, 1), 1):
            yield answered
            if count == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_alone", stops)
        ask(*command, code=130)
    questions.write_text(f"What is new?\n{QUESTIONS[1]}\n")
    made = ask(*command)
    assert "warning: answers to 1 other question, kept from before, are left out" in made.stderr
    assert [json.loads(line)["question"] for line in out.read_text().splitlines()] == ["What is new?", QUESTIONS[1]]


def test_a_question_too_long_is_no_conversation(make_adapter, tmp_path):
    folder = make_adapter(1).save(tmp_path / "a")
    made = ask("word " * 9000, "--adapter", folder, *SHORT, code=2)
    assert "the question takes " in made.stderr
    assert "/clear" not in made.stderr


def test_a_kill_leaves_what_was_done(make_adapter, tmp_path):
    folder, out = make_adapter(1).save(tmp_path / "a"), tmp_path / "answers.jsonl"
    (tmp_path / "q").write_text("\n".join(f"What is {n} + {n}?" for n in range(400)))
    ours = [sys.executable, "-c", PROGRAM]
    command = [*ours, "ask", "--file", tmp_path / "q", "--adapter", folder, "--max-tokens", "40", "--batch-rows", "4",
               "--out", out]  # fmt: skip
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        journal = tmp_path / "answers.jsonl.journal"
        for _ in range(1200):
            if journal.exists() and journal.read_bytes().count(b"\n") > 5:
                break
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        told = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130
    done = len(out.read_text().splitlines())
    assert 4 < done < 400
    assert told[-1] == (
        f"rsgwm: error: interrupted: {done} of 400 answers are in {out}; the same command goes on from there"
    )
    assert any(" a minute, " in line and line.startswith("answer: ") for line in told) or done < 40
