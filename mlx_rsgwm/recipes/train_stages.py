"""The stages of a recipe that make its pool: corpora, training (in rounds, if asked for), averages of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.corpus import Corpus, CorpusRow, load_corpus, save_corpus
from mlx_rsgwm.data.question_files import is_question_file
from mlx_rsgwm.merging.alternate import FOLDER as ROUNDS_FOLDER
from mlx_rsgwm.merging.alternate import render_rounds, train_rounds
from mlx_rsgwm.recipes.questions import training_rows
from mlx_rsgwm.recipes.schema import folder_name
from mlx_rsgwm.recipes.stages import Stage
from mlx_rsgwm.training.averaging import average_run
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.loop import finish, plan_of, train
from mlx_rsgwm.training.pool import Member

if TYPE_CHECKING:
    from mlx_rsgwm.recipes.run import RecipeRun


def train_stages(run: RecipeRun) -> list[Stage]:
    """All data before all training, so that too few questions are told at once."""
    tasks = run.recipe.data.tasks
    data = [_data_stage(run, task) for task in tasks]
    if run.recipe.train.rounds:
        return [*data, _rounds_stage(run)]
    training = [_train_stage(run, task) for task in tasks]
    averages = [_average_stage(run, task) for task in tasks] if run.recipe.average else []
    return [*data, *training, *averages]


def _data_stage(run: RecipeRun, task: str) -> Stage:
    recipe = run.recipe
    settings = {
        **run.shared(),
        "task": task,
        "budget": recipe.data.budget(task),
        "folder": recipe.data.folder,
        "files": run.hashes([task]),
        **({"split": "by content"} if is_question_file(task) else {}),
    }
    return Stage(f"data-{folder_name(task)}", settings, (), (run.corpus(task),), partial(_data, run, task))


def _train_stage(run: RecipeRun, task: str) -> Stage:
    recipe = run.recipe
    section = recipe.average
    checkpoints = {"save_every": section.save_every, "keep": section.keep} if section else {}
    settings = {**run.shared(), "task": task, "config": recipe.train.describe(), **checkpoints}
    work = partial(_train, run, task)
    return Stage(f"train-{folder_name(task)}", settings, (run.corpus(task),), (_trained(run, task),), work)


def _average_stage(run: RecipeRun, task: str) -> Stage:
    """``average`` is all of its settings; checkpoints are files of the run."""
    assert run.recipe.average is not None
    settings = {**run.shared(), "task": task, "average": vars(run.recipe.average)}
    work = partial(_average, run, task)
    return Stage(f"average-{folder_name(task)}", settings, (_trained(run, task),), (run.adapter(task),), work)


def _rounds_stage(run: RecipeRun) -> Stage:
    recipe = run.recipe
    tasks, rounds = recipe.data.tasks, recipe.train.rounds
    assert rounds is not None
    outputs = (*(run.adapter(task) for task in tasks), run.out / "pool" / ROUNDS_FOLDER)
    return Stage(
        "train-in-rounds",
        {**run.shared(), "tasks": tasks, "config": recipe.train.describe()},
        tuple(run.corpus(task) for task in tasks),
        outputs,
        partial(_train_rounds, run),
        pieces=len(tasks) * rounds.count,
    )


def _trained(run: RecipeRun, task: str) -> Path:
    """Where a task is trained: in the pool, or beside it where the pool has averages."""
    return run.out / "trained" / folder_name(task) if run.recipe.average else run.adapter(task)


def _data(run: RecipeRun, task: str) -> None:
    rows, chosen = training_rows(run.recipe, task)
    if chosen.note(task):
        run.progress.message(chosen.note(task))
    check_steps(run, task, rows)
    about = {"seed": run.recipe.seed, "task": task, "split": chosen.split}
    save_corpus(run.corpus(task), rows, run.template, about, chosen.file_questions)


def _train(run: RecipeRun, task: str) -> None:
    corpus, section = load_corpus(run.corpus(task)), run.recipe.average
    # Of another run only checkpoints can be here, of one that was killed; they are used if they are of this run.
    saving = Saving(_trained(run, task), resume="replace")
    if section:
        saving = Saving(saving.folder, section.save_every, section.keep, resume="replace")
    adapter = train(run.base, corpus, run.recipe.train, label=f"train {task}", progress=run.progress, saving=saving)
    adapter.manifest["task"] = task
    finish(adapter, saving)


def check_steps(run: RecipeRun, task: str, rows: Sequence[CorpusRow]) -> None:
    """Find out before any training whether a task's steps do for the rounds, or leave what is averaged.

    Raises:
        RsgwmError: steps that the rounds cannot share, fewer checkpoints than two or than ``average.last``.
    """
    config, section = run.recipe.train, run.recipe.average
    if not config.rounds and not section:
        return
    tokens, _ = Corpus(tuple(rows), run.template, {}).token_rows(
        run.base.tokenizer, config.max_tokens, config.long_rows
    )
    try:
        steps = len(plan_of(tokens, replace(config, rounds=config.rounds.at(1)) if config.rounds else config))
    except RsgwmError as error:
        raise RsgwmError(f"{task}: {error}") from error
    if section is None:
        return
    wanted, every = section.last or 2, section.save_every
    checkpoints = -(-steps // every)  # the last step has one, too
    if checkpoints < wanted:
        advice = f"set average.save_every to at most {(steps - 1) // (wanted - 1)}, or " if steps >= wanted else ""
        raise RsgwmError(
            f"{task}: {steps} steps with one checkpoint each {every} leave {checkpoints} to average, and "
            f"{wanted} are wanted; {advice}train for longer"
        )


def _average(run: RecipeRun, task: str) -> None:
    section = run.recipe.average
    assert section is not None
    adapter = average_run([_trained(run, task)], lambda _: (section, None), run.adapter(task), progress=run.progress)
    run.progress.detail(f"{task}: the average is worth {adapter.manifest['average']['effective']:.2f} checkpoints")


def _train_rounds(run: RecipeRun) -> None:
    names = [folder_name(task) for task in run.recipe.data.tasks]
    members = [Member(name, load_corpus(run.out / "data" / name)) for name in names]
    saving = Saving(run.out / "pool", resume="replace")
    records = train_rounds(run.base, names, members, run.recipe.train, saving, progress=run.progress)
    run.progress.detail(render_rounds(records))
