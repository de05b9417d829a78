"""``rsgwm report tables``: the paper's tables, measured here and printed beside its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import OneOf

if TYPE_CHECKING:
    from mlx_rsgwm.evaluation.chosen_questions import ChosenQuestions
    from mlx_rsgwm.evaluation.slices import Slice
    from mlx_rsgwm.models.base import Base
    from mlx_rsgwm.recipes.run import Recipe
    from mlx_rsgwm.studies.paper_tables import Setting


@click.command()
@click.argument("number", type=OneOf(["1", "2", "3"]))
@click.option("--recipe", "source", default="paper", show_default=True, help="Shipped recipe or .yaml to train by.")
@shared.settings("of the recipe, as train.epochs=3")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME:KEY=VALUE",
    help="Another reading of a row of Table 3; repeatable.",
)
@shared.task(required=False, default="the recipe's evaluation tasks")
@shared.items(None, shown="100 in all for Table 1, 20 for 2 and 3")
@shared.sampling_seeds(None, "1 for Table 1; for 2 and 3 the seeds 0, 1, 2")
@shared.timed()
@shared.batch_rows()
@shared.allow_overlap()
@shared.out("a folder for runs and tables", default="runs/tables")
@common_options
def tables(
    console: Console,
    number: str,
    source: str,
    settings: tuple[str, ...],
    variants: tuple[str, ...],
    tasks: tuple[str, ...],
    items: int | None,
    sampling_seeds: int | None,
    timed: int,
    batch_rows: int,
    allow_overlap: bool,
    out: Path,
) -> None:
    """Measure the paper's Table NUMBER (1, 2 or 3) at any base and size, and show where its own arithmetic fails.

    What the rows need is trained first, below --out; run again, it goes on.

    \b
    Examples:
      rsgwm report tables 1 --set data.folder=../data
      rsgwm report tables 2 --recipe demo --items 20 --out runs/small-tables
    """
    from mlx_rsgwm.evaluation.chosen_questions import choose_questions
    from mlx_rsgwm.evaluation.contamination import rows_seen
    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.recipes.run import load_recipe, run_recipe
    from mlx_rsgwm.studies.paper_tables import ROWS

    table = int(number)
    readings = _readings(variants)
    names = dict.fromkeys(row.variant for row in ROWS[table])
    recipes = {name: load_recipe(source, [*settings, *readings[name]]) for name in names}
    default = next(iter(recipes.values()))
    slices = _slices(table, default, tasks, items)
    allow = allow_overlap or default.evaluate.allow_overlap
    _check_ahead(recipes, slices, allow)
    runs = {name: out / _folder(name) for name in recipes}
    for name, recipe in recipes.items():
        console.progress.message(f"{name}: {' '.join(readings[name]) or 'the recipe as it is'}")
        run_recipe(recipe, runs[name], console.progress)
    roles = {f"{name}: {role}": run / role for name, run in runs.items() for role in ("drafter", "verifier")}
    seen = rows_seen(roles, default.base, console.progress)
    chosen = choose_questions(slices, seen, allow, console.progress)
    first, count = (console.seed, sampling_seeds or 1) if table == 1 else (0, sampling_seeds or 3)
    seeds = tuple(range(first, first + count))
    measured = {name: _setting(recipe, runs[name], seeds, timed, batch_rows) for name, recipe in recipes.items()}
    base = load_base(default.base, progress=console.progress)
    _measure(console, table, (base, runs, measured), chosen, out / f"table-{table}")


def _slices(table: int, recipe: Recipe, tasks: tuple[str, ...], items: int | None) -> list[Slice]:
    """What is asked: ``items`` of each task, or the table's number shared out among them."""
    from mlx_rsgwm.evaluation.slices import Slice

    folder = Path(recipe.data.folder) if recipe.data.folder else None
    asked = tasks or recipe.evaluate.tasks or recipe.data.tasks
    per_task = items or max(1, (100 if table == 1 else 20) // len(asked))
    return [Slice(task, per_task, seed=recipe.seed, folder=folder) for task in asked]


def _check_ahead(recipes: dict[str, Recipe], slices: list[Slice], allow_overlap: bool) -> None:
    """Tell what cannot be asked, and what will have been trained on, before hours of training."""
    from mlx_rsgwm.evaluation.chosen_questions import choose_questions
    from mlx_rsgwm.recipes.questions import rows_ahead

    ahead = {f"{name}: {what}": rows for name, recipe in recipes.items() for what, rows in rows_ahead(recipe).items()}
    choose_questions(slices, ahead, allow_overlap)


def _measure(
    console: Console,
    table: int,
    inputs: tuple[Base, dict[str, Path], dict[str, Setting]],
    chosen: ChosenQuestions,
    folder: Path,
) -> None:
    """Measure the table on base, runs and settings; write its pages and print them."""
    from dataclasses import asdict

    from mlx_rsgwm.core.tables import PAGES, aligned, write_page
    from mlx_rsgwm.studies.paper import TITLES
    from mlx_rsgwm.studies.paper_tables import measure_table, table_notes, table_rows

    base, runs, settings = inputs
    recorded = {**asdict(chosen.overlap), "headline": chosen.overlap.headline()}
    measurement = measure_table(table, base, runs, chosen.questions, settings, folder, console.progress, recorded)
    rows, notes, overlap = table_rows(measurement), table_notes(measurement), chosen.overlap.lines()
    for suffix in PAGES:
        write_page(folder / f"table-{table}{suffix}", TITLES[table], [("", rows)], [*overlap, *notes])
    console.line("\n".join([*overlap, TITLES[table]]))
    console.line(aligned(rows))
    console.line("\n".join(notes))
    console.result(measurement)


def _readings(variants: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.studies.paper_tables import VARIANTS

    given: dict[str, tuple[str, ...]] = {}
    for text in variants:
        name, colon, setting = text.partition(":")
        if name not in VARIANTS or not colon or "=" not in setting:
            raise RsgwmError(f"--variant {text!r}: expected NAME:KEY=VALUE with NAME one of {', '.join(VARIANTS)}")
        given[name] = (*given.get(name, ()), setting)
    return {**VARIANTS, **given}


def _folder(name: str) -> str:
    return name.replace(" ", "-")


def _setting(recipe: Recipe, run: Path, seeds: tuple[int, ...], timed: int, batch_rows: int) -> Setting:
    """The recipe's loop, ``auto`` settled by the calibration that its run left."""
    from mlx_rsgwm.inference.calibration import load_calibration, score_and_threshold
    from mlx_rsgwm.studies.paper_tables import Setting

    score, threshold = score_and_threshold(recipe.loop.score, recipe.loop.threshold, load_calibration(run / "verifier"))
    return Setting(recipe.loop.config(score, threshold, recipe.seed), seeds, timed, batch_rows)
