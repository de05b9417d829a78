"""Recipes for one's own questions: written with comments, shown in full, forecast, and run with one task."""

import json

import pytest
import yaml
from click.testing import CliRunner

from mlx_rsgwm.cli.recipe import init
from mlx_rsgwm.cli.run import run
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.recipes.estimate import duration
from mlx_rsgwm.recipes.own import own_recipe, written_out
from mlx_rsgwm.recipes.run import run_recipe
from mlx_rsgwm.recipes.schema import load_recipe


@pytest.fixture
def questions(tmp_path):
    def write(name, answer=lambda n: f"{n} + 3 = {n + 3}\n#### {n + 3}", count=60):
        rows = [{"question": f"What is {n} + 3?", "answer": answer(n)} for n in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def loaded(text, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return load_recipe(str(path))


def test_every_line_of_settings_is_explained_and_valid(questions, tmp_path):
    text = own_recipe([questions("sums.jsonl"), questions('more "sums".jsonl')], "smollm2-135m", "own.yaml")
    recipe = loaded(text, tmp_path)
    assert recipe.name == "own"
    assert recipe.data.tasks == (str(tmp_path / "sums.jsonl"), str(tmp_path / 'more "sums".jsonl'))
    assert (recipe.merge.method, recipe.data.verify_share) == ("regmean", 0.18)
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("-")]
    assert [line for line in lines if "#" not in line and not line.endswith(":")] == []


def test_one_file_makes_one_adapter_and_texts_no_verifier_rows(questions, tmp_path):
    recipe = loaded(own_recipe([questions("a.jsonl", lambda n: "yes, quite so")], "smollm2-135m", "x.yaml"), tmp_path)
    assert recipe.data.verify_share == 0
    assert "merge" not in yaml.safe_load((tmp_path / "own.yaml").read_text())
    with pytest.raises(RsgwmError, match=r"few\.jsonl"):
        own_recipe([questions("few.jsonl", count=2)], "smollm2-135m", "x.yaml")


def test_init_writes_what_run_shows_and_forecasts(questions, tiny_base, tmp_path):
    out = tmp_path / "own.yaml"
    arguments = [questions("sums.jsonl"), "--base", str(tiny_base), "--out", str(out), "--json"]
    done = CliRunner().invoke(init, arguments, catch_exceptions=False)
    assert json.loads(done.stdout)["recipe"] == str(out)
    with pytest.raises(RsgwmError, match="exists already; edit it"):
        CliRunner().invoke(init, arguments, catch_exceptions=False)

    shown = CliRunner().invoke(run, [str(out), "--show"], catch_exceptions=False).stdout
    assert written_out(load_recipe(str(out))) == shown

    folder = tmp_path / "out"
    ahead = CliRunner().invoke(run, [str(out), "--out", str(folder), "--dry-run", "--json"], catch_exceptions=False)
    seconds = json.loads(ahead.stdout.splitlines()[-1])
    assert list(seconds["stages"]) == ["data-sums", "train-sums", "calibrate", "evaluate", "export"]
    assert all(value > 0 for value in seconds["stages"].values())
    assert f"into {folder}" in ahead.stderr
    assert not folder.exists()


def test_one_task_is_enough(tiny_base, tmp_path):
    """Its adapter drafts and verifies; nothing is merged, and what is done is not forecast again."""
    path = tmp_path / "alone.yaml"
    values = {
        "base": str(tiny_base),
        "data": {"tasks": ["change"], "rows": 12, "verify_share": 0.5, "calibration_items": 2},
        "train": {"rank": 4, "epochs": 1, "batch_size": 4},
        "loop": {"attempts": 2, "max_tokens": 6, "threshold": "auto"},
        "evaluate": {"items": 2, "timed": 0},
        "export": {"parity": False},
    }
    path.write_text(yaml.safe_dump(values))
    recipe, out = load_recipe(str(path)), tmp_path / "out"
    summary = run_recipe(recipe, out)
    assert (summary["recipe"], summary["tasks"]) == ("alone", ["change"])
    assert summary["executed"] == ["data-change", "train-change", "calibrate", "evaluate", "export"]
    assert summary["adapters"] == dict.fromkeys(("drafter", "verifier"), str(out / "pool" / "change"))
    assert Adapter.load(out / "pool" / "change").manifest["kind"] != "merged"
    assert run_recipe(recipe, out)["executed"] == []
    ahead = CliRunner().invoke(run, [str(path), "--out", str(out), "--dry-run", "--json"], catch_exceptions=False)
    assert set(json.loads(ahead.stdout.splitlines()[-1])["stages"].values()) == {None}


def test_a_recipe_in_full_is_read_back_equal(tmp_path):
    for name in ("demo", "paper"):
        recipe = load_recipe(name, ["export.parity=false"])
        path = tmp_path / "full.yaml"
        path.write_text(written_out(recipe))
        assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(("seconds", "shown"), [(40, "about 40 s"), (700, "about 12 min"), (12600, "about 3.5 h")])
def test_durations_are_short(seconds, shown):
    assert duration(seconds) == shown


def test_a_recipe_that_could_not_be_read_is_not_written(questions, tmp_path):
    arguments = [questions("sums.jsonl"), "--base", "\u200b", "--out", str(tmp_path / "r.yaml")]
    with pytest.raises(RsgwmError, match="base must be a name"):
        CliRunner().invoke(init, arguments, catch_exceptions=False)
    assert not (tmp_path / "r.yaml").exists()
