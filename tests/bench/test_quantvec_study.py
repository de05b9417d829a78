"""The study of quantization vectors: its controls are what they are called, and it runs, resumes and adds up."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.bench import quantvec_study as study
from mlx_rsgwm.models.adapter import Adapter

TINY = ("--steps", 2, "--rows", 8, "--items", 8, "--batch-rows", 4, "--bits", "2,32", "--seed", 0, "--seed", 1,
        "--answered", 2,
        "--task", "change", "--task", "groups",
        "--set", "rank=2", "--set", "batch_size=4", "--set", "learning_rate=0.05", "--max-tokens", 2)  # fmt: skip


def update(adapter, module):
    return np.array(adapter.weights[f"{module}.lora_a"] @ adapter.weights[f"{module}.lora_b"])


def test_controls_have_the_vectors_norms(make_adapter):
    vector = make_adapter(1, keys=("self_attn.q_proj", "mlp.down_proj"), scale=1.0)
    drawn, moved = study.random_like(vector, 3), study.shuffled(vector, 3)
    assert set(drawn.weights) == set(moved.weights) == set(vector.weights)
    for module in vector.modules():
        expected = update(vector, module)
        assert np.linalg.norm(update(drawn, module)) == pytest.approx(np.linalg.norm(expected), rel=1e-4)
        cosine = (update(drawn, module) * expected).sum() / np.square(expected).sum()
        assert abs(cosine) < 0.2
        other = module.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace("layers.x", "layers.1")
        assert mx.array_equal(moved.weights[f"{module}.lora_a"], vector.weights[f"{other}.lora_a"]).item()
    again = study.random_like(vector, 4)
    assert not mx.array_equal(again.weights[f"{module}.lora_a"], drawn.weights[f"{module}.lora_a"]).item()


def test_recovery_by_hand():
    tokens = [2, 2]
    keys = {
        ("plain", ""): [4.0, 6.0], ("ceiling", "a"): [2.0, 4.0], ("base", ""): [9.0, 9.0], ("vector", "b"): [3.0, 6.0],
        ("random", "b"): [4.0, 6.0], ("minus", "b"): [6.0, 8.0], ("shuffled", "b"): [5.0, 6.0],
    }  # fmt: skip
    rows = {
        (0, quant, task, variant, {"a": "b", "b": "a"}.get(donor, "") if task == "b" else donor): {
            "nats": nats, "tokens": tokens, "right": [],
        }
        for task in ("a", "b")
        for (variant, donor), nats in keys.items()
        for quant in ("3 bits",)
    }  # fmt: skip
    rows |= {(0, "", task, "float", ""): {"nats": [1.0, 1.0], "tokens": tokens, "right": [True]} for task in "ab"}
    told = study.summary(rows, "3 bits", ("a", "b"))
    variants = told["variants"]
    assert variants["plain"]["loss"] == 2.5
    assert variants["ceiling"]["gain"]["value"] == 1.0
    assert variants["vector"]["recovery"]["value"] == 0.25
    assert variants["minus"]["recovery"]["value"] == -1.0
    assert variants["random"]["recovery"]["value"] == 0.0
    for recovery in (told["pairs"][name] for name in ("a → b", "b → a")):
        assert recovery["recovery"]["value"] == 0.25
        assert recovery["recovery"]["low"] <= 0.25 <= recovery["recovery"]["high"]
        assert recovery["by_seed"] == [0.25]
    assert variants["float"]["accuracy"]["value"] == 1.0
    assert variants["plain"]["accuracy"] is None
    assert "vector" in study.table({"3 bits": told})


def test_it_runs_and_resumes(tiny_base, tmp_path, monkeypatch, capsys):
    def run(*more):
        arguments = [tmp_path / "study", "--base", tiny_base, *TINY, "--results", tmp_path / "r.json", *more]
        monkeypatch.setattr(sys, "argv", ["quantvec_study.py", *map(str, arguments)])
        study.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    first = run()
    told = first["2 bits in groups of 32"]
    assert told == json.loads((tmp_path / "r.json").read_text())["2 bits in groups of 32"]
    assert told["seeds"] == [0, 1]
    assert told["rows"] == 16
    assert set(told["variants"]) == {"float", "base", "plain", "ceiling", "vector", "random", "minus", "shuffled"}
    assert set(told["pairs"]) == {"change → groups", "groups → change"}
    journal = tmp_path / "study" / "figures.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * (1 + 3 + 4)
    # Cut in the middle of a line, as a kill leaves it: what is missing is measured again, to the same figures.
    journal.write_text("\n".join(lines[:20]) + "\n" + lines[20][:30])
    monkeypatch.setattr(study, "train_pool", trained_before(study.train_pool))
    assert run() == first
    assert sorted(journal.read_text().splitlines()) == sorted(lines)
    answers = {
        key[3]: len(right) for key, right in ((row["key"], row.get("right")) for row in map(json.loads, lines[1:]))
    }
    assert answers == {name: 2 if name in study.ANSWERED else 0 for name in told["variants"]}
    ceiling = next(json.loads(line) for line in lines if '"ceiling"' in line)
    through = Adapter.load(tmp_path / "study" / "seed-0" / "2-32-affine" / ceiling["key"][2])
    assert through.manifest["config"]["qat"]["bits"] == 2


def trained_before(train_pool):
    """The same, and nothing is left to train."""

    def check(*arguments, **options):
        assert train_pool(*arguments, **options) == []
        return []

    return check
