"""Which questions a recipe trains, calibrates and tests on: the same before the first stage as in the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlx_rsgwm.data.corpus import CorpusRow, make_rows
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.row_hashes import RowRecord
from mlx_rsgwm.data.select import Selection, select_questions
from mlx_rsgwm.evaluation.contamination import CalibrationDraw, check_overlap, draw_calibration, rows_fused, union
from mlx_rsgwm.recipes.schema import Recipe, folder_name


def training_rows(recipe: Recipe, task: str) -> tuple[list[CorpusRow], Selection]:
    """The rows of one task's corpus, and the questions that they were made from.

    Raises:
        RsgwmError: too few questions, or too few that a wrong answer can be made for; whatever choosing raises.
    """
    draft_rows, verify_rows = recipe.data.budget(task)
    # Not every solution can be perturbed, so verify rows may need more questions than there are rows.
    wanted = max(draft_rows, 2 * verify_rows)
    chosen = select_questions(task, "train", wanted, recipe.seed, recipe.data.path)
    return make_rows(chosen.questions, draft_rows, verify_rows, recipe.seed), chosen


def mistake_questions(recipe: Recipe, task: str) -> tuple[Selection, int]:
    """What the drafter drafts on for its own mistakes: training questions that the pool is not trained on.

    Where these are too few, some that it is trained on come after them; where those are too few, too, there are fewer.

    Returns:
        The selection, and how many of its questions the pool is trained on.
    """
    assert recipe.own_mistakes is not None
    count = recipe.own_mistakes.items
    rows, chosen = training_rows(recipe, task)
    trained_on = {row.question for row in rows}
    everything = select_questions(task, "train", len(chosen.questions) + count, recipe.seed, recipe.data.path)
    new = [question for question in everything.questions if question.question not in trained_on][:count]
    again = [question for question in everything.questions if question.question in trained_on][: count - len(new)]
    return replace(everything, questions=[*new, *again]), len(again)


def draw_to_calibrate(recipe: Recipe, trained: Mapping[str, RowRecord]) -> CalibrationDraw:
    """The questions to calibrate on; see :func:`~mlx_rsgwm.evaluation.contamination.draw_calibration`."""
    data, allow = recipe.data, recipe.evaluate.allow_overlap
    return draw_calibration(data.tasks, data.calibration_items, recipe.seed, data.path, trained, allow)


def draw_to_test(recipe: Recipe, seen: Mapping[str, RowRecord]) -> dict[str, Selection]:
    """The questions to evaluate on, by task."""
    return {
        task: select_questions(task, "test", recipe.evaluate.items, recipe.seed, recipe.data.path, seen=union(seen))
        for task in recipe.evaluate.tasks or recipe.data.tasks
    }


def rows_ahead(recipe: Recipe) -> dict[str, RowRecord]:
    """What a run of the recipe will train and calibrate on, without any training.

    Raises:
        RsgwmError: calibration questions that are trained on, too; whatever choosing raises.
    """
    seen = rows_fused(recipe.base)
    for task in recipe.data.tasks:
        rows, chosen = training_rows(recipe, task)
        seen[f"data/{folder_name(task)}"] = RowRecord.of((row.question for row in rows), chosen.file_questions)
    for task in recipe.data.tasks if recipe.own_mistakes else ():
        drafted_on = mistake_questions(recipe, task)[0].questions
        seen[f"own_mistakes, {task}"] = RowRecord.of(question.question for question in drafted_on)
    if recipe.data.calibration_items:
        seen["calibration"] = draw_to_calibrate(recipe, seen).record
    return seen


def check_questions(recipe: Recipe) -> None:
    """Find out before any training whether there are questions for every purpose, and new ones.

    Raises:
        RsgwmError: there are not.
    """
    seen = rows_ahead(recipe)
    check_overlap(asked(draw_to_test(recipe, seen)), seen, recipe.evaluate.allow_overlap, "test")


def asked(chosen: Mapping[str, Selection]) -> list[Question]:
    """All questions of the selections."""
    return [question for selection in chosen.values() for question in selection.questions]
