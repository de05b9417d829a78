"""``rsgwm pool sweep``: one pool merged by many methods, ranked on held-out items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PAIR, POSITIVE, SOURCE

if TYPE_CHECKING:
    from mlx_rsgwm.core.progress import Progress
    from mlx_rsgwm.data.questions import Question
    from mlx_rsgwm.data.row_hashes import RowRecord
    from mlx_rsgwm.data.select import Selection
    from mlx_rsgwm.evaluation.contamination import Overlap
    from mlx_rsgwm.studies.merge_sweep import Measured


@click.command(name="sweep")
@click.argument("pool", nargs=-1, required=True, type=SOURCE)
@shared.methods("values with / make one each, 'all' is every method", "all, and rsgwm's readings")
@shared.task(required=False, default="the pool's tasks")
@shared.questions()
@shared.split("the one to report on")
@shared.allow_overlap()
@shared.items(24, "held-out ones")
@click.option("--judged", type=POSITIVE, help="Questions of each task whose answers verifiers score.  [default: all]")
@click.option(
    "--with",
    "extras",
    type=PAIR,
    multiple=True,
    metavar="NAME=FOLDER",
    help="Another adapter beside the merges; repeatable.",
)
@shared.base()
@shared.template()
@shared.weight()
@shared.rank("each method's usual one")
@shared.max_tokens(None, "twice the longest gold answer")
@shared.batch_rows()
@shared.out("the sweep's folder; run again to resume or to add merges", default="runs/merge-sweep")
@common_options
def merge_sweep(
    console: Console,
    pool: tuple[Path | str, ...],
    methods: tuple[str, ...],
    tasks: tuple[str, ...],
    folder: Path | None,
    split: str | None,
    allow_overlap: bool,
    items: int,
    judged: int | None,
    extras: tuple[str, ...],
    base_name: str | None,
    template_name: str | None,
    weights: tuple[float, ...],
    rank: int | None,
    max_tokens: int | None,
    batch_rows: int,
    out: Path,
) -> None:
    """Merge POOL by many methods and rank them on held-out items.

    Every merge drafts greedily, is scored on gold answers, and judges the same labelled answers as a verifier. The
    pool's own adapters and the base stand beside them. What was measured is kept: Ctrl-C loses one merge at most, and
    the same command goes on. Under mlx.launch the merges are shared out among the processes.

    \b
    Examples:
      rsgwm pool sweep runs/demo/pool/*
      rsgwm pool sweep pool/* --methods linear,ties:density=0.2/0.5 --methods rsgwm:space=product,tau=0.3/0.5
      rsgwm pool sweep pool/* --task change --task held_out.jsonl --items 50 --with joint=joint --out runs/sweep
      mlx.launch -n 2 -- rsgwm pool sweep pool/* --out runs/sweep
    """
    from mlx_rsgwm.core.distributed import launched_processes
    from mlx_rsgwm.core.folders import exclusive
    from mlx_rsgwm.core.progress import SILENT
    from mlx_rsgwm.data.select import select_questions
    from mlx_rsgwm.evaluation.contamination import rows_seen, union
    from mlx_rsgwm.inference.open import find_base, template_of
    from mlx_rsgwm.models.adapter_sources import load_adapter, load_adapters
    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.studies.merge_sweep import Plan, Sweep, tasks_of_pool
    from mlx_rsgwm.studies.sweep_variants import DEFAULT_METHODS, parse_variants

    processes = launched_processes()
    if processes.writes:
        click.get_current_context().with_resource(exclusive(out))
    progress = console.progress if processes.writes else SILENT
    variants = parse_variants(methods or DEFAULT_METHODS)
    adapters = load_adapters(pool, base_name, progress=console.progress)
    beside = {name: load_adapter(source, base_name, progress=console.progress) for name, source in _extras(extras)}
    seen = rows_seen({f"pool/{adapter.name}": adapter for adapter in adapters} | beside, base_name, console.progress)
    chosen = {
        task: select_questions(task, "test", items, console.seed, folder, split=split, seen=union(seen))
        for task in tasks or tasks_of_pool(adapters)
    }
    questions, overlap = _held_out(chosen, seen, allow_overlap, progress)
    plan = Plan(
        pool=tuple(adapter.own_folder or adapter for adapter in adapters),
        variants=tuple(variants),
        questions=questions,
        template=template_of(adapters, template_name),
        extras={name: adapter.own_folder or adapter for name, adapter in beside.items()},
        judged=judged or items,
        max_tokens=max_tokens,
        weights=weights,
        rank=rank,
        seed=console.seed,
        batch_rows=batch_rows,
    )
    name = find_base(adapters, base_name, progress)
    del adapters, beside  # the base takes the memory
    measured = Sweep(load_base(name, progress=progress), plan, out, progress, processes).execute()
    if processes.writes:
        _print_result(console, measured, overlap, out)


def _held_out(
    chosen: Mapping[str, Selection], seen: Mapping[str, RowRecord], allow_overlap: bool, progress: Progress
) -> tuple[tuple[Question, ...], Overlap]:
    """The questions of all tasks, and what of them was seen in training; notes on both are shown."""
    from mlx_rsgwm.evaluation.contamination import check_overlap

    questions = tuple(question for selection in chosen.values() for question in selection.questions)
    overlap = check_overlap(questions, seen, allow_overlap, "test")
    for line in filter(None, (*(selection.note(task) for task, selection in chosen.items()), *overlap.lines())):
        progress.message(line)
    return questions, overlap


def _print_result(console: Console, measured: Measured, overlap: Overlap, out: Path) -> None:
    from mlx_rsgwm.studies.sweep_report import render_table, write_sweep

    summary = write_sweep(out, [measured], console.seed)
    for line in filter(None, (overlap.headline(), render_table(summary), f"sweep: {out}")):
        console.line(line)
    console.result({"overlap": overlap.headline(), **summary, "out": str(out)})


def _extras(texts: Sequence[str]) -> list[tuple[str, str]]:
    from mlx_rsgwm.core.errors import RsgwmError

    extras: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not folder:
            raise RsgwmError(f"--with wants NAME=FOLDER, found {text!r}")
        if name in extras:
            raise RsgwmError(f"--with names {name!r} twice")
        extras[name] = folder
    return list(extras.items())
