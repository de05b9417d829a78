"""``rsgwm pool route`` and ``--router``: fit, refuse, answer."""

import json
import shutil

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli import route
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.data.corpus import make_rows, save_corpus
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference import routing

PAIR = ("--score", "yesno", "--threshold", "0.5", "--max-tokens", "4", "--attempts", "1")


def invoke(*arguments):
    return CliRunner().invoke(rsgwm, [str(each) for each in arguments])


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
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["questions"] == {"change": 12, "groups": 12}
    assert max(told["accuracy"].values()) == told["accuracy"][told["rule"]] > 0.6
    assert "left-out questions to the right adapter, taken" in done.stderr
    pair = ("--drafter", tmp_path / "drafter", "--verifier", tmp_path / "verifier", *PAIR, "--template", "plain")
    question = generate("groups", 1, 5, "test")[0].question
    done = invoke("ask", question, "--router", pool, *pair, "--base", tiny_base, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["drafted_by"] == answer["route"]
    assert f"drafted by {answer['route']}" in done.stderr
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": question}) + "\n")
    done = invoke("ask", "--file", asked, "--router", pool, *pair, "--base", tiny_base, "--json")
    assert json.loads(done.stdout.splitlines()[-1])["answers"][0]["answer"] == answer["answer"]


def test_a_margin_that_none_reaches_leaves_all_to_the_drafter(pool, tiny_base, tmp_path):
    assert fit(pool, tiny_base, "--corpus", tmp_path / "data", "--margin", "1").exit_code == 0
    pair = ("--drafter", tmp_path / "drafter", "--verifier", tmp_path / "verifier", *PAIR, "--template", "plain")
    done = invoke("ask", "What is 2 + 2?", "--router", pool, *pair, "--base", tiny_base, "--json")
    assert json.loads(done.stdout.splitlines()[-1])["drafted_by"] == "drafter"


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


def test_a_pool_without_a_router_or_without_an_adapter(pool, tiny_base, tmp_path):
    pair = ("--drafter", tmp_path / "drafter", "--verifier", tmp_path / "verifier", *PAIR, "--template", "plain")
    done = invoke("ask", "What?", "--router", pool, *pair, "--base", tiny_base)
    assert (done.exit_code, "has no router; make one: rsgwm pool route" in done.stderr) == (2, True)
    assert fit(pool, tiny_base, "--corpus", tmp_path / "data").exit_code == 0
    shutil.rmtree(pool / "groups")
    done = invoke("ask", "What?", "--router", pool, *pair, "--base", tiny_base)
    assert (done.exit_code, "adapters that are not there: groups" in done.stderr) == (2, True)
