"""``rsgwm eval``: the drafter alone and draft–verify on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.loop import build_pipeline, load_pair, loop_options

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping, Sequence

    from mlx_rsgwm.core.distributed import Processes
    from mlx_rsgwm.core.progress import Progress
    from mlx_rsgwm.evaluation.chosen_questions import ChosenQuestions
    from mlx_rsgwm.evaluation.contamination import CalibrationDraw
    from mlx_rsgwm.evaluation.slices import Slice
    from mlx_rsgwm.inference.calibration import Calibration
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.models.adapter import Adapter


@click.command(name="eval")
@shared.task()
@shared.questions()
@shared.split("the one to report on")
@shared.revision("a data set's newest, which is recorded")
@shared.items(100)
@shared.slice_order()
@shared.sampling_seeds(1)
@shared.draft_count(None, "for pass@k and maj@k", "--attempts")
@shared.corpus("to check the questions against; repeatable", multiple=True, name="train_data")
@shared.allow_overlap()
@click.option("--refusal", metavar="REGEX", help="Wording of a refusal, instead of the built-in one.")
@shared.timed()
@shared.batch_rows()
@shared.out("a report folder; run again, it goes on")
@loop_options()
@common_options
def evaluate(
    console: Console,
    tasks: tuple[str, ...],
    folder: Path | None,
    split: str | None,
    revision: str | None,
    items: int,
    how: str,
    sampling_seeds: int,
    draft_count: int | None,
    train_data: tuple[Path, ...],
    allow_overlap: bool,
    refusal: str | None,
    timed: int,
    batch_rows: int,
    out: Path | None,
    **loop: Any,
) -> None:
    """Evaluate a drafter and a verifier: the rows of the paper's Table 1, each rate with n and its interval.

    Under mlx.launch the items are shared out among the processes, batch by batch: the result is that of one process,
    whatever their number, and --out is needed.

    Items that the adapters were trained or calibrated on are refused. A file of your own is asked whole, unless the
    adapters have seen rows of it: then its test share is asked (a row's content decides its share).

    Example: rsgwm eval --base smollm2-135m --drafter runs/demo/drafter --verifier runs/demo/verifier
    --task gsm8k --questions ../data --items 20 --out runs/gsm8k
    """
    from mlx_rsgwm.core.progress import SILENT
    from mlx_rsgwm.evaluation.answers import REFUSAL
    from mlx_rsgwm.evaluation.contamination import contamination, training_questions
    from mlx_rsgwm.evaluation.reported_run import report_run
    from mlx_rsgwm.evaluation.runner import describe_run
    from mlx_rsgwm.evaluation.slices import Slice

    wording = REFUSAL if refusal is None else _pattern(refusal)
    processes = _processes_with_lock(out)
    progress = console.progress if processes.writes else SILENT
    slices = [Slice(task, items, how, console.seed, split, folder, revision) for task in tasks]
    drafter, verifier = load_pair(console, loop)
    drawn, chosen = _choose(drafter, verifier, loop, slices, allow_overlap, progress)
    checked = contamination(chosen.questions, training_questions(train_data)) if train_data else None
    pipeline = build_pipeline(
        console,
        {**loop, "drafter": drafter, "verifier": verifier},
        _calibrating_here(drawn, console.seed, batch_rows, progress),
    )
    seeds = tuple(range(console.seed, console.seed + sampling_seeds))
    about = describe_run(
        pipeline, chosen.questions, batch_rows, seeds=seeds, drafts=draft_count, timed=timed, refusal=wording.pattern
    )
    metadata = {
        "drafter": str(loop["drafter"]),
        "verifier": ", ".join(map(str, loop["verifier"])),
        "tasks": chosen.told,
        "contamination": checked,
    }
    summary = report_run(
        pipeline, chosen.questions, about, chosen.overlap, out, timed=timed, batch_rows=batch_rows, seeds=seeds,
        drafts=draft_count, refusal=wording, seed=console.seed, metadata=metadata, progress=progress,
        processes=processes,
    )  # fmt: skip
    if summary is not None:
        _print_result(console, summary, out)


def _choose(
    drafter: Adapter,
    verifier: tuple[Adapter, ...],
    loop: Mapping[str, Any],
    slices: Sequence[Slice],
    allow_overlap: bool,
    progress: Progress,
) -> tuple[CalibrationDraw, ChosenQuestions]:
    """What to calibrate on here and what to ask, both apart from what the pair has seen; their notes are shown."""
    from mlx_rsgwm.evaluation.chosen_questions import choose_questions, draw_to_calibrate_here, rows_seen_by
    from mlx_rsgwm.evaluation.contamination import rows_seen
    from mlx_rsgwm.inference.routed import load_routed

    seen = rows_seen_by(drafter, verifier, loop["combine"], loop["base_name"], progress)
    if loop["router"] is not None:
        seen |= rows_seen(load_routed(loop["router"], loop["base_name"]).adapters, loop["base_name"], progress)
    drawn = draw_to_calibrate_here(
        [part.task for part in slices], verifier, loop["score"], loop["combine"], seen,
        seed=slices[0].seed, folder=slices[0].folder, allow_overlap=allow_overlap,
    )  # fmt: skip
    if drawn.questions:
        seen["calibration here"] = drawn.record
    chosen = choose_questions(slices, seen, allow_overlap, progress)
    for line in dict.fromkeys((*drawn.notes, *chosen.overlap.lines())):
        progress.message(line)
    return drawn, chosen


def _calibrating_here(
    drawn: CalibrationDraw, seed: int, batch_rows: int, progress: Progress
) -> Callable[[DraftVerify], Calibration] | None:
    """What makes a calibration on the questions drawn; None where none were."""
    from mlx_rsgwm.evaluation.calibration_set import calibrate

    if not drawn.questions:
        return None
    return lambda pipeline: calibrate(pipeline, drawn.questions, seed, batch_rows, progress)


def _print_result(console: Console, summary: dict[str, Any], out: Path | None) -> None:
    from mlx_rsgwm.evaluation.report.folder import render_table

    console.line(render_table(summary))
    if out is not None:
        console.line(f"report: {out}")
    console.result({**summary["draft_verify"], **{key: summary[key] for key in summary if key != "draft_verify"}})


def _processes_with_lock(out: Path | None) -> Processes:
    """The processes of this run; the first of them holds the lock of ``out`` until the command ends."""
    from mlx_rsgwm.core.distributed import launched_processes
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.folders import exclusive

    processes = launched_processes()
    if out is None and processes.size > 1:
        raise RsgwmError("under mlx.launch give --out, where every process keeps its share")
    if out is not None and processes.writes:
        click.get_current_context().with_resource(exclusive(out))
    processes.wait()  # whoever locks the folder clears half-written files out of it
    return processes


def _pattern(text: str) -> re.Pattern[str]:
    import re

    from mlx_rsgwm.core.errors import RsgwmError

    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise RsgwmError(f"--refusal {text!r} is not a regular expression: {error}") from None
