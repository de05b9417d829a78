"""What a run of a recipe would do, and roughly for how long: tokens counted, speed measured on this machine.

The speed is that of one forward pass and of a few decoded tokens, seconds in all. Answers are taken to be as long as
those that are trained on.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import mean
from typing import Any

import mlx.core as mx

from mlx_rsgwm.core.progress import shown_time
from mlx_rsgwm.inference.scores import SCORES
from mlx_rsgwm.recipes import own_mistakes
from mlx_rsgwm.recipes.questions import training_rows
from mlx_rsgwm.recipes.run import RecipeRun
from mlx_rsgwm.recipes.schema import Recipe, folder_name
from mlx_rsgwm.recipes.train_stages import check_steps

BACKWARD = 3.0  # a training step in forward passes of its tokens
STEPS = 4  # decoded tokens that are timed
FIXED = 10.0  # seconds to load the base, convert, or compare: what no count of tokens tells


@dataclass(frozen=True)
class Speed:
    """Seconds for a token that is read, and for a step that writes one token in each of ``rows`` rows."""

    token: float
    step: float
    rows: int


def forecast(run: RecipeRun) -> dict[str, float | None]:
    """Seconds that each stage of the run would take, by its name and in order; None for one that is done.

    Raises:
        RsgwmError: what would stop the run once it has its questions.
    """
    ahead = run.stages_ahead()
    lengths = {task: _lengths(run, task) for task in run.recipe.data.tasks}
    prompt, answer = (mean(task_lengths[place] for task_lengths in lengths.values()) for place in (1, 2))
    speed = _measure(run.base.model, round(prompt + answer), run.recipe.evaluate.batch_rows)
    seconds = {f"train-{folder_name(task)}": told[0] * BACKWARD * speed.token for task, told in lengths.items()}
    seconds["train-in-rounds"] = sum(seconds.values())
    if section := run.recipe.own_mistakes:
        count = len(lengths) * section.items * section.attempts
        seconds[own_mistakes.DRAFT] = FIXED / 2 + count * (prompt * speed.token + answer * speed.step / speed.rows)
        tokens = len(lengths) * section.rows * section.epochs * (prompt + answer)
        seconds[own_mistakes.TRAIN] = tokens * BACKWARD * speed.token
    items = {
        "calibrate": len(lengths) * run.recipe.data.calibration_items,
        "evaluate": len(run.recipe.evaluate.tasks or lengths) * run.recipe.evaluate.items,
    }
    drafts = run.recipe.loop.config(SCORES[0], 0.5, 0).most
    for name, count in items.items():
        seconds[name] = FIXED / 2 + count * drafts * _draft_seconds(prompt, answer, speed)
    timed = run.recipe.evaluate.timed * 2 * (prompt * speed.token + answer * speed.step)
    seconds["evaluate"] += timed
    seconds["export"] = FIXED * (3 if run.recipe.export.parity else 1)
    return {name: None if done else seconds.get(name, seconds.get(_plain(name), 1.0)) for name, done in ahead.items()}


def _plain(name: str) -> str:
    """A stage's name without what says for which pair."""
    return name.removesuffix("-paper").removesuffix(own_mistakes.SUFFIX)


def _lengths(run: RecipeRun, task: str) -> tuple[int, float, float]:
    """Tokens of a task's training, and the mean tokens of a question and of an answer."""
    rows, _ = training_rows(run.recipe, task)
    check_steps(run, task, rows)
    encode = run.base.tokenizer.encode
    questions, texts = [len(encode(row.question)) for row in rows], [len(encode(row.answer)) for row in rows]
    return sum(questions + texts) * _epochs(run.recipe, len(rows)), mean(questions), mean(texts)


def _epochs(recipe: Recipe, rows: int) -> int:
    if not recipe.train.steps:
        return recipe.train.epochs
    return math.ceil(recipe.train.steps * recipe.train.batch_size / rows)


def _draft_seconds(prompt: float, answer: float, speed: Speed) -> float:
    """One draft, written beside others and read twice by the verifier."""
    return (3 * prompt + 2 * answer) * speed.token + answer * speed.step / speed.rows


def _measure(model: Any, length: int, rows: int) -> Speed:
    def seconds(shape: tuple[int, int], times: int) -> float:
        mx.eval(model(mx.zeros(shape, mx.int32)))  # not timed: compiles
        started = time.perf_counter()
        for _ in range(times):
            mx.eval(model(mx.zeros(shape, mx.int32)))
        return (time.perf_counter() - started) / times

    batch = (8, max(8, length))
    return Speed(seconds(batch, 1) / (batch[0] * batch[1]), seconds((rows, 1), STEPS), rows)


def duration(seconds: float) -> str:
    """``about 40 s``, ``about 12 min``, ``about 3.5 h``."""
    return f"about {shown_time(seconds)}"
