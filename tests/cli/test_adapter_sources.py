"""Every command that takes an adapter takes every source, with the result of its explicit conversion."""

import json

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.converters.hub.hub import stage
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.records import DraftRecord
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapter

KINDS = ("ours", "mlx_lm", "peft", "gguf", "hub", "hub_revision")
LOOP = ("--template", "plain", "--max-tokens", 5, "--attempts", 2)


def invoke(*arguments):
    done = CliRunner().invoke(rsgwm, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def arrays(file):
    return {name: value.tolist() for name, value in mx.load(str(file)).items()}


def merge(first, second, folder):
    invoke("merge", first, second, "--method", "linear", "--out", folder / "out")
    merged = Adapter.load(folder / "out")
    return merged.spec.scale, {name: value.tolist() for name, value in merged.weights.items()}


def evaluate(first, second, folder):
    pair = ("--drafter", first, "--verifier", second, "--score", "mean_logprob", "--threshold", 0.01)
    found = invoke("eval", *pair, *LOOP, "--task", "change", "--items", 8, "--timed", 0, "--batch-rows", 8)
    return {name: value for name, value in found.items() if "latency" not in name and name != "metadata"}


def fuse(first, second, folder):
    result = invoke("fuse", first, "--out", folder / "out")
    return result["modules"], result["share"], arrays(folder / "out" / "model.safetensors")


def parity(first, second, folder):
    result = invoke("parity", first, "--device", "cpu")
    assert result["passed"]
    return result["max_abs_logit"], result["perplexity"], result["layers_compared"]


def calibrate(first, second, folder):
    result = invoke(
        "calibrate", "--drafter", first, "--verifier", second, *LOOP, "--task", "change", "--items", 16,
        "--score", "mean_logprob", "--curve", "platt",
    )  # fmt: skip
    asked = invoke("ask", "What is 2 + 2?", "--drafter", first, "--verifier", second, *LOOP)
    assert asked["threshold"] == result["threshold"]  # and the next command finds it
    return result["threshold"], result["auroc"], result["curves"], asked["score"]


def ask(first, second, folder):
    result = invoke("ask", "What is 2 + 2?", "--drafter", first, "--verifier", second, *LOOP)
    return result["answer"], result["score"]


def loss(first, second, folder):
    rows = [{"prompt": one.question, "completion": one.answer} for one in generate("change", 4, 0, "train")]
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = invoke("adapter", "loss", "--corpus", folder, "--adapter", first, "--adapter", second)["loss"]
    return list(found.values())


def importance(first, second, folder):
    folder.mkdir()
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": "5"}) + "\n" for n in range(4))
    )
    invoke("adapter", "importance", first, "--corpus", folder / "rows.jsonl", "--out", folder / "out")
    made = Adapter.load(folder / "out")
    assert made.manifest["importance"]["collected"]
    return [{name: value.tolist() for name, value in part.items()} for part in (made.importance, made.weights)]


def push(first, second, folder):
    staged = stage(load_adapter(first), "me/adapter", folder / "repo", base="owner/base", with_mlx=True)
    return [arrays(staged.folder / name) for name in ("adapter_model.safetensors", "mlx/adapters.safetensors")]


@pytest.fixture
def half_right(monkeypatch):
    """A tiny random model answers nothing right; let every draft with an even number of letters count as right."""

    def judge(question, draft, scores, *more):
        return DraftRecord(draft.text, "1", len(draft.text) % 2 == 0, scores)

    monkeypatch.setattr(judging, "judge", judge)


@pytest.mark.parametrize(
    "command", [merge, evaluate, fuse, parity, calibrate, ask, loss, importance, push], ids=lambda one: one.__name__
)
@pytest.mark.usefixtures("half_right", "one_torch_thread")
def test_every_source_gives_the_result_of_its_conversion(command, adapter_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("RSGWM_CACHE", str(tmp_path / "cache"))
    pairs = [adapter_sources(seed) for seed in (1, 2)]
    converted = [load_adapter(one["peft"]).save(tmp_path / f"converted-{index}") for index, one in enumerate(pairs)]
    others = [file for one in pairs for file in (*one["peft"].rglob("*"), one["gguf"])] + [
        *(tmp_path / "hub").rglob("*")
    ]
    before = {file: file.stat().st_mtime_ns for file in others}
    expected = command(*converted, tmp_path / "expected")
    for kind in KINDS:
        assert command(pairs[0][kind], pairs[1][kind], tmp_path / f"out-{kind}") == expected, kind
    # Nothing is written beside files of other formats.
    assert {file: file.stat().st_mtime_ns for file in others} == before


def test_importance_of_another_format_needs_a_place(adapter_sources, tmp_path):
    sources = adapter_sources(1)
    for kind in ("peft", "gguf"):
        refused = CliRunner().invoke(rsgwm, ["adapter", "importance", str(sources[kind]), "--corpus", str(tmp_path)])
        assert refused.exit_code == 2
        assert "is not a folder that importance could stand in; give --out" in refused.output


def test_drafter_and_verifier_may_be_of_two_formats(adapter_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("RSGWM_CACHE", str(tmp_path / "cache"))
    one, two = adapter_sources(1), adapter_sources(2)
    expected = ask(one["peft"], two["peft"], tmp_path)
    for first, second in (("peft", "gguf"), ("gguf", "mlx_lm"), ("hub", "peft")):
        assert ask(one[first], two[second], tmp_path) == expected
