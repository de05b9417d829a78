"""Recipes that train in rounds or average checkpoints: what is made anew, and what is told before any training."""

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.recipes.run import load_recipe, run_recipe

AFTER = ["merge", "calibrate", "evaluate", "export"]  # the stages behind a pool
ROUNDS = {"rank": 4, "alpha": 8, "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "directions": 4}


@pytest.mark.parametrize("mode", ["avg_product", "accumulate"])
def test_a_pool_is_trained_in_rounds(recipe_file, tmp_path, mode):
    train = {**ROUNDS, "rounds": {"count": 2, "mode": mode}}
    path, out = (
        recipe_file(train=train, merge={"method": "regmean"}, evaluate={"items": 2, "timed": 0}),
        tmp_path / "out",
    )
    first = run_recipe(load_recipe(path), out)
    assert first["executed"] == ["data-change", "data-groups", "train-in-rounds", *AFTER]
    assert Adapter.load(out / "pool/change").spec.rank == (8 if mode == "accumulate" else 4)
    assert Adapter.load(out / "drafter").spec.rank == 4
    assert (out / "pool/rounds/round-02/round.json").is_file()
    weights = [path for path in out.rglob("adapters.safetensors") if "export" not in path.parts]
    written = {path: path.read_bytes() for path in weights}
    assert run_recipe(load_recipe(path), out)["executed"] == []
    (out / "pool/rounds/round-01/round.json").unlink()  # what is deleted is made again, to the same bits
    assert run_recipe(load_recipe(path), out)["executed"][0] == "train-in-rounds"
    assert {path: path.read_bytes() for path in weights} == written


def test_averages_of_checkpoints_make_the_pool(recipe_file, tmp_path):
    path = recipe_file(train=ROUNDS, average={"save_every": 1, "metric": "steps"}, evaluate={"items": 2, "timed": 0})
    first = run_recipe(load_recipe(path), tmp_path / "out")
    stages = [f"{name}-{task}" for name in ("data", "train", "average") for task in ("change", "groups")]
    assert first["executed"] == [*stages, *AFTER]
    averaged = Adapter.load(tmp_path / "out/pool/change")
    assert averaged.manifest["task"] == "change"
    assert len(averaged.manifest["average"]["checkpoints"]) == 4
    assert averaged.manifest["average"]["metric"] == "steps"
    assert averaged.importance_of("draft")  # which the merge has used
    assert run_recipe(load_recipe(path), tmp_path / "out")["executed"] == []
    again = run_recipe(load_recipe(path, ["average.penalty=0.5"]), tmp_path / "out")
    assert again["executed"] == [*stages[4:], *AFTER]
    # Training kept all checkpoints; of those that another run keeps there are too few, or more than are asked for.
    fewer = run_recipe(load_recipe(path, ["average.last=2"]), tmp_path / "out")
    assert fewer["executed"] == [*stages[2:], *AFTER]
    assert len(Adapter.load(tmp_path / "out/pool/change").manifest["average"]["checkpoints"]) == 2
    back = run_recipe(load_recipe(path), tmp_path / "out")
    assert back["executed"] == [*stages[2:], *AFTER]
    assert len(Adapter.load(tmp_path / "out/pool/change").manifest["average"]["checkpoints"]) == 4


@pytest.mark.parametrize(("changes", "message"), [
    ({"average": {"save_every": 4, "metric": "steps"}},
     "change: 4 steps with one checkpoint each 4 leave 1 to average, and 2 are wanted; set average.save_every to at "
     "most 3, or train"),
    ({"average": {"save_every": 2, "last": 3}},
     "leave 2 to average, and 3 are wanted; set average.save_every to at most 1"),
    ({"average": {"save_every": 1, "last": 5}}, "leave 4 to average, and 5 are wanted; train for longer"),
    ({"train": {**ROUNDS, "rounds": {"count": 3}}, "merge": {"method": "linear"}},
     "change: 4 steps cannot be shared out among 3 rounds"),
])  # fmt: skip
def test_steps_that_leave_too_little_are_told_before_training_and_by_a_look(recipe_file, tmp_path, changes, message):
    path = recipe_file(**{"train": ROUNDS, **changes})
    with pytest.raises(RsgwmError, match=message):
        run_recipe(load_recipe(path), tmp_path / "out")
    assert not (tmp_path / "out/trained").exists()
    looked = CliRunner().invoke(rsgwm, ["run", str(path), "--dry-run", "--out", str(tmp_path / "look")])
    assert looked.exit_code == 2
    assert message in looked.stderr
    assert not (tmp_path / "look").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"average": {"metric": "validation-loss"}}, "without validation rows; take train-loss"),
    ({"average": {"penalty": 0}}, "penalty = 0"), ({"average": {"save_every": 0}}, "save_every must be at least 1"),
    ({"train": {"rounds": {"count": 2}}, "average": {}, "merge": {"method": "linear"}}, "no checkpoints to average"),
    ({"train": {"rounds": {"count": 2}}}, "share no initialisation; set parameters.space product"),
    ({"train": {"rounds": {"count": 2, "mode": "accumulate"}}}, "share no initialisation; set"),
    ({"train": {"rounds": {"count": 2, "method": "rsgwm"}}, "merge": {"method": "linear"}}, "no tau"),
    ({"train": {"rounds": {"count": 2, "number": 1}}, "merge": {"method": "linear"}}, "trains all of them"),
    ({"train": {"rounds": {"mode": "freeze_a"}}}, "count"), ({"train": {"rounds": {"count": 2, "modes": 1}}}, "modes"),
])  # fmt: skip
def test_what_stops_rounds_and_averages_is_told_first(recipe_file, changes, message):
    with pytest.raises(RsgwmError, match=message):
        load_recipe(recipe_file(**changes))


def test_rounds_with_a_frozen_a_are_merged_by_factors(recipe_file, tmp_path):
    train = {**ROUNDS, "rounds": {"count": 2, "mode": "freeze_a"}}
    path = recipe_file(train=train, evaluate={"items": 2, "timed": 0})  # the recipe's merge is rsgwm, of factors
    run_recipe(load_recipe(path), tmp_path / "out")
    merged, task = (Adapter.load(tmp_path / "out" / name) for name in ("drafter", "pool/change"))
    for name, value in task.init.items():
        assert (merged.weights[name] == value).all().item()


@pytest.mark.parametrize("name", ["rounds", "merged"])
def test_folders_of_rounds_are_no_tasks_of_a_recipe(recipe_file, tmp_path, name):
    data = {"tasks": ["change", str(tmp_path / f"{name}.jsonl")]}
    (tmp_path / f"{name}.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(RsgwmError, match=f"no task can be called {name}"):
        load_recipe(recipe_file(train={"rounds": {"count": 2}}, data=data, merge={"method": "linear"}))


def test_steps_that_rounds_cannot_share_are_told_before_any_training(recipe_file, tmp_path):
    path = recipe_file(train={**ROUNDS, "rounds": {"count": 5}}, merge={"method": "linear"})
    with pytest.raises(RsgwmError, match="cannot be shared out among 5 rounds"):
        run_recipe(load_recipe(path), tmp_path / "out")
    assert not list((tmp_path / "out/pool").glob("*/*"))
