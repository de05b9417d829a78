"""The commands on the tiny base: each works, and bad input is one line, exit 2, and nothing written."""

import json

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])


@pytest.fixture
def line(tiny_base, tmp_path):
    """A trained pool, a drafter and a verifier, made by the commands themselves."""
    for task in ("change", "compare"):
        corpus = tmp_path / "corpus" / task
        made = invoke(
            "data", "build", "--task", task, "--draft-rows", 8, "--verify-rows", 8, "--out", corpus, "--quiet"
        )
        assert made.exit_code == 0, made.stderr
        trained = invoke(
            "train", "--base", tiny_base, "--corpus", corpus, "--out", tmp_path / "pool" / task, "--epochs", 1,
            "--rank", 4, "--alpha", 8, "--batch-size", 4, "--learning-rate", 0.01, "--json",
        )  # fmt: skip
        assert trained.exit_code == 0, trained.stderr
        assert json.loads(trained.stdout.splitlines()[-1])["steps"] == 4
    for role, name in (("draft", "drafter"), ("verify", "verifier")):
        merged = invoke(
            "merge", tmp_path / "pool/change", tmp_path / "pool/compare", "--role", role, "--out", tmp_path / name
        )
        assert merged.exit_code == 0, merged.stderr
        assert "cosine to the mean product" in merged.stdout
    return tmp_path


