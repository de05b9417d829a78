"""``rsgwm report controls``: draft–verify against every other way to spend the same tokens."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options.paths import PATH


@click.command()
@click.argument("run", type=PATH)
@click.option("--task", "tasks", multiple=True, help="What to ask; default: the run's own tasks.")
@click.option("--data", "folder", type=PATH, help="Folder with <task>/<split>.jsonl; default: Hub.")
@click.option("--limit", default=50, show_default=True, help="Items of each task.")
@click.option("--allow-overlap", is_flag=True, help="Ask what adapters were trained on, too; the result says so.")
@click.option("--slice", "how", default="first", show_default=True, help="first, or seeded: shuffled by --seed.")
@click.option("--calibration-items", default=24, show_default=True, help="Held-out items of each task for thresholds.")
@click.option("--sampling-seeds", default=3, show_default=True, help="Passes over the items, from --seed upwards.")
@click.option("--attempts", default=3, show_default=True, help="K: drafts in all, the first included.")
@click.option("--drafts", default=6, show_default=True, help="Drafts recorded per item; votes may use them all.")
@click.option("--temperature", default=0.7, show_default=True)
@click.option("--top-p", default=0.9, show_default=True)
@click.option("--max-tokens", default=32, show_default=True, help="Longest draft.")
@click.option("--batch-rows", default=32, show_default=True, help="Drafts made at a time.")
@click.option(
    "--base", "base_name", help="Hub id, folder, .gguf or alias.  [default: the one that RUN's adapters record]"
)
@click.option("--out", type=PATH, required=True, help="Folder to write; run again, it goes on.")
@common_options
def controls(
    console: Console,
    run: Path,
    tasks: tuple[str, ...],
    folder: Path | None,
    limit: int,
    allow_overlap: bool,
    how: str,
    calibration_items: int,
    sampling_seeds: int,
    attempts: int,
    drafts: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    batch_rows: int,
    base_name: str | None,
    out: Path,
) -> None:
    """Compare draft–verify with its controls, on the drafts of RUN (the folder of a finished rsgwm run).

    Drafter once, self-verification, best of K, majority of K and at equal tokens, accepting by lot, a verifier trained
    on the pairs, a joint adapter, each source adapter, the base; every difference with interval and corrected p-value.

    Example: rsgwm report controls runs/demo --out runs/controls
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.folders import exclusive
    from mlx_rsgwm.core.tables import aligned
    from mlx_rsgwm.evaluation.contamination import check_overlap, draw_calibration, rows_seen, rows_trained_on, union
    from mlx_rsgwm.evaluation.slices import Slice, read_slice
    from mlx_rsgwm.inference.open import check_pair, load_base_for
    from mlx_rsgwm.inference.sampling import Sampling
    from mlx_rsgwm.models.adapter import Adapter
    from mlx_rsgwm.studies.control_study import ControlPlan, corpora, run_controls
    from mlx_rsgwm.studies.controls import control_notes, control_rows

    for name, value in (("--sampling-seeds", sampling_seeds), ("--batch-rows", batch_rows)):
        if value < 1:
            raise RsgwmError(f"{name} must be at least 1, found {value}")
    click.get_current_context().with_resource(exclusive(out))
    trained = list(corpora(run))
    seed = console.seed
    pair = {name: run / name for name in ("drafter", "verifier")}
    seen = rows_seen(pair, base_name, console.progress)
    known = rows_trained_on(pair, base_name, console.progress)
    drawn = draw_calibration(trained, calibration_items, seed, folder, known, allow_overlap)
    seen["calibration here"] = drawn.record
    slices = [read_slice(Slice(task, limit, how, seed, folder=folder), union(seen)) for task in tasks or trained]
    asked = [question for questions, _ in slices for question in questions]
    overlap = check_overlap(asked, seen, allow_overlap, "test")
    plan = ControlPlan(
        run=run,
        out=out,
        questions=tuple(asked),
        calibration=drawn.questions,
        attempts=attempts,
        drafts=drafts,
        seeds=tuple(range(seed, seed + sampling_seeds)),
        sampling=Sampling(temperature, top_p, max_tokens, seed),
        batch_rows=batch_rows,
        calibration_seed=seed,
    )
    adapters = [Adapter.load(path, lazy=True, hashes=False) for path in pair.values()]
    for doubt in check_pair(*adapters):
        console.warn(doubt)
    summary = run_controls(load_base_for(adapters, base_name, console.progress), plan, console.progress)
    for line in dict.fromkeys((*drawn.notes, *overlap.lines())):
        console.line(line)
    console.line(aligned(control_rows(summary)))
    console.line("\n".join(control_notes(summary)))
    console.line(f"controls: {out}")
    console.result({"overlap": overlap.headline(), **summary})
