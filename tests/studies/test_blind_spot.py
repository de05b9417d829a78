"""The blind-spot study: counted by hand on a few drafts, and run on the tiny base, where it goes on after a cut."""

from __future__ import annotations

import json

import pytest

from mlx_rsgwm.inference.grafting import GREEDY, KINDS, SIX
from mlx_rsgwm.studies.blind_spot import CHAINS, Tried, jaccards, summarise
from mlx_rsgwm.studies.blind_spot_report import opening, render_page, study_text


def tried(kinds, right):
    return tuple(Tried(kind, kind in right, f"text of {kind}", 3) for kind in kinds)


@pytest.fixture
def arms():
    samples = tuple(Tried("sampled", False, "", 2) for _ in range(6))
    solved = (*samples[1:], Tried("sampled", True, "", 2))
    every = (GREEDY, *KINDS)
    return {
        "sampled": {"a": solved, "b": samples, "c": samples, "d": samples, "e": samples},
        "fresh": {"b": solved, "c": samples, "d": samples, "e": samples},
        "grafted": {
            "b": tried(every, {GREEDY, "zero"}),
            "c": tried(every, {"zero", "shuf"}),
            "d": tried(every, {"avg"}),
            "e": tried(every, set()),
        },
    }


def test_recovery_is_counted_on_the_stratum_beside_its_control(arms):
    told = summarise("abcde", "bcde", arms)
    assert (told["questions"], told["stratum"]["value"]) == (5, 0.8)
    assert [rate["value"] for rate in told["recovery"].values()] == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.75, 0.75]
    assert list(told["recovery"]) == [f"R_{k}" for k in range(1, 9)]
    assert CHAINS[:6] == SIX
    assert told["fresh"]["value"] == 0.25
    assert told["chains_over_fresh"] == {
        "n": 4, "only_fresh": 0, "only_chains": 1, "difference": 0.25, "p_value": 1.0
    }  # fmt: skip
    assert told["by_kind"]["zero"] == 2
    assert told["tokens"] == {"sampled": 60, "fresh": 48, "grafted": 4 * len(SIX) * 3}


def test_both_readings_of_jaccard():
    right = {kind: set() for kind in (GREEDY, *KINDS)} | {GREEDY: {"b"}, "zero": {"b", "c"}, "shuf": {"c", "d"}}
    indices = jaccards(right, set("bcde"))
    assert indices["fixed"]["zero, shuf"] == 0.5  # {c}, {c, d}
    assert "rand, bos" not in indices["fixed"]  # neither finds anything
    assert indices["errors"]["rand, bos"] == 1.0  # two kinds that are never right miss the same
    assert indices["errors"]["zero, shuf"] == 1 / 3  # {d, e}, {b, e}
    assert len(indices["errors"]) == 7 * 6 / 2
    assert jaccards({kind: set() for kind in right}, set("b"))["fixed"] == {}


def test_the_page_shows_what_was_recovered_and_escapes_it(arms):
    told = summarise("abcde", "bcde", arms)
    item = {"id": "c", "question": "<b>how many?</b>", "gold": "4", "fresh": False}
    chains = {draft.kind: {"text": draft.text, "correct": draft.correct} for draft in arms["grafted"]["c"]}
    shown = render_page({**told, "items": [{**item, "chains": chains}]})
    assert "&lt;b&gt;how many?" in shown
    assert "text of shuf" in shown
    assert "text of prev" not in shown
    assert "six fresh samples 25.0%" in opening(told)
    assert "six fresh samples (control)" in study_text(told)
    assert "R_6: and bos" in study_text(told)
    assert "greedy does not 1.00 (zero, shuf)" in study_text(told)
    assert "<td>zero, shuf</td><td>1.00</td>" in shown


def test_without_a_blind_spot_it_says_so(arms):
    told = summarise("a", "", {**arms, "sampled": {"a": arms["sampled"]["a"]}})
    assert "there is no blind spot here" in study_text(told)
    assert "there is no blind spot here" in render_page({**told, "items": []})


def test_a_run_goes_on_where_it_was_cut_and_is_refused_for_other_questions(tiny_base, tmp_path, make_adapter):
    from click.testing import CliRunner

    from mlx_rsgwm.cli.main import rsgwm

    make_adapter(1, size=0.5).save(tmp_path / "adapter")
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n + 1}"} for n in range(5)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = [
        "blindspot",
        tmp_path / "adapter",
        "--base",
        tiny_base,
        "--task",
        tmp_path / "own.jsonl",
        "--split",
        "all",
    ]
    arguments += ["--items", 5, "--max-tokens", 5, "--batch-rows", 2, "--out", out, "--json"]

    def run(*more):
        return CliRunner().invoke(rsgwm, [str(word) for word in (*arguments, *more)])

    made = run()
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout.splitlines()[-1])
    assert told["questions"] == 5
    first = (out / "blindspot.json").read_bytes()
    lines = (out / "journal.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * 5
    (out / "journal.jsonl").write_text("".join(lines[:8]))
    (out / "blindspot.json").unlink()
    assert run("--batch-rows", 3).exit_code == 0
    assert (out / "blindspot.json").read_bytes() == first
    refused = run("--temperature", 0.9)
    assert refused.exit_code == 2
    assert "temperature" in refused.stderr
    out_of_range = run("--layer", 9)
    assert (out_of_range.exit_code, "layers 0 to 1" in out_of_range.stderr) == (2, True)
