"""``rsgwm audit``: know before merging, plan a repair, and look at what a merge did to its sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_rsgwm.audit.verdicts import PRESETS
from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH, SOURCE, Number, OneOf

if TYPE_CHECKING:
    from mlx_rsgwm.audit.audit_adapters import Audit


@click.command()
@click.argument("adapters", nargs=-1, type=SOURCE)
@shared.data()
@shared.data_rows(64)
@click.option("--preset", type=OneOf(list(PRESETS)), default="post", show_default=True, help="Where verdicts change.")
@click.option(
    "--energy",
    type=Number(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="Share of the squared singular values whose directions count as an adapter's.",
)
@click.option("--plan", type=PATH, help="Merge plan, a YAML file; written here.")
@click.option("--plan-compat", is_flag=True, help="Plan as gradience's plan_audit_aware does.")
@click.option(
    "--merged",
    type=SOURCE,
    help="A finished merge of the adapters: say what of each is in it, and with --data what it keeps of each.",
)
@click.option("--sources", multiple=True, type=SOURCE, help="Adapters, too: what --merged was merged from.")
@shared.page("heat maps, dumbbells and spectra")
@click.option("--every-module", is_flag=True, help="Show all modules of the worst pair, not the worst ten.")
@click.option("--strict-qa", is_flag=True, help="End with 3 if an adapter is worse than the base on its data.")
@shared.base()
@common_options
def audit(
    console: Console,
    adapters: tuple[Path | str, ...],
    data: tuple[str, ...],
    data_rows: int,
    preset: str,
    energy: float,
    plan: Path | None,
    plan_compat: bool,
    merged: Path | str | None,
    sources: tuple[Path | str, ...],
    page: Path | None,
    every_module: bool,
    strict_qa: bool,
    base_name: str | None,
) -> None:
    """Say before any inference whether ADAPTERS should be merged, and how.

    One adapter: how much of its rank it uses. Several: which pairs overlap, oppose each other, or differ in size. With
    --data also whether each is better than the base on rows it has not seen; with --merged what is left of each.

    \b
    Examples:
      rsgwm audit pool/change
      rsgwm audit owner/one owner/two
      rsgwm audit pool/* --plan plan.yaml
      rsgwm merge --plan plan.yaml --out merged
      rsgwm audit pool/change pool/prices --data change --data prices --strict-qa
      rsgwm audit --merged merged --sources pool/change pool/prices
      rsgwm audit --merged merged --sources pool/change pool/prices --data change --data prices
    """
    from mlx_rsgwm.audit.audit_adapters import audit_adapters
    from mlx_rsgwm.core.errors import RsgwmError

    named = [*sources, *adapters]
    if not named:
        raise RsgwmError("no adapters given; name one or more: folders, .gguf files or Hub ids")
    audited = audit_adapters(
        named,
        data=data,
        data_rows=data_rows,
        merged=merged,
        plan=plan,
        plan_compat=plan_compat,
        page=page,
        preset=preset,
        energy=energy,
        base=base_name,
        seed=console.seed,
        progress=console.progress,
    )
    _tell(console, audited, every_module)
    if plan is not None:
        console.line(f"plan: {plan} (rsgwm merge --plan {plan} --out FOLDER carries it out)")
    if page is not None:
        console.line(f"page: {page}")
    console.result(audited.to_dict())
    if strict_qa:
        _check_quality(audited)


def _tell(console: Console, audited: Audit, every_module: bool) -> None:
    advice = audited.advice
    if advice is not None:
        console.line(f"{advice.word}: {advice.reason}")
        console.line(f"next: {advice.command}")
        if advice.leave_out is not None:
            console.line(f"leave out: {audited.pool.labels[advice.leave_out]}")
        console.line()
    console.line(audited.text(every_module))


def _check_quality(audited: Audit) -> None:
    from mlx_rsgwm.core.errors import CheckFailed

    if audited.weak:
        weak = ", ".join(audited.pool.labels[index] for index in audited.weak)
        raise CheckFailed(f"worse than the base on their own rows: {weak}")
