"""``rsgwm eval``: the drafter alone and draft–verify on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.loop_options import build_pipeline, loop_options

if TYPE_CHECKING:
    from mlx_rsgwm.pipeline.calibration import Calibration
    from mlx_rsgwm.pipeline.loop import DraftVerify


@click.command(name="eval")
@click.option("--task", "tasks", multiple=True, required=True, help="Family, data set or .jsonl file; repeatable.")
@click.option(
    "--data", "folder", type=click.Path(path_type=Path), help="Folder with <task>/<split>.jsonl; default: Hub."
)
@click.option("--split", help="Split of a data set; default: the one to report on.")
@click.option("--limit", default=100, show_default=True, help="Items of each task, the first ones.")
@click.option("--timed", default=12, show_default=True, help="Items also run one by one for the latency figures.")
@click.option("--batch-rows", default=32, show_default=True, help="Drafts made at a time.")
@click.option("--out", type=click.Path(path_type=Path), help="Report folder to write.")
@loop_options
@common_options
def evaluate(
    console: Console,
    tasks: tuple[str, ...],
    folder: Path | None,
    split: str | None,
    limit: int,
    timed: int,
    batch_rows: int,
    out: Path | None,
    **loop: object,
) -> None:
    """Evaluate a drafter and a verifier: the rows of the paper's Table 1, each rate with n and its interval.

    Example: rsgwm eval --base smollm2-135m --drafter runs/demo/drafter --verifier runs/demo/verifier
    --task gsm8k --data ../data --limit 20
    """
    from dataclasses import asdict

    from mlx_rsgwm.data.tasks import questions_for
    from mlx_rsgwm.errors import RsgwmError
    from mlx_rsgwm.evaluation.harness import calibrate
    from mlx_rsgwm.evaluation.harness import evaluate as run_items
    from mlx_rsgwm.evaluation.report import render_table, summarise, write_report

    for name, value in (("--limit", limit), ("--batch-rows", batch_rows)):
        if value < 1:
            raise RsgwmError(f"{name} must be at least 1, found {value}")
    questions = [q for task in tasks for q in questions_for(task, "test", limit, console.seed, folder, split=split)]

    def calibrate_here(pipeline: DraftVerify) -> Calibration:
        count = max(4, 24 // len(tasks))
        held_out = [q for task in tasks for q in questions_for(task, "calibration", count, console.seed, folder)]
        return calibrate(pipeline, held_out, console.seed, batch_rows, console.progress)

    pipeline = build_pipeline(console, loop, calibrate_here)
    records = run_items(pipeline, questions, max(timed, 0), batch_rows, console.progress)
    metadata = {
        "base": pipeline.slots.base.describe(),
        "template": pipeline.template.describe(),
        "drafter": str(loop["drafter"]),
        "verifier": str(loop["verifier"]),
        "tasks": list(tasks),
        "limit": limit,
        "seed": console.seed,
        "loop": asdict(pipeline.config),
        "batch_rows": batch_rows,
    }
    attempts = pipeline.config.attempts
    if out is not None:
        summary = write_report(out, records, attempts, metadata, seed=console.seed, progress=console.progress)
    else:
        summary = summarise(records, attempts, metadata, seed=console.seed)
    console.line(render_table(summary))
    if out is not None:
        console.line(f"report: {out}")
    console.result({**summary["draft_verify"], **{key: summary[key] for key in summary if key != "draft_verify"}})
