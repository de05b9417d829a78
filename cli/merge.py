"""``rsgwm merge``: several adapters to one."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Adapter folder to write.")
@click.option("--method", default="rsgwm", show_default=True, help="rsgwm or linear.")
@click.option("--role", default="draft", show_default=True, help="draft or verify: which importance and which tau.")
@click.option("--tau", type=float, help="Quantile of the mask, in (0, 1); default: 0.30 to draft, 0.50 to verify.")
@click.option("--signal", default="per_role", show_default=True, help="per_role, or shared (the paper's letter).")
@click.option("--scope", default="tensor", show_default=True, help="Quantile over each tensor, or global.")
@click.option("--reference", default="init", show_default=True, help="Deltas from the shared init, or from zero.")
@click.option(
    "--normalise", default="mean", show_default=True, help="Importances of different tasks: mean, rank or none."
)
@click.option("--weight", "weights", multiple=True, type=float, help="One for each adapter, in their order.")
@common_options
def merge(
    console: Console,
    adapters: tuple[Path, ...],
    out: Path,
    method: str,
    role: str,
    tau: float | None,
    signal: str,
    scope: str,
    reference: str,
    normalise: str,
    weights: tuple[float, ...],
) -> None:
    """Merge ADAPTERS, trained on one base from one initialisation, into one.

    \b
    Examples:
      rsgwm merge pool/* --role draft --out drafter
      rsgwm merge pool/* --role verify --out verifier
      rsgwm merge a b --method linear --weight 0.7 --weight 0.3 --out mixed
    """
    from mlx_rsgwm.adapter import Adapter, is_complete
    from mlx_rsgwm.errors import RsgwmError
    from mlx_rsgwm.merging.merge import merge as merge_adapters
    from mlx_rsgwm.merging.options import MergeOptions

    if is_complete(out):
        raise RsgwmError(f"{out} already holds a finished adapter; choose another folder or remove it")
    options = MergeOptions(
        method=method,
        role=role,
        tau=tau,
        signal=signal,
        scope=scope,
        reference=reference,
        normalise=normalise,
        weights=weights,
    )
    merged = merge_adapters([Adapter.load(path) for path in adapters], options)
    merged.save(out)
    overall = merged.manifest["merge"]["diagnosis"]["overall"]
    console.line(f"{out}: {method} of {len(adapters)} adapters for the {role} role")
    console.line(f"norm of the update: {overall['norm_share']:.3f} of the sources' mean")
    for path, cosine in zip(adapters, overall["cosines"], strict=True):
        console.line(f"cosine to {path}: {cosine:.3f}")
    console.line(f"cosine to the mean product: {overall['cosine_to_mean_product']:.3f}")
    console.result({"out": str(out), "options": options.describe(), "diagnosis": overall})
