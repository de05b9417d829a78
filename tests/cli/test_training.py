"""The training commands on the tiny base: YAML, mlx-lm's data, resume after a signal, pools, importance, processes."""

import json
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core import files
from mlx_rsgwm.data.row_hashes import record_of, row_keys
from mlx_rsgwm.models.adapter import Adapter

RSGWM = (sys.executable, "-c", "from mlx_rsgwm.cli.main import main; main()")
SMALL = ("--rank", 4, "--alpha", 8, "--batch-size", 4, "--learning-rate", 0.01, "--epochs", 1)


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(argument) for argument in arguments])


def result(found):
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture
def corpora(tmp_path):
    for task in ("change", "groups"):
        out = tmp_path / "corpus" / task
        result(invoke("data", "build", "--task", task, "--draft-rows", 8, "--verify-rows", 8, "--out", out, "--json"))
    return tmp_path / "corpus"


def write_rows(folder, count=8):
    folder.mkdir()
    rows = [{"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."} for n in range(count)]
    for name, part in (("train", rows), ("valid", rows[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def test_an_mlx_lm_yaml_trains(tiny_base, tmp_path):
    data = write_rows(tmp_path / "rows")
    (tmp_path / "c.yaml").write_text(
        f"model: {tiny_base}\ntrain: true\ndata: {data}\nadapter_path: {tmp_path / 'a'}\niters: 6\nbatch_size: 2\n"
        "num_layers: 1\nlearning_rate: 1e-2\nsteps_per_eval: 3\nmask_prompt: true\nfine_tune_type: dora\n"
        "lora_parameters: {rank: 4, scale: 2.0, dropout: 0.0, keys: [mlp.up_proj]}\n"
    )
    found = invoke("train", "--config", tmp_path / "c.yaml", "--json")
    summary = result(found)
    assert summary["steps"] == 6
    assert "iters → steps = 6" in found.stderr
    assert "memory estimate" in found.stderr
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.spec.fine_tune_type == "dora"
    assert adapter.manifest["data"]["format"] == "completions"
    assert [line[0] for line in adapter.manifest["validation"]] == [3, 6]
    again = invoke("train", "--config", tmp_path / "c.yaml", "--rank", 2, "--out", tmp_path / "b", "--json")
    assert result(again)["steps"] == 6
    assert Adapter.load(tmp_path / "b").spec.rank == 2  # an option wins over the file


def test_a_signal_saves_and_resume_goes_on(tiny_base, corpora, tmp_path):
    command = ["train", "--base", tiny_base, "--corpus", corpora / "change", *SMALL, "--save-every", 0]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert invoke(*command, "--epochs", 15, "--out", whole, "--quiet").exit_code == 0
    arguments = [str(argument) for argument in (*command, "--epochs", 15, "--out", cut)]
    child = subprocess.Popen([*RSGWM, *arguments], stderr=subprocess.PIPE, text=True)
    for line in child.stderr:
        if "train: 6/" in line:
            break
    child.send_signal(signal.SIGTERM)
    rest = child.stderr.read()
    assert child.wait() == 130, rest
    assert "interrupted; what was finished before is kept" in rest
    assert not (cut / "manifest.json").exists()
    refused = invoke(*command, "--epochs", 15, "--out", cut)
    assert refused.exit_code == 2
    assert "continue it with --resume" in refused.stderr
    changed = invoke(*command, "--epochs", 16, "--out", cut, "--resume")
    assert changed.exit_code == 2
    assert "config.epochs is 16 now, was 15" in changed.stderr
    assert invoke(*command, "--epochs", 15, "--out", cut, "--resume").exit_code == 0
    for name in ("adapters.safetensors", "importance.safetensors"):
        assert files.sha256_file(whole / name) == files.sha256_file(cut / name)


def test_a_pool_shares_a_and_goes_on(tiny_base, corpora, tmp_path):
    pool = ("--base", tiny_base, *SMALL, "--out", tmp_path / "pool")
    first = result(invoke("pool", "train", "--corpus", corpora / "change", *pool, "--json"))
    assert first["trained"] == ["change"]
    found = invoke(
        "pool",
        "train",
        "--corpus",
        corpora / "change",
        "--task",
        "groups",
        "--draft-rows",
        6,
        "--verify-rows",
        4,
        *pool,
        "--json",
    )
    second = result(found)
    assert second["trained"] == ["groups"]
    assert [row["name"] for row in second["adapters"]] == ["change", "groups"]
    assert "adapter  rows  steps" in found.stderr
    pair = [Adapter.load(tmp_path / "pool" / name) for name in ("change", "groups")]
    for name, value in pair[0].init.items():
        assert (value == pair[1].init[name]).all().item()
    refused = invoke("pool", "train", "--corpus", corpora / "change", *pool, "--rank", 2)
    assert refused.exit_code == 2
    assert "an adapter of another pool (config.rank is 2 now, was 4" in refused.stderr


def test_importance_for_an_adapter_of_others(tiny_base, corpora, tmp_path):
    result(
        invoke("train", "--base", tiny_base, "--corpus", corpora / "change", *SMALL, "--out", tmp_path / "a", "--json")
    )
    for name in ("importance.safetensors", "manifest.json", "init.safetensors"):
        (tmp_path / "a" / name).unlink()
    collect = ("adapter", "importance", tmp_path / "a", "--corpus", corpora / "change", "--base", tiny_base)
    found = result(invoke(*collect, "--batch-size", 4, "--json"))
    assert found["batches"] == {"all": 4, "draft": 2, "verify": 2}
    assert Adapter.load(tmp_path / "a").manifest["importance"]["collected"] is True
    again = invoke(*collect)
    assert again.exit_code == 2
    assert "already has importance (collected after training" in again.stderr


def test_passes_over_data_tell_the_rows_that_they_leave_out(tiny_base, corpora, tmp_path):
    result(
        invoke("train", "--base", tiny_base, "--corpus", corpora / "change", *SMALL, "--out", tmp_path / "a", "--json")
    )
    rows = [{"prompt": "One?", "completion": text} for text in ("Two.", "Longer than any row may be here. " * 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = {("adapter", "importance", "--replace"): (), ("directions", "collect", "--replace"): ("--directions", 8)}
    for command, few in commands.items():
        found = invoke(*command[:2], tmp_path / "a", *command[2:], *few, "--corpus", tmp_path / "rows.jsonl", "--base",
                       tiny_base, "--max-seq-length", 64)  # fmt: skip
        assert found.exit_code == 0, found.output
        assert "1 of 2 rows have more than 64 tokens and are left out" in found.stderr


@pytest.mark.parametrize("repeated", [3, 1, 0])
def test_held_out_rows_that_are_trained_on_are_told(tiny_base, tmp_path, repeated):
    """Rows of another format, spelling, id and answer: what they ask decides."""
    rows = [{"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."} for n in range(11)]
    chats = [
        {"id": n, "messages": [{"role": "user", "content": f" {row['prompt'].upper()}"},
                               {"role": "assistant", "content": f"{row['completion']} Sure."}]}
        for n, row in enumerate(rows[8 - repeated : 11 - repeated])
    ]  # fmt: skip
    for name, part in (("train", rows[:8]), ("other", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    found = invoke("train", "--base", tiny_base, "--corpus", tmp_path / "train.jsonl", "--held-out",
                   tmp_path / "other.jsonl", *SMALL, "--out", tmp_path / "a", "--json")  # fmt: skip
    told = f"NOT NEW: {repeated} of 3 held-out rows ask what was trained on, too"
    assert result(found)["held_out_rows"].get("also_trained", 0) == repeated
    assert (told in found.stderr) == bool(repeated)
    scored = result(
        invoke(
            "adapter", "loss", "--corpus", tmp_path / "other.jsonl", "--adapter", tmp_path / "a", "--rows", 2, "--json"
        )
    )
    assert scored["trained_on"][str(tmp_path / "a")] == min(repeated, 2) / 2
    (tmp_path / "new.jsonl").write_text(json.dumps({"prompt": "Anything?", "completion": "No."}) + "\n")
    again = invoke("train", "--base", tiny_base, "--corpus", tmp_path / "new.jsonl", "--held-out",
                   tmp_path / "other.jsonl", "--warm-start", tmp_path / "a", *SMALL, "--out", tmp_path / "b",
                   "--json")  # fmt: skip
    # An adapter that starts from another has seen its rows, too.
    assert result(again)["held_out_rows"].get("also_trained", 0) == repeated
    record = record_of(json.loads((tmp_path / "b" / "manifest.json").read_text()), "b")
    assert not record.unknown
    assert [record.has(row_keys(text)) for text in ("What is 7 + 1?", "Anything?", "What is 10 + 1?")] == [
        True,
        True,
        False,
    ]


def test_held_out_rows_under_another_path_are_the_training_rows(tiny_base, tmp_path):
    rows = [{"prompt": f"¿Cuánto es {n} + 1?", "completion": f"{n + 1}"} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backwards = [dict(reversed(row.items())) for row in reversed(rows[1:])]
    (tmp_path / "held.json").write_text(json.dumps(backwards, ensure_ascii=False, indent=1))
    found = invoke("train", "--base", tiny_base, "--corpus", tmp_path / "train.jsonl", "--held-out",
                   tmp_path / "held.json", "--out", tmp_path / "a")  # fmt: skip
    assert found.exit_code == 2
    assert "held-out rows and training rows are the same" in found.stderr


def without_end(tiny_base, folder):
    """The tiny base with neither an end-of-text token in its tokenizer nor one in its config."""
    shutil.copytree(tiny_base, folder)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text())
            ends = ("eos_token", "eos_token_id", "pad_token", "pad_token_id")
            (folder / name).write_text(json.dumps({key: value for key, value in values.items() if key not in ends}))
    return folder


def test_a_base_without_an_end_of_text(tiny_base, corpora, tmp_path):
    base = without_end(tiny_base, tmp_path / "base")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Some plain text."}) + "\n")
    for name, source in (("corpus", corpora / "change"), ("text", tmp_path / "text.jsonl")):
        found = invoke("train", "--base", base, "--corpus", source, *SMALL, "--out", tmp_path / name)
        assert found.exit_code == (2 if name == "corpus" else 0), found.output
        assert "no end-of-text token" in found.stderr
    result(
        invoke("train", "--base", tiny_base, "--corpus", corpora / "change", *SMALL, "--out", tmp_path / "a", "--json")
    )
    (tmp_path / "a" / "manifest.json").unlink()  # an adapter that does not record its base
    asked = invoke("ask", "How many?", "--base", base, "--drafter", tmp_path / "a", "--verifier", tmp_path / "a",
                   "--template", "plain", "--attempts", 1, "--max-tokens", 4, "--json")  # fmt: skip
    assert result(asked)["attempts"] == 1
    assert "no end-of-text token: every draft runs to --max-tokens" in asked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "{tmp}/x"], "--corpus must be given"),
        (["train", "--corpus", "{data}", "--out", "{tmp}/x", "--rank", "64"], "rank 64 is above the dimensions"),
        (
            ["train", "--corpus", "{data}", "--out", "{tmp}/x", "--key", "q_prok"],
            "no layer has a module q_prok",
        ),
        (
            ["train", "--corpus", "{data}", "--out", "{tmp}/x", "--learning-rate", "5"],
            "not in the range 0<x<1",
        ),
        (["train", "--corpus", "{data}", "--out", "{tmp}/x", "--patience", "2"], "patience = 2 needs validate_every"),
        (["train", "--corpus", "{data}", "--out", "{tmp}/x", "--report-to", "mlflow"], "report-to mlflow is unknown"),
        (["train", "--corpus", "{data}", "--out", "{tmp}/x", "--held-out", "{data}"], "are the same"),
        (
            ["train", "--corpus", "{data}", "--out", "{tmp}/x", "--config", "{tmp}/none.yaml"],
            "none.yaml does not exist",
        ),
        (["train", "--corpus", "{tmp}/none.jsonl", "--out", "{tmp}/x"], "none.jsonl does not exist"),
        (["train", "--corpus", "{data}", "--out", "{tmp}/x", "--save-every", "-1"], "not in the range x>=0"),
        (["pool", "train", "--out", "{tmp}/x"], "at least one --corpus or --task"),
        (["adapter", "importance", "{tmp}/none", "--corpus", "{data}"], "none does not exist"),
    ],
)
def test_bad_input(tiny_base, corpora, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    named = [argument.format(tmp=tmp_path, data=corpora / "change") for argument in arguments]
    found = invoke(*named, "--base", tiny_base)
    assert found.exit_code == 2, found.output
    errors = [line for line in found.stderr.splitlines() if line.startswith("rsgwm: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_out_of_range_is_named(tmp_path):
    for key, text in (
        ("learning_rate", "model: m\ndata: d\nadapter_path: o\nlearning_rate: 2"),
        ("dropout", "model: m\ndata: d\nadapter_path: o\nlora_parameters: {rank: 8, scale: 20, dropout: 1.5}"),
        ("warmup", "base: b\ndata: d\nout: o\nwarmup: 7"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        refused = invoke("train", "--config", tmp_path / "mine.yaml")
        assert refused.exit_code == 2
        assert f"{tmp_path / 'mine.yaml'}: training config: {key} = " in refused.stderr


def test_two_processes_train_as_one(launch, tiny_base, corpora, tmp_path):
    """8 rows of a role in batches of 7: shares of 4 and 3 rows, then one row for the first process alone."""
    run = ("train", "--base", tiny_base, "--corpus", corpora / "change", *SMALL, "--epochs", 3, "--dropout", 0)
    run = (*run, "--batch-size", 7, "--save-every", 2, "--directions", 8)
    result(invoke(*run, "--out", tmp_path / "one", "--json"))
    told = launch(*run, "--out", tmp_path / "two")
    assert (tmp_path / "two" / "manifest.json").exists(), told
    one, two = Adapter.load(tmp_path / "one"), Adapter.load(tmp_path / "two")
    assert len(one.manifest["history"]) == 12
    for left, right in zip(one.manifest["history"], two.manifest["history"], strict=True):
        assert left[:2] == right[:2]
        assert left[3] == right[3]
        assert right[2] == pytest.approx(left[2], rel=1e-5)
    assert one.manifest["tokens"]["real"] == two.manifest["tokens"]["real"]
    for name, value in one.importance.items():
        np.testing.assert_allclose(np.array(two.importance[name]), np.array(value), rtol=1e-2, atol=1e-5, err_msg=name)
    assert one.directions_metadata == {
        **two.directions_metadata,
        "weights_sha256": one.directions_metadata["weights_sha256"],
    }
    assert one.directions
    for name, value in one.directions.items():
        scale = float(mx.abs(value).max().item())
        np.testing.assert_allclose(np.array(two.directions[name]), np.array(value), atol=1e-4 * scale, err_msg=name)


@pytest.mark.slow
def test_two_processes_share_a_pool(launch, tiny_base, corpora, tmp_path):
    pool = ("--base", tiny_base, *SMALL, "--corpus", corpora / "change", "--corpus", corpora / "groups")
    result(invoke("pool", "train", *pool, "--out", tmp_path / "one", "--json"))
    told = launch("pool", "train", *pool, "--out", tmp_path / "two")
    for name in ("change", "groups"):
        assert (tmp_path / "two" / name / "manifest.json").exists(), told
        for file in ("adapters.safetensors", "importance.safetensors"):
            assert files.sha256_file(tmp_path / "one" / name / file) == files.sha256_file(
                tmp_path / "two" / name / file
            )
    assert "adapter" in told
