"""``rsgwm plot``: training curves as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("curves.png"), show_default=True, help="PNG to write."
)
@common_options
def plot(console: Console, adapters: tuple[Path, ...], out: Path) -> None:
    """Draw train and held-out loss of ADAPTERS over their steps.

    Example: rsgwm plot runs/demo/pool/* --out curves.png
    """
    from mlx_rsgwm.evaluation.curves import plot_curves

    histories = plot_curves(adapters, out)
    for history in histories:
        for role, after in history["after"].items():
            console.line(f"{history['name']}: held-out {role} loss {history['before'][role]:.3f} → {after:.3f}")
    console.line(f"curves: {out}")
    console.result(
        {"out": str(out), "held_out": {h["name"]: {"before": h["before"], "after": h["after"]} for h in histories}}
    )
