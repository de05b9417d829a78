"""``rsgwm pool route`` and ``--router``: fit, refuse, answer."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli import route
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.data.corpus import load_corpus, make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference import routing
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.prompt_statistics import statistics_of_pool
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.prompt_statistics import prompt_statistics

PAIR = ("--score", "yesno", "--threshold", "0.5", "--max-tokens", "4", "--attempts", "1")


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(each) for each in arguments])


def told_by(done):
    """The JSON object of a command that ended well."""
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def pool(make_adapter, tmp_path):
    """Two adapters, their corpora, and a pair."""
    for seed, name in enumerate(("change", "groups", "drafter", "verifier")):
        place = tmp_path / "pool" if name in ("change", "groups") else tmp_path
        make_adapter(seed).save(place / name)
    for task in ("change", "groups"):
        rows = make_rows(generate(task, 12, 1, "train"), 12, 0, 1)
        save_corpus(tmp_path / "data" / task, rows, TEMPLATES["plain"], {"seed": 1})
    return tmp_path / "pool"


def fit(pool, tiny_base, *more):
    return invoke("pool", "route", pool, "--base", tiny_base, "--template", "plain", *more)


def test_the_option_names_every_rule():
    assert route.RULES == routing.RULES


def test_a_pool_gets_a_router_and_answers_by_it(pool, tiny_base, tmp_path):
    done = fit(pool, tiny_base, "--corpus", tmp_path / "data", "--json")
    told = told_by(done)
    assert told["questions"] == {"change": 12, "groups": 12}
    assert max(told["accuracy"].values()) == told["accuracy"][told["rule"]] > 0.6
    assert "left-out questions to the right adapter, taken" in done.stderr
    pair = ("--drafter", tmp_path / "drafter", "--verifier", tmp_path / "verifier", *PAIR, "--template", "plain")
    question = generate("groups", 1, 5, "test")[0].question
    done = invoke("ask", question, "--router", pool, *pair, "--base", tiny_base, "--json")
    answer = told_by(done)
    assert answer["drafted_by"] == answer["route"]
    assert f"drafted by {answer['route']}" in done.stderr
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": question}) + "\n")
    done = invoke("ask", "--file", asked, "--router", pool, *pair, "--base", tiny_base, "--json")
    assert told_by(done)["answers"][0]["answer"] == answer["answer"]


@pytest.fixture
def with_states(pool, tiny_base, tmp_path):
    """As ``pool``; its adapters have what training would keep of 12 questions, and no corpus is left."""
    base = load_base(str(tiny_base))
    for task in ("change", "groups"):
        corpus = load_corpus(tmp_path / "data" / task)
        statistics = prompt_statistics(base, corpus, TrainConfig())
        put(pool / task, statistics)
    shutil.rmtree(tmp_path / "data")
    return pool


def put(folder, statistics):
    adapter = Adapter.load(folder)
    adapter.prompt_states, adapter.prompt_states_metadata = statistics.arrays(), statistics.metadata()
    adapter.manifest["base"] = {**adapter.manifest.get("base", {}), "fingerprint": statistics.base}
    adapter.save(folder)


def test_a_pool_is_routed_by_what_training_kept(with_states, tiny_base, tmp_path):
    done = invoke("pool", "route", with_states, "--json")
    told = told_by(done)
    assert told["questions"] == {"change": 12, "groups": 12}
    assert (told["rule"], told["layer"], told["margin"], told["accuracy"]) == ("distance", 1, 0.9, None)
    assert (
        "of 24 questions; without rows of the tasks nobody knows how often it is right (--corpus tells)" in done.stderr
    )
    assert "the drafter answers where the first choice is less than 0.9 above the second" in done.stderr
    pair = ("--drafter", tmp_path / "drafter", "--verifier", tmp_path / "verifier", *PAIR, "--template", "plain")
    question = generate("groups", 1, 5, "test")[0].question
    done = invoke("ask", question, "--router", with_states, *pair, "--base", tiny_base, "--json")
    answer = told_by(done)
    assert answer["route"] in ("change", "groups")
    assert answer["drafted_by"] in ("drafter", answer["route"])
    first = (with_states / "router.safetensors").read_bytes()
    done = invoke(
        "pool", "route", with_states, "--base", tiny_base, "--rule", "distance", "--margin", "0.9", "--replace"
    )
    assert done.exit_code == 0, done.stderr
    assert (with_states / "router.safetensors").read_bytes() == first
    assert invoke("pool", "route", with_states, "--margin", "0", "--replace").exit_code == 0
    assert routing.Router.load(with_states / "router.safetensors").margin == 0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--rule", "nearest"), "--rule: for --corpus; what training kept has its rule, layer and template"),
        (("--lower-layers", "2", "--rows", "9"), "--lower-layers, --rows: for --corpus"),
        (("--template", "plain"), "--template: for --corpus"),
        (("--margin", "2"), "2.0 is not in the range 0<=x<=1"),
    ],
)
def test_options_that_take_rows(with_states, more, reason):
    done = invoke("pool", "route", with_states, *more)
    assert (done.exit_code, reason in done.stderr) == (2, True), done.stderr
    assert sorted(path.name for path in with_states.iterdir()) == ["change", "groups"]


def test_adapters_without_statistics_are_named(pool):
    done = invoke("pool", "route", pool)
    assert done.exit_code == 2
    assert "no prompt states beside change, groups; training on a corpus keeps them now; give --corpus" in done.stderr
    assert done.stderr.count("\n") == 2  # which pool it is, and the error


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mean": np.full(64, np.nan)}, "groups: its prompt_states.safetensors is damaged"),
        ({"mean": np.zeros(3)}, "groups: its prompt_states.safetensors is damaged"),
        (
            {"mean": np.zeros(3), "rest": np.ones(3), "factor": np.ones((2, 3))},
            "groups has other dimensions than change",
        ),
        ({"base": "f" * 98}, "groups has them of another base than change"),
        ({"template": "t"}, "groups has them of another template than change"),
        ({"layer": 2}, "groups has them of another layer than change"),
    ],
)
def test_statistics_that_cannot_route_together(with_states, change, reason):
    (statistics,) = statistics_of_pool([Adapter.load(with_states / "groups")]).values()
    put(with_states / "groups", replace(statistics, **change))
    done = invoke("pool", "route", with_states)
    assert (done.exit_code, reason in done.stderr) == (2, True), done.stderr
    assert done.stderr.count("\n") == 2  # which pool it is, and the error
    assert sorted(path.name for path in with_states.iterdir()) == ["change", "groups"]


def test_another_base_than_the_adapters(with_states):
    (statistics,) = statistics_of_pool([Adapter.load(with_states / "groups")]).values()
    put(with_states / "groups", statistics)
    adapter = Adapter.load(with_states / "groups")
    adapter.manifest["base"]["fingerprint"] = "f" * 98
    adapter.save(with_states / "groups")
    done = invoke("pool", "route", with_states)
    assert (done.exit_code, "groups: its prompt_states.safetensors is of another base" in done.stderr) == (2, True)


def test_a_margin_that_none_reaches_leaves_all_to_the_drafter(pool, tiny_base, tmp_path):
    assert fit(pool, tiny_base, "--corpus", tmp_path / "data", "--margin", "1").exit_code == 0
    pair = ("--drafter", tmp_path / "drafter", "--verifier", tmp_path / "verifier", *PAIR, "--template", "plain")
    done = invoke("ask", "What is 2 + 2?", "--router", pool, *pair, "--base", tiny_base, "--json")
    assert told_by(done)["drafted_by"] == "drafter"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--corpus", "data/change"), "give a corpus of each adapter, in their order (change, groups)"),
        (("--corpus", "data", "--margin", "2"), "2.0 is not in the range 0<=x<=1"),
        (("--corpus", "data", "--lower-layers", "0"), "layer must be in [1, 2], found 0"),
        (("--corpus", "data", "--rows", "3"), "change: a router takes at least 5 questions"),
    ],
)
def test_refusals_write_nothing(pool, tiny_base, tmp_path, monkeypatch, more, reason):
    monkeypatch.chdir(tmp_path)
    done = fit(pool, tiny_base, *more)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert sorted(path.name for path in pool.iterdir()) == ["change", "groups"]


def test_a_router_that_is_there_stays(pool, tiny_base, tmp_path):
    assert fit(pool, tiny_base, "--corpus", tmp_path / "data").exit_code == 0
    before = (pool / "router.safetensors").read_bytes()
    done = fit(pool, tiny_base, "--corpus", tmp_path / "data", "--margin", "0.5")
    assert (done.exit_code, "is there already; --replace it" in done.stderr) == (2, True)
    assert (pool / "router.safetensors").read_bytes() == before
    assert fit(pool, tiny_base, "--corpus", tmp_path / "data", "--margin", "0.5", "--replace").exit_code == 0


def test_an_adapter_replaced_by_another(pool, tiny_base, tmp_path):
    assert fit(pool, tiny_base, "--corpus", tmp_path / "data").exit_code == 0
    shutil.rmtree(pool / "change")
    shutil.copytree(pool / "groups", pool / "change")
    pair = ("--drafter", tmp_path / "drafter", "--verifier", tmp_path / "verifier", *PAIR, "--template", "plain")
    ask = ("ask", "What?", "--router", pool, *pair, "--base", tiny_base)
    done = invoke(*ask)
    assert (done.exit_code, "change is not what the router was fitted for; fit it again" in done.stderr) == (2, True)
    assert fit(pool, tiny_base, "--corpus", tmp_path / "data", "--replace").exit_code == 0
    assert invoke(*ask).exit_code == 0
    router = routing.Router.load(pool / "router.safetensors")
    old = replace(router, about={name: value for name, value in router.about.items() if name != "adapters"})
    old.save(pool / "router.safetensors")
    assert invoke(*ask).exit_code == 0  # nothing says what it was fitted for


def test_a_pool_without_a_router_or_without_an_adapter(pool, tiny_base, tmp_path):
    pair = ("--drafter", tmp_path / "drafter", "--verifier", tmp_path / "verifier", *PAIR, "--template", "plain")
    done = invoke("ask", "What?", "--router", pool, *pair, "--base", tiny_base)
    assert (done.exit_code, "has no router; make one: rsgwm pool route" in done.stderr) == (2, True)
    assert fit(pool, tiny_base, "--corpus", tmp_path / "data").exit_code == 0
    shutil.rmtree(pool / "groups")
    done = invoke("ask", "What?", "--router", pool, *pair, "--base", tiny_base)
    assert (done.exit_code, "adapters that are not there: groups" in done.stderr) == (2, True)
