"""``rsgwm report curves``: training curves as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=PATH)
@shared.out("a picture, .png or .svg", default="curves.png")
@common_options
def plot(console: Console, adapters: tuple[Path, ...], out: Path) -> None:
    """Draw train and held-out loss of ADAPTERS over their steps.

    Example: rsgwm report curves runs/demo/pool/* --out curves.png
    """
    from mlx_rsgwm.evaluation.report.curves import plot_curves

    histories = plot_curves(adapters, out)
    for history in histories:
        for role, after in history["after"].items():
            console.line(f"{history['name']}: held-out {role} loss {history['before'][role]:.3f} → {after:.3f}")
    console.line(f"curves: {out}")
    console.result(
        {"out": str(out), "held_out": {h["name"]: {"before": h["before"], "after": h["after"]} for h in histories}}
    )
