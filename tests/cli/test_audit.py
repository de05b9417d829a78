"""``rsgwm audit`` and ``rsgwm merge --plan`` at the edge: what they print, what they refuse, and the exit codes."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.models.adapter import Adapter


def run(*arguments, code=0):
    made = CliRunner().invoke(rsgwm, [*map(str, arguments), "--quiet"])
    assert made.exit_code == code, made.output
    return made


def result(made):
    return json.loads(made.stdout.splitlines()[-1])


def opposed(adapter):
    """The adapter with every update turned round."""
    weights = {name: -value if name.endswith("lora_b") else value for name, value in adapter.weights.items()}
    return replace(adapter, weights=weights)


@pytest.fixture
def pool(make_adapter, tmp_path):
    first = make_adapter(0)
    kinds = {"a": first, "same": first, "against": opposed(first), "large": make_adapter(3, size=4.0, init_seed=3)}
    return {name: adapter.save(tmp_path / name) for name, adapter in kinds.items()}


def test_one_adapter_has_a_spectrum_and_no_verdict(pool):
    made = run("audit", pool["a"], "--json")
    told = result(made)
    assert "merge" not in made.stdout.splitlines()[0]
    (adapter,) = told["adapters"]
    assert {"stable_rank_mean", "utilisation_mean", "flags", "eligibility"} <= adapter.keys()
    assert adapter["eligibility"]["verdict"] == "UNKNOWN"
    assert (told["pairs"], told["recommendation"]) == ([], None)


@pytest.mark.parametrize(
    ("other", "word", "verdict"),
    [
        ("same", "merge with care", "redundant"),
        ("against", "do not merge", "conflicting"),
        ("large", "merge with care", "imbalanced"),
    ],
)
def test_the_first_line_is_a_verdict_and_the_second_what_to_type(pool, other, word, verdict):
    made = run("audit", pool["a"], pool[other])
    first, second, *_ = made.stdout.splitlines()
    assert first.startswith(f"{word}: ")
    assert second.startswith("next: rsgwm ")
    told = result(run("audit", pool["a"], pool[other], "--json"))
    (pair,) = told["pairs"]
    assert {"verdict", "risk", "frobenius_ratio", "mean_overlap", "modules"} <= pair.keys()
    assert pair["verdict"] == verdict
    assert told["recommendation"]["verdict"] == word


def test_an_adapter_that_changes_nothing_is_told_without_infinities(pool, make_adapter, tmp_path):
    made = run("audit", pool["a"], make_adapter(5, size=0.0).save(tmp_path / "zero"))
    first, second, *_ = made.stdout.splitlines()
    assert first.endswith("zero changes nothing")
    assert second == f"next: rsgwm chat --adapter {pool['a']}"
    assert "nothing in one" in made.stdout
    assert " inf" not in made.stdout


def test_an_adapter_given_twice_is_told_as_that(pool):
    first, second, *_ = run("audit", pool["a"], pool["a"]).stdout.splitlines()
    assert first.endswith("are the same adapter")
    assert second == f"next: rsgwm chat --adapter {pool['a']}"


def test_of_three_the_worst_pair_is_first_and_one_is_named_to_leave_out(pool):
    told = result(run("audit", pool["a"], pool["same"], pool["against"], "--json"))
    assert told["pairs"][0]["verdict"] == "conflicting"
    assert str(pool["against"]) in told["pairs"][0]["adapters"]
    assert told["recommendation"]["leave_out"] == str(pool["against"])


def test_the_merge_says_the_verdict_before_it_merges(pool, tmp_path):
    made = run("merge", pool["a"], pool["large"], "--method", "linear", "--out", tmp_path / "out")
    assert made.stdout.splitlines()[0].startswith("audit: merge with care: ")


def test_a_plan_is_written_changed_and_carried_out(pool, tmp_path):
    plan = tmp_path / "plan.yaml"
    run("audit", pool["a"], pool["large"], "--plan", plan)
    run("merge", "--plan", plan, "--out", tmp_path / "out")
    merged = Adapter.load(tmp_path / "out").manifest["merge"]
    assert merged["outcome"]["truncated"]["dominance"] < 0.2
    naive = result(run("merge", pool["a"], pool["large"], "--method", "linear", "--out", tmp_path / "naive", "--json"))
    assert naive["merge"]["method"] == "linear"
    told = result(run("audit", "--merged", tmp_path / "naive", "--sources", pool["a"], pool["large"], "--json"))
    assert told["merged"]["dominated"]


def test_what_is_no_better_than_the_base_ends_with_3_when_asked(make_adapter, pool, tiny_base):
    arguments = ("audit", pool["large"], "--data", "change", "--data-rows", 8, "--base", tiny_base)
    assert "FLAGGED_WEAK" in run(*arguments).output
    made = run(*arguments, "--strict-qa", "--json", code=3)
    assert result(made)["adapters"][0]["eligibility"]["verdict"] == "FLAGGED_WEAK"


def test_nothing_in_common_shows_what_each_adapts(make_adapter, tmp_path):
    folders = [
        make_adapter(index, keys=(key,)).save(tmp_path / key)
        for index, key in enumerate(("self_attn.q_proj", "self_attn.v_proj"))
    ]
    told = run("audit", *folders, code=2).output
    assert "no module in common" in told
    assert "layers.0.self_attn.q_proj" in told
    assert "layers.0.self_attn.v_proj" in told


def test_values_that_are_not_finite_are_named(make_adapter, tmp_path, pool):
    folder = make_adapter(1).save(tmp_path / "bad")
    (folder / "manifest.json").unlink()
    weights = mx.load(str(folder / "adapters.safetensors"))
    name = next(iter(weights))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights | {name: weights[name] * mx.nan})
    assert f"{name} has values that are not finite" in run("audit", folder, pool["a"], code=2).output
    merged = ("audit", "--merged", folder, "--sources", pool["a"], pool["large"])
    assert f"{name} has values that are not finite" in run(*merged, code=2).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no adapters given"),
        (("{a}", "--energy", "0"), "0<x<=1"),
        (("{a}", "--preset", "pots"), "post"),
        (("{a}", "--plan", "plan.yaml"), "at least two adapters"),
        (("{a}", "{same}", "--data", "x", "--data", "y", "--data", "z"), "2 adapters, 3"),
        (("{a}", "--merged", "{a}"), "at least two sources, found 1"),
        (("{a}", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(pool, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = run("audit", *(str(part).format(**pool) for part in arguments), code=2)
    assert message in made.output
    assert not (tmp_path / "plan.yaml").exists()


def test_a_plan_stands_alone(pool, tmp_path):
    run("audit", pool["a"], pool["large"], "--plan", tmp_path / "plan.yaml")
    told = run("merge", "--plan", tmp_path / "plan.yaml", "--method", "ties", "--out", tmp_path / "out", code=2).output
    assert "--plan says method" in told
    told = run("merge", pool["a"], pool["same"], "--plan", tmp_path / "plan.yaml", "--out", tmp_path / "out", code=2)
    assert "the plan is for other adapters" in told.output
    assert not (tmp_path / "out").exists()
