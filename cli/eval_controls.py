"""``rsgwm report controls``: draft–verify against every other way to spend the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH, POSITIVE
from mlx_rsgwm.cli.options.loop import check_option

if TYPE_CHECKING:
    from mlx_rsgwm.evaluation.chosen_questions import ChosenQuestions
    from mlx_rsgwm.evaluation.contamination import CalibrationDraw
    from mlx_rsgwm.evaluation.slices import Slice
    from mlx_rsgwm.models.adapter import Adapter

PAIR = ("drafter", "verifier")


@click.command()
@click.argument("run", type=PATH)
@shared.task(required=False, default="the run's own tasks")
@shared.questions()
@shared.items(50)
@shared.allow_overlap()
@shared.slice_order()
@click.option(
    "--calibration-items",
    type=POSITIVE,
    default=24,
    show_default=True,
    help="Held-out questions of each task for thresholds.",
)
@shared.sampling_seeds(3)
@shared.attempts()
@shared.draft_count(6, "votes may use them all", name="drafts")
@shared.temperature()
@shared.top_p()
@shared.max_tokens(32)
@check_option()
@shared.batch_rows()
@shared.base()
@shared.out("a folder; run again, it goes on", required=True)
@common_options
def controls(
    console: Console,
    run: Path,
    tasks: tuple[str, ...],
    folder: Path | None,
    items: int,
    allow_overlap: bool,
    how: str,
    calibration_items: int,
    sampling_seeds: int,
    attempts: int,
    drafts: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    check: str,
    batch_rows: int,
    base_name: str | None,
    out: Path,
) -> None:
    """Compare draft–verify with its controls, on the drafts of RUN (the folder of a finished rsgwm run).

    Drafter once, self-verification, best of K, majority of K and at equal tokens, accepting by lot, a verifier trained
    on the pairs, a joint adapter, each source adapter, the base; the paper's merge where the run has one; a calculator
    with and without the verifier; every difference with interval and corrected p-value, and how well each verifier
    tells right drafts from wrong ones.

    Example: rsgwm report controls runs/demo --out runs/controls
    """
    from mlx_rsgwm.core.folders import exclusive
    from mlx_rsgwm.evaluation.slices import Slice
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.inference.sampling import Sampling
    from mlx_rsgwm.studies.control_study import ControlPlan, corpora, run_controls

    click.get_current_context().with_resource(exclusive(out))
    trained = list(corpora(run))
    seed = console.seed
    slices = [Slice(task, items, how, seed, folder=folder) for task in tasks or trained]
    drawn, chosen = _choose(console, run, base_name, slices, (trained, calibration_items, folder), allow_overlap)
    plan = ControlPlan(
        run=run,
        out=out,
        questions=tuple(chosen.questions),
        calibration=drawn.questions,
        attempts=attempts,
        drafts=drafts,
        seeds=tuple(range(seed, seed + sampling_seeds)),
        sampling=Sampling(temperature, top_p, max_tokens, seed),
        batch_rows=batch_rows,
        calibration_seed=seed,
        check=check,
    )
    adapters = _checked_pair(console, run)
    summary = run_controls(load_base_for(adapters, base_name, console.progress), plan, console.progress)
    _print_result(console, summary, (*drawn.notes, *chosen.overlap.lines()), out)
    console.result({"overlap": chosen.overlap.headline(), **summary})


def _choose(
    console: Console,
    run: Path,
    base: str | None,
    slices: Sequence[Slice],
    calibration: tuple[Sequence[str], int, Path | None],
    allow_overlap: bool,
) -> tuple[CalibrationDraw, ChosenQuestions]:
    """What to calibrate on (tasks, questions of each, their folder) and what to ask, apart from what the pair saw."""
    from mlx_rsgwm.evaluation.chosen_questions import choose_questions
    from mlx_rsgwm.evaluation.contamination import draw_calibration, rows_seen, rows_trained_on

    pair = {name: run / name for name in PAIR}
    tasks, count, folder = calibration
    seen = rows_seen(pair, base, console.progress)
    trained_on = rows_trained_on(pair, base, console.progress)
    drawn = draw_calibration(tasks, count, console.seed, folder, trained_on, allow_overlap)
    seen["calibration here"] = drawn.record
    return drawn, choose_questions(slices, seen, allow_overlap, console.progress)


def _checked_pair(console: Console, run: Path) -> list[Adapter]:
    """Drafter and verifier of a run, lazily; what is doubtful about them together is said."""
    from mlx_rsgwm.inference.pair import check_pair
    from mlx_rsgwm.models.adapter import Adapter

    adapters = [Adapter.load(run / name, lazy=True, hashes=False) for name in PAIR]
    for doubt in check_pair(*adapters):
        console.progress.warning(f"warning: {doubt}")
    return adapters


def _print_result(console: Console, summary: Mapping[str, Any], notes: Sequence[str], out: Path) -> None:
    from mlx_rsgwm.core.tables import aligned
    from mlx_rsgwm.studies.controls import control_notes, control_rows
    from mlx_rsgwm.studies.judges import judge_rows

    for line in dict.fromkeys(notes):
        console.line(line)
    console.line(aligned(control_rows(summary)))
    console.line(aligned(judge_rows(summary["judges"])))
    console.line("\n".join(control_notes(summary)))
    console.line(f"controls: {out}")
