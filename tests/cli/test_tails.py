"""``rsgwm tails`` and ``compare --tails`` at the edge."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.evaluation.tails.pareto import draw


def run(*arguments, code=0):
    made = CliRunner().invoke(rsgwm, [*map(str, arguments), "--json"])
    assert made.exit_code == code, made.output
    return made


def write(path, scores):
    path.write_text("id,score\n" + "".join(f"{n},{score!r}\n" for n, score in enumerate(scores.tolist())))
    return path


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(1)
    arms = {
        name: draw(shape, 1.0, (32_000,), random) for name, shape in (("a", 0.0), ("b", 0.25), ("c", 0.0), ("d", 0.25))
    }
    return {name: write(tmp_path / f"{name}.csv", scores) for name, scores in arms.items()}


def test_without_files_it_says_how_many_scores_a_difference_takes():
    made = run("tails")
    assert json.loads(made.stdout.splitlines()[-1])["needed"] == 1570
    assert "31400" in made.stderr
    asked = run("tails", "--effect", 0.4)
    assert json.loads(asked.stdout.splitlines()[-1])["needed"] == 200  # which the first gate asks for, too
    rows = [line.split() for line in asked.stderr.splitlines()]
    assert ["0.3", "200", "4000"] in rows
    assert ["0.4", "200", "4000"] in rows


def test_two_files_and_two_more_pass_and_are_drawn(files, tmp_path):
    picture = tmp_path / "tails.png"
    made = run(
        "tails", files["a"], files["b"], "--second", files["c"], files["d"], "--resamples", 99, "--plot", picture
    )
    told = json.loads(made.stdout.splitlines()[-1])
    assert (told["verdict"], told["gate"]) == ("PASS", None)
    assert "PASS: ξ differs by" in made.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_one_file_of_chances_is_warned_of(tmp_path):
    chances = 1 / (1 + np.exp(-np.random.default_rng(0).normal(0, 4, 5000)))
    made = run("tails", write(tmp_path / "a.csv", chances), "--resamples", 99)
    assert json.loads(made.stdout.splitlines()[-1])["verdict"] == "REJECT"
    assert "--logit" in made.stderr


def test_a_tail_of_one_value_has_a_verdict_in_json_too(tmp_path):
    scores = np.random.default_rng(0).normal(size=5000)
    told = json.loads(run("tails", write(tmp_path / "a.csv", scores.clip(max=1.2))).stdout.splitlines()[-1])
    assert (told["verdict"], told["gate"]) == ("REJECT", 1)
    assert "its largest score alone" in told["reason"]
    assert told["arms"][0]["shape"] is None
    assert [gate["passed"] for gate in told["gates"]] == [False, False, False, None, None][: len(told["gates"])]


def test_scores_without_names_are_paired_in_order_and_that_is_said(tmp_path):
    random = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(
            "score\n" + "".join(f"{x!r}\n" for x in random.exponential(size=4400).tolist())
        )
    arguments = ["tails", tmp_path / "a.csv", tmp_path / "b.csv", "--effect", 0.3, "--resamples", 99]
    assert "paired in their files' order" in run(*arguments).stderr


def test_a_picture_may_go_into_a_new_folder(files, tmp_path):
    run("tails", files["a"], "--resamples", 99, "--plot", tmp_path / "new" / "tails.svg")
    assert (tmp_path / "new" / "tails.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.csv"], "does not exist"),
        (["{a}", "{short}"], "different items"),
        (["{short}"], "at least 200"),
        (["{a}", "--second", "{b}", "{c}"], "give two files"),
        (["{a}", "--plot", "tails.pdf"], ".png or .svg"),
        (["{a}", "--column", "scores"], "did you mean --column score"),
        (["{a}", "--column", "zzz"], "has no column 'zzz'; --column is one of"),
        (["{a}", "--id", "idd"], "has no column 'idd'; did you mean --id id"),
        (["{a}", "--quantile", "0.0001"], "quantile"),
        (["{a}", "{b}", "--second", "{a}", "{b}", "--resamples", "99"], "found again by another scorer"),
        (["{huge}"], "cannot be summed"),
        (["--plot", "tails.png"], "--plot is of scores; name a file of them"),
    ],
)
def test_bad_input_is_one_line(files, tmp_path, arguments, words):
    short = write(tmp_path / "short.csv", np.arange(50.0))
    huge = write(tmp_path / "huge.csv", np.random.default_rng(0).exponential(size=5000) * 1e305)
    given = [text.format(**files, short=short, huge=huge) for text in arguments]
    made = run("tails", *given, code=2)
    assert words in made.stderr
    assert len(made.stderr.strip().splitlines()) == 1
