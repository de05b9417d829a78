"""Stages against every way to be stopped: killed at any write, settings changed, files edited or deleted in between.

The stages here write files that are functions of their settings and inputs, so that hundreds of runs take a second;
the real ones are in test_recipe.
"""

import random
from contextlib import suppress

import pytest

from mlx_rsgwm.core.files import sha256_json
from mlx_rsgwm.recipes import stages
from mlx_rsgwm.recipes.stages import FOLDER, FORMER, Stage, Stages

NAMES = ["data", "train", "merge", "evaluate"]


class Killed(BaseException):
    """Not caught by anything that catches errors."""


def run(out, settings, writes=10**6):
    """Four stages, each reading all files of the one before; killed after ``writes`` writes of anything."""
    left = writes

    def spend():
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1

    def work(name, folder, source):
        def do():
            read = "".join(file.read_text() for file in sorted(source.rglob("*")) if file.is_file()) if source else ""
            for index in range(2 + (settings[name] > 1)):  # one file more or less, by the settings
                spend()
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{index}.txt").write_text(sha256_json([settings[name], index, read]))
            spend()  # done, and killed before it is written down

        return do

    records, source = Stages(out), None
    for name in NAMES:
        folder = out / name
        inputs = (source,) if source else ()
        records.run(Stage(name, {"value": settings[name]}, inputs, (folder,), work(name, folder, source)))
        source = folder
        spend()
    return records.executed


def contents(out):
    return {
        path.relative_to(out).as_posix(): path.read_text()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent.name != FOLDER and FORMER not in path.parts
    }


def test_a_second_run_does_nothing(tmp_path):
    settings = dict.fromkeys(NAMES, 1)
    assert run(tmp_path, settings) == NAMES
    assert run(tmp_path, settings) == []
    assert run(tmp_path, {**settings, "merge": 2}) == ["merge", "evaluate"]


@pytest.mark.parametrize("writes", range(17))
@pytest.mark.parametrize("changed", NAMES)
def test_killed_with_other_settings_and_run_again(tmp_path, writes, changed):
    settings = dict.fromkeys(NAMES, 1)
    run(tmp_path / "whole", settings)
    run(tmp_path / "out", settings)
    with suppress(Killed):
        run(tmp_path / "out", {**settings, changed: 2}, writes)
    run(tmp_path / "out", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("seed", range(60))
def test_any_history_ends_in_the_same_files(tmp_path, seed):
    rng = random.Random(seed)
    out = tmp_path / "out"
    for _ in range(6):
        settings = {name: rng.choice([1, 1, 2]) for name in NAMES}
        with suppress(Killed):
            run(out, settings, rng.randrange(25))
        files = [out / name for name in contents(out)]
        for file in rng.sample(files, k=min(len(files), rng.randrange(3))):
            file.unlink() if rng.random() < 0.5 else file.write_text(rng.choice(["", "{}", "edited"]))
    run(out, settings)
    run(tmp_path / "whole", settings)
    assert contents(out) == contents(tmp_path / "whole")
    assert run(out, settings) == []


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"key": 1, "outputs": 2}', None])
def test_without_its_record_a_stage_is_done_again(tmp_path, damage):
    settings = dict.fromkeys(NAMES, 1)
    run(tmp_path, settings)
    written = contents(tmp_path)
    for record in (tmp_path / FOLDER).iterdir():
        record.unlink() if damage is None else record.write_text(damage)
    assert run(tmp_path, settings) == NAMES
    assert contents(tmp_path) == written
    (tmp_path / "merge" / "0.txt").write_text("edited")
    assert run(tmp_path, settings) == ["merge"]
    assert contents(tmp_path) == written


