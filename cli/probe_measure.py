"""``rsgwm probe measure``: every measure of every pair of adapters, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import SOURCE, Number

if TYPE_CHECKING:
    from mlx_rsgwm.models.adapter import Adapter
    from mlx_rsgwm.probe.data_measures import PairData

SHOWN = 1000  # pairs; of more the table is the place to look
AT = Number(0, 1, min_open=True)
AT_HELP = "Take the snapshots that training kept at this share of its steps.  [default: the finished adapters]"


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=SOURCE)
@click.option("--at", type=AT, help=AT_HELP)
@shared.data()
@shared.data_rows(100)
@shared.base()
@shared.out("the table, JSON lines; run again to go on", required=True)
@shared.replace()
@common_options
def measure(
    console: Console,
    adapters: tuple[Path | str, ...],
    at: float | None,
    data: tuple[str, ...],
    data_rows: int,
    base_name: str | None,
    out: Path,
    replace: bool,
) -> None:
    """Measure every pair of ADAPTERS: what may say how well they merge, long before they are merged.

    The 28 measures of mergeability fingerprints, MergeProbe's signals and those of the audit, in one table. All
    adapters must be at the same share of training. With --data also gradients and activations: each adapter on rows of
    its own task, and all on rows of every task.

    \b
    Examples:
      rsgwm probe measure pool/change pool/prices --out table.jsonl
      rsgwm probe measure pool --at 0.05 --out early.jsonl
      rsgwm probe measure pool/change pool/prices --data change --data prices --out table.jsonl
    """
    from mlx_rsgwm.probe.inputs import probed_adapters
    from mlx_rsgwm.probe.measure import write_table
    from mlx_rsgwm.probe.table import read_table, render_rows

    loaded, share = probed_adapters(adapters, at, base_name, console.progress)
    measured = _on_data(console, loaded, data, data_rows, base_name)
    write_table(out, loaded, share, measured, replace, console.progress)
    count = math.comb(len(loaded), 2)
    rows = read_table(out).in_order() if count <= SHOWN else None
    console.line(f"{out}: {count:,} pairs" if rows is None else render_rows(rows))
    pairs = None if rows is None else [row.to_dict() for row in rows]
    console.result({"out": str(out), "at": share, "count": count, "pairs": pairs})


def _on_data(
    console: Console, adapters: Sequence[Adapter], data: Sequence[str], count: int, base_name: str | None
) -> PairData | None:
    from mlx_rsgwm.audit.eligibility import rows_of_each
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.probe.data_measures import measure_on_data, shared_of

    if not data:
        return None
    base = load_base_for(adapters, base_name, console.progress)
    rows = [rows for _, rows, _ in rows_of_each(data, adapters, base, count, console.seed)]
    return measure_on_data(base, adapters, rows, shared_of(rows, count), data, console.progress)