def test_eval_has_the_eight_rows(line, tiny_base):
    found = invoke(
        "eval", "--base", tiny_base, "--drafter", line / "drafter", "--verifier", line / "verifier",
        "--task", "change", "--items", 4, "--timed", 2, "--max-tokens", 5, "--attempts", 2,
        "--out", line / "report", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    for name in ("accuracy", "wrong_rate", "accept_rate", "accepted_and_correct"):
        assert set(result[name]) == {"value", "low", "high", "n"}
    assert "false_accept_rate" in result
    assert 1 <= result["average_attempts"] <= 2
    assert result["average_latency_ms"] > 0
    assert result["items_per_minute"] > 0
    assert (line / "report" / "report.json").is_file()


def test_loss_of_base_and_adapter(line, tiny_base):
    from mlx_rsgwm.data.corpus import load_corpus
    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.training.losses import held_out_loss

    corpus, adapter = line / "corpus" / "change", line / "pool" / "change"
    found = invoke("adapter", "loss", "--corpus", corpus, "--adapter", adapter, "--base", tiny_base, "--json")
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    base = load_base(str(tiny_base))
    rows, _ = load_corpus(corpus).token_rows(base.tokenizer, 1024, "drop")
    assert result["rows"] == len(rows) == 16
    assert result["trained_on"] == {str(adapter): 1.0}
    assert f"NOT NEW: {adapter} was trained on what 16 of the 16 rows ask" in found.stderr
    expected = held_out_loss(base.model, rows, 8)
    for role in ("draft", "verify"):
        assert result["loss"]["base"][role] == pytest.approx(expected[role], rel=1e-5)
        assert result["loss"][str(adapter)][role] < expected[role]


def loop_of(line, tiny_base, *more):
    return (
        "--base", tiny_base, "--drafter", line / "drafter", "--verifier", line / "verifier", "--max-tokens", 4,
        "--attempts", 2, *more,
    )  # fmt: skip


def test_ask_many_questions_from_a_file(line, tiny_base):
    (line / "q.txt").write_text("What is 2 + 2?\n\nWhat is 3 + 4?\n")
    (line / "q.jsonl").write_text('{"question": "What is 2 + 2?"}\n{"prompt": "What is 3 + 4?", "completion": "7"}\n')
    found = {}
    for name in ("q.txt", "q.jsonl"):
        for size in (1, 8):
            ran = invoke("ask", "--file", line / name, "--batch-rows", size, *loop_of(line, tiny_base, "--json"))
            assert ran.exit_code == 0, ran.stderr
            found[name, size] = json.loads(ran.stdout.splitlines()[-1])["answers"]
    assert [row["question"] for row in found["q.txt", 8]] == ["What is 2 + 2?", "What is 3 + 4?"]
    for rows in found.values():
        assert [(row["answer"], row["attempts"]) for row in rows] == [
            (row["answer"], row["attempts"]) for row in found["q.txt", 1]
        ]


def test_the_base_is_the_one_that_the_adapters_record(line, tiny_base):
    pair = ("--drafter", line / "drafter", "--verifier", line / "verifier", "--max-tokens", 4, "--attempts", 1)
    ran = invoke("ask", "What is 2 + 2?", *pair, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert f"loading {tiny_base}" in ran.stderr
    assert "warning" not in ran.stderr
    assert (
        invoke(
            "adapter",
            "loss",
            "--corpus",
            line / "corpus" / "change",
            "--adapter",
            line / "pool" / "change",
            "--rows",
            2,
        ).exit_code
        == 0
    )


def test_a_pair_of_two_pools_is_told_even_when_quiet(line):
    merged = invoke("merge", line / "pool/change", line / "pool/change", "--role", "verify", "--out", line / "v2")
    assert merged.exit_code == 0, merged.stderr
    pair = ("--drafter", line / "drafter", "--verifier", line / "v2", "--max-tokens", 2, "--attempts", 1)
    ran = invoke("ask", "What is 2 + 2?", *pair, "--quiet")
    assert ran.exit_code == 0, ran.stderr
    assert ran.stderr.splitlines()[0].startswith("warning: drafter and verifier come from different pools")


def test_ask_from_standard_input_and_abstaining(line, tiny_base):
    arguments = [str(x) for x in loop_of(line, tiny_base, "--threshold", 1, "--abstain", "--json")]
    ran = CliRunner().invoke(rsgwm, ["ask", "-", *arguments], input="What is 2 + 2?\n")
    assert ran.exit_code == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["answer"] is None
    assert not result["accepted"]
    assert result["attempts"] == 2


def test_chat_answers_until_the_input_ends(line, tiny_base):
    arguments = [str(x) for x in loop_of(line, tiny_base, "--threshold", 0)]
    ran = CliRunner().invoke(rsgwm, ["chat", *arguments], input="What is 2 + 2?\n\nAnd 3 + 3?\n")
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.count("draft 1:") == 2
    assert "2 questions, 2 answers accepted" in ran.stdout


def test_a_verifier_asked_in_other_words(line, tiny_base):
    refused = invoke("ask", "What is 2 + 2?", *loop_of(line, tiny_base, "--verify-template", "chat"))
    assert refused.exit_code == 2
    assert "the verifier was trained with another prompt template" in refused.stderr


def test_merge_by_name_with_overrides_and_dry_run(line):
    pool = [line / "pool" / "change", line / "pool" / "compare"]
    looked = invoke("merge", *pool, "--method", "karcher", "--dry-run")
    assert looked.exit_code == 0, looked.stderr
    assert "nothing written" in looked.stdout
    made = invoke(
        "merge", *pool, "--method", "dare_ties", "--set", "density=0.7", "--at", "q_proj", "density=1,weights=1/0",
        "--rank", 6, "--out", line / "dare", "--json",
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    merge = json.loads(made.stdout.splitlines()[-1])["merge"]
    assert merge["parameters"]["density"] == 0.7
    assert merge["rank"] == 6
    q_proj = {name: row["cosines"] for name, row in merge["diagnosis"]["modules"].items() if "q_proj" in name}
    assert q_proj
    assert all(cosines[0] == pytest.approx(1, abs=1e-4) for cosines in q_proj.values())
    listed = invoke("merge", "--list", "--all")
    assert "ties: trim the small" in listed.stdout
    assert "density=0.2" in listed.stdout


def test_ask_shows_the_steps(line, tiny_base):
    found = invoke(
        "ask", "What is 2 + 2?", "--base", tiny_base, "--drafter", line / "drafter", "--verifier", line / "verifier",
        "--max-tokens", 4, "--attempts", 2, "--threshold", 1, "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["accepted"] is False
    assert len(result["steps"]) == result["attempts"] == 2


def test_held_out_rows_come_from_another_split(tmp_path, data_folder):
    corpora = {}
    for split in ("train", "test"):
        out = tmp_path / split
        made = invoke(
            "data", "build", "--task", "gsm8k", "--questions", data_folder, "--split", split, "--offset", 2,
            "--draft-rows", 3, "--verify-rows", 0, "--out", out, "--json",
        )  # fmt: skip
        assert made.exit_code == 0, made.stderr
        corpora[split] = [json.loads(row)["question"] for row in (out / "rows.jsonl").read_text().splitlines()]
    source = [json.loads(row)["question"] for row in (data_folder / "gsm8k/test.jsonl").read_text().splitlines()]
    assert corpora["test"] == source[2:5]
    assert not set(corpora["train"]) & set(corpora["test"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "{tmp}/nowhere", "{tmp}/elsewhere", "--out", "{tmp}/m"], "nowhere does not exist"),
        (["merge", "{pool}/change", "--out", "{tmp}/m"], "at least two adapters"),
        (["merge", "{pool}/change", "{pool}/compare", "--method", "rsgwm", "--set", "tau=2", "--out", "{tmp}/m"],
         "tau must be in (0, 1)"),
        (["merge", "{pool}/change", "{pool}/compare", "--out", "{tmp}/drafter"], "already holds"),
        (["merge"], "no adapters given"),
        (["ask"], "give either a question or --file"),
        (["ask", "x", "--file", "{tmp}/q"], "give either a question or --file"),
        (["ask", "--file", "{tmp}/nothing.txt"], "nothing.txt does not exist"),
        (["ask", "x", "--base", "{base}", "--mode", "psychic", "--drafter", "{tmp}/drafter", "--verifier",
          "{tmp}/verifier"], "there are adaptive, parallel, sequential"),
        (["merge", "{pool}/change", "{pool}/compare"], "no --out folder given"),
        (["merge", "{pool}/change", "{pool}/compare", "--set", "density", "--out", "{tmp}/m"], "NAME=VALUE"),
        (
            ["merge", "{pool}/change", "{pool}/compare", "--method", "ties", "--set", "density=2", "--out", "{tmp}/m"],
            "density must be in (0, 1], found 2",
        ),
        (
            ["merge", "{pool}/change", "{pool}/compare", "--method", "ties", "--set", "tau=0.5", "--out", "{tmp}/m"],
            "ties has no parameter 'tau'",
        ),
        (
            ["merge", "{pool}/change", "{pool}/compare", "--at", "q_proj", "weights=1/x", "--out", "{tmp}/m"],
            "weights are numbers with / between them",
        ),
        (
            ["merge", "{pool}/change", "{pool}/compare", "--method", "regmean", "--weight", "1", "--weight", "-1",
             "--out", "{tmp}/m"],
            "weights must not be negative",
        ),
        (["merge", "{pool}/change", "{pool}/compare", "--weight", "1", "--out", "{tmp}/m"], "1 weights for 2"),
        (["train", "--corpus", "{tmp}/nowhere", "--out", "{tmp}/a"], "nowhere does not exist"),
        (["data", "build", "--task", "nonesuch", "--out", "{tmp}/c"], "unknown task 'nonesuch'"),
        (["data", "build", "--task", "{tmp}/empty.jsonl", "--out", "{tmp}/c"], "empty"),
        (["data", "build", "--task", "change", "--draft-rows", "-1", "--out", "{tmp}/c"], "not in the range x>=0"),
        (["data", "build", "--task", "change", "--offset", "-1", "--out", "{tmp}/c"], "not in the range x>=0"),
        (["run", "demo", "--out", "{tmp}/r", "--set", "trian.x=1"], "did you mean 'train'"),
        (["ask", " ", "--drafter", "{tmp}/drafter", "--verifier", "{tmp}/verifier"], "the question is empty"),
        (["ask", "q", "--drafter", "{tmp}/pickled", "--verifier", "{tmp}/verifier"], "is a pickle file"),
        (["ask", "q", "--base", "{tmp}/nobase", "--drafter", "{tmp}/drafter", "--verifier", "{tmp}/verifier"],
         "nobase"),
        (["ask", "q", "--base", "{other}", "--drafter", "{tmp}/drafter", "--verifier", "{tmp}/verifier"],
         "was made for"),
        (["ask", "q", "--base", "{base}", "--drafter", "{tmp}/cut", "--verifier", "{tmp}/verifier"], "SHA-256"),
        (["ask", "q", "--base", "{base}", "--drafter", "{tmp}/drafter", "--verifier", "{tmp}/verifier",
          "--attempts", "0"], "not in the range 1<=x<=10000"),
        (["ask", "q", "--base", "{base}", "--drafter", "{tmp}/drafter", "--verifier", "{tmp}/verifier",
          "--threshold", "high"], "neither auto nor a number"),
        (["ask", "q", "--drafter", "{tmp}/verifier", "--verifier", "{tmp}/drafter"], "are swapped"),
        (["chat", "--drafter", "{tmp}/drafter", "--verifier", "{pool}/none"], "none does not exist"),
        (["ask", "q", "--drafter", "{tmp}/drafter"], "without --verifier; give both (there is"),
        (["eval", "--task", "change", "--verifier", "{tmp}/verifier"], "without --drafter; give both (there is"),
        (["calibrate", "--task", "change", "--drafter", "{pool}/change"], "without --verifier; give both"),
        (["eval", "--task", "change", "--drafter", "{tmp}/drafter", "--verifier", "{tmp}/drafter"],
         "was merged to draft, not to verify"),
        (["adapter", "loss", "--corpus", "{tmp}/corpus/change", "--adapter", "{pool}/change", "--base", "{other}"],
         "was made for"),
        (["eval", "--task", "gsm8k", "--questions", "{tmp}/none", "--drafter", "{tmp}/drafter", "--verifier",
          "{tmp}/verifier"], "none does not exist"),
    ],
)  # fmt: skip
def test_bad_input(line, tiny_base, other_base, arguments, message):
    (line / "empty.jsonl").write_text("")
    (line / "pickled").mkdir()
    (line / "pickled" / "adapters.bin").write_bytes(b"\x80")
    cut = line / "cut"
    cut.mkdir()
    for file in (line / "drafter").iterdir():
        data = file.read_bytes()
        (cut / file.name).write_bytes(data[:-20] if file.suffix == ".safetensors" else data)
    before = sorted(line.rglob("*"))
    names = {"tmp": line, "pool": line / "pool", "base": tiny_base, "other": other_base}
    found = invoke(*(argument.format(**names) for argument in arguments), "--json")
    assert found.exit_code == 2, found.output
    errors = [row for row in found.stderr.splitlines() if row.startswith("rsgwm: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["exit_code"] == 2
    assert sorted(line.rglob("*")) == before


@pytest.fixture(scope="session")
def other_base(tiny_base, tmp_path_factory):
    """Another base of the same shape."""
    import shutil

    import mlx.core as mx

    folder = tmp_path_factory.mktemp("other") / "base"
    shutil.copytree(tiny_base, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def test_full_disk_is_one_line_and_writes_nothing(line, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    found = invoke("merge", line / "pool/change", line / "pool/compare", "--out", line / "full")
    assert found.exit_code == 2
    assert "not enough disk space" in found.stderr
    assert not (line / "full").exists()