def test_files_of_others_are_left_alone(tmp_path):
    """A record is a file too: what it names outside the run's folder is not removed."""
    (tmp_path / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data" / "notes.txt").write_text("mine")
    settings = dict.fromkeys(NAMES, 1)
    run(out, settings)
    record = out / FOLDER / "data.json"
    record.write_text('{"key": "", "seconds": 0, "outputs": {"../mine.txt": "", "%s": ""}}' % (tmp_path / "mine.txt"))
    run(out, {**settings, "data": 2})
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (out / "data" / "notes.txt").read_text() == "mine"


def former(out):
    return {
        path.relative_to(out / FORMER).as_posix(): path.read_text()
        for path in sorted((out / FORMER).rglob("*"))
        if path.is_file()
    }


def test_what_a_finished_stage_wrote_goes_only_once_it_is_done_again(tmp_path):
    settings = dict.fromkeys(NAMES, 1)
    run(tmp_path, settings)
    written = contents(tmp_path)
    (tmp_path / "train" / "0.txt").unlink()
    (tmp_path / "train" / "1.txt").write_text("edited")
    (tmp_path / "merge" / "1.txt").write_text("edited too")
    with suppress(Killed):
        run(tmp_path, settings, 2)  # within train
    assert former(tmp_path) == {"train/train/1.txt": "edited"}
    with suppress(Killed):
        run(tmp_path, {**settings, "merge": 2}, 5)  # within merge
    assert former(tmp_path) == {
        "train/train/1.txt": "edited",
        "merge/merge/0.txt": written["merge/0.txt"],
        "merge/merge/1.txt": "edited too",
    }
    run(tmp_path, settings)
    assert contents(tmp_path) == written
    assert former(tmp_path) == {"train/train/1.txt": "edited", "merge/merge/1.txt": "edited too"}
    (tmp_path / "train" / "1.txt").write_text("edited again")
    run(tmp_path, settings)
    assert former(tmp_path)["train/train/1.txt.1"] == "edited again"


@pytest.mark.parametrize("moment", ["before a move", "within the moves", "before the removal", "within the removal"])
def test_no_former_file_outlives_a_run_that_was_killed_around_it(tmp_path, monkeypatch, moment):
    settings = dict.fromkeys(NAMES, 1)
    run(tmp_path, settings)
    changed = {**settings, "merge": 2}
    calls = []
    target, name = (
        (stages, "_move") if "move" in moment and "removal" not in moment else (stages.Stages, "_remove_empty")
    )
    real = getattr(target, name)

    def killing(*arguments):
        calls.append(arguments)
        # merge's two files are moved, and thereby two folders looked at, before two are removed
        if len(calls) == {"before a move": 1, "within the moves": 2, "within the removal": 3}.get(moment):
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(target, name, killing)
    if moment == "before the removal":
        monkeypatch.setattr(stages.Stages, "_remove", lambda *arguments: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(tmp_path, changed)
    monkeypatch.undo()
    run(tmp_path, changed)
    assert former(tmp_path) == {}
    fresh = tmp_path.with_name("fresh")
    run(fresh, changed)
    assert contents(tmp_path) == contents(fresh)


def test_what_a_stage_goes_on_from_stays_where_it_is_intact(tmp_path):
    seen = []

    def work():
        journal = tmp_path / "report" / "items.jsonl"
        seen.append(journal.read_text() if journal.is_file() else None)
        journal.parent.mkdir(exist_ok=True)
        if seen[-1] != "items":
            journal.write_text("items")
        (tmp_path / "report" / "report.html").write_text("page")

    def evaluate(value):
        stage = Stage("evaluate", {"value": value}, (), (tmp_path / "report",), work, resumed=("items.jsonl",))
        stages = Stages(tmp_path)
        stages.run(stage)
        return stages.executed

    page = tmp_path / "report" / "report.html"
    assert evaluate(1) == ["evaluate"]
    page.write_text("edited")
    assert evaluate(1) == ["evaluate"]
    assert page.read_text() == "page"
    assert evaluate(1) == []
    (tmp_path / "report" / "items.jsonl").write_text("edited")
    evaluate(1)
    evaluate(2)
    assert seen == [None, "items", None, None]
