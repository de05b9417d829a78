"""``rsgwm probe measure``: every measure of every pair of adapters, as a table."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import SOURCE, Number

AT = Number(0, 1, min_open=True)
AT_HELP = "Take the snapshots that training kept at this share of its steps.  [default: the finished adapters]"


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=SOURCE)
@click.option("--at", type=AT, help=AT_HELP)
@shared.base()
@shared.out("the table, JSON lines; run again to go on", required=True)
@shared.replace()
@common_options
def measure(
    console: Console,
    adapters: tuple[Path | str, ...],
    at: float | None,
    base_name: str | None,
    out: Path,
    replace: bool,
) -> None:
    """Measure every pair of ADAPTERS: what may say how well they merge, long before they are merged.

    The 28 measures of mergeability fingerprints, MergeProbe's signals and those of the audit, in one table. All
    adapters must be at the same share of training.

    \b
    Examples:
      rsgwm probe measure pool/change pool/prices --out table.jsonl
      rsgwm probe measure pool --at 0.05 --out early.jsonl
    """
    from mlx_rsgwm.probe.inputs import probed_adapters
    from mlx_rsgwm.probe.measure import write_table
    from mlx_rsgwm.probe.table import render_rows

    loaded, share = probed_adapters(adapters, at, base_name, console.progress)
    rows = write_table(out, loaded, share, None, replace, console.progress)
    console.line(render_rows(rows))
    console.result({"out": str(out), "at": share, "pairs": [row.to_dict() for row in rows]})
