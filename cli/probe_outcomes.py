"""``rsgwm probe outcomes``: what merges of pairs and sets do to the adapters that go into them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import COUNT, SOURCE, OneOf, Whole

if TYPE_CHECKING:
    from mlx_rsgwm.models.adapter import Adapter
    from mlx_rsgwm.models.base import Base
    from mlx_rsgwm.studies.merge_outcomes import TaskData

METHODS = "linear,ties,dare_ties,norm_equalised,rsgwm"
UTILITIES = ("nll", "tokens", "answers")  # of mlx_rsgwm.probe.outcomes
UTILITY = "What retention is of: probability of held-out tokens, tokens that are likeliest, or right answers."


@click.command()
@click.argument("adapters", metavar="POOL...", nargs=-1, required=True, type=SOURCE)
@shared.methods("values with / make one each, 'all' is every method", METHODS)
@click.option("--sets", type=COUNT, default=0, show_default=True, help="Random larger sets to merge beside all pairs.")
@click.option("--largest-set", type=Whole(3), default=5, show_default=True, help="Adapters of the largest of them.")
@shared.data()
@shared.data_rows(64)
@shared.items(None, "answered greedily beside the rows", "none")
@click.option("--utility", type=OneOf(UTILITIES), default="nll", show_default=True, help=UTILITY)
@shared.base()
@shared.out("the outcomes, JSON lines; run again to go on or to add merges", required=True)
@shared.replace()
@common_options
def outcomes(
    console: Console,
    adapters: tuple[Path | str, ...],
    methods: tuple[str, ...],
    sets: int,
    largest_set: int,
    data: tuple[str, ...],
    data_rows: int,
    items: int | None,
    utility: str,
    base_name: str | None,
    out: Path,
    replace: bool,
) -> None:
    """Merge every pair of POOL, and some larger sets, and measure what is left of each adapter.

    Retention R is the merge's utility over the adapter's own, on rows of its task that it was not trained on; the
    floored one takes the base as 0. What was measured is kept: the same command goes on, and with more --methods or
    --sets adds to it. Under mlx.launch the merges are shared out among the processes.

    \b
    Examples:
      rsgwm probe outcomes pool --out outcomes.jsonl
      rsgwm probe outcomes pool --methods linear,ties:density=0.2/0.5 --sets 40 --out outcomes.jsonl
      mlx.launch -n 2 -- rsgwm probe outcomes pool --out outcomes.jsonl
    """
    from mlx_rsgwm.core.distributed import launched_processes
    from mlx_rsgwm.core.folders import exclusive_file
    from mlx_rsgwm.core.progress import SILENT
    from mlx_rsgwm.core.tables import aligned
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.models.adapter_sources import load_adapters
    from mlx_rsgwm.probe.outcomes import ANSWERS, random_sets
    from mlx_rsgwm.studies.merge_outcomes import OutcomeStudy, summary_rows, units_of
    from mlx_rsgwm.studies.sweep_variants import parse_variants

    if utility == ANSWERS and not items:
        raise click.UsageError("--utility answers needs --items: how many questions of each task are answered")
    variants = parse_variants(methods or (METHODS,))
    processes = launched_processes()
    progress = console.progress if processes.writes else SILENT
    loaded = load_adapters(adapters, base_name, progress=progress)
    if len(loaded) < 2:
        raise click.UsageError(f"a merge needs at least two adapters, found {len(loaded)}")
    base = load_base_for(loaded, base_name, progress)
    held_out = _data(console, loaded, base, data, data_rows, items)
    places = [str(place) for place in range(len(loaded))]
    drawn = random_sets(places, range(3, largest_set + 1), sets, console.seed)
    units = units_of(len(loaded), variants, [tuple(map(int, members)) for members in drawn])
    if processes.writes:
        click.get_current_context().with_resource(exclusive_file(out))
    study = OutcomeStudy(base, loaded, held_out, out, console.seed, progress, processes, replace)
    measured = study.execute(units)
    if processes.writes:
        rows = list(summary_rows(measured, utility))
        console.line(aligned(rows))
        console.result({"out": str(out), "methods": [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]})


def _data(
    console: Console, adapters: Sequence[Adapter], base: Base, data: Sequence[str], count: int, items: int | None
) -> list[TaskData]:
    """Held-out rows of every adapter, of its own task unless ``data`` says otherwise, and questions."""
    from mlx_rsgwm.audit.eligibility import rows_of_each
    from mlx_rsgwm.evaluation.slices import Slice, read_slice
    from mlx_rsgwm.studies.merge_outcomes import TaskData
    from mlx_rsgwm.studies.merge_sweep import tasks_of_pool

    if not data:
        tasks_of_pool(adapters)  # refuses what no rows are known of
    named = data or [str(adapter.manifest.get("task") or adapter.name) for adapter in adapters]
    return [
        TaskData(name, rows, read_slice(Slice(name, items, seed=console.seed))[0] if items else ())
        for name, rows, _ in rows_of_each(named, adapters, base, count, console.seed)
    ]
