"""``rsgwm audit``: know before merging, plan a repair, and look at what a merge did to its sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.audit.verdicts import PRESETS
from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import NEW_PATH, PATH, SOURCE, Number, OneOf, Whole

if TYPE_CHECKING:
    from mlx_rsgwm.audit.eligibility import Eligibility
    from mlx_rsgwm.audit.pool_audit import PoolAudit
    from mlx_rsgwm.models.adapter import Adapter


@click.command()
@click.argument("adapters", nargs=-1, type=SOURCE)
@click.option(
    "--data",
    multiple=True,
    metavar="TASK-OR-FILE",
    help="Rows to judge an adapter by: a task, a file of questions or of rows, or a corpus; once for all adapters, or "
    "one for each in their order.",
)
@click.option(
    "--data-rows", type=Whole(8), default=64, show_default=True, help="Rows of --data that are taken, at most."
)
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
@click.option("--merged", type=SOURCE, help="A finished merge of the adapters: say what of each is in it.")
@click.option("--sources", multiple=True, type=SOURCE, help="Adapters, too: what --merged was merged from.")
@click.option("--html", "page", type=NEW_PATH, help="Write a page with heat map, dumbbells and spectra here.")
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
    --data also whether each is better than the base on rows it has not seen.

    \b
    Examples:
      rsgwm audit pool/change
      rsgwm audit owner/one owner/two
      rsgwm audit pool/* --plan plan.yaml
      rsgwm merge --plan plan.yaml --out merged
      rsgwm audit pool/change pool/prices --data change --data prices --strict-qa
      rsgwm audit --merged merged --sources pool/change pool/prices
    """
    from mlx_rsgwm.audit.pool_audit import audit as audit_pool
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.models.adapter_sources import load_adapters

    named = [*sources, *adapters]
    if not named:
        raise RsgwmError("no adapters given; name one or more: folders, .gguf files or Hub ids")
    loaded = load_adapters(named, base_name, lazy=True, hashes=False, progress=console.progress)
    audited = audit_pool(loaded, PRESETS[preset], energy, console.progress)
    judged = _judged(console, loaded, data, data_rows, base_name)
    _tell(console, audited, judged, every_module)
    result = _result(console, audited, judged, loaded, merged, base_name)
    if plan is not None:
        _plan(console, audited, plan, plan_compat)
    if page is not None:
        _page(console, audited, judged, page)
    console.result(result)
    if strict_qa:
        _check_quality(audited, judged)


def _judged(
    console: Console, loaded: Sequence[Adapter], data: Sequence[str], rows: int, base_name: str | None
) -> list[Eligibility]:
    from mlx_rsgwm.audit.eligibility import Eligibility, held_out_rows, judge
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.inference.open import load_base_for, slots_of

    if not data:
        return [Eligibility() for _ in loaded]
    if len(data) not in (1, len(loaded)):
        raise RsgwmError(f"--data is given once for all adapters or once for each: {len(loaded)} adapters, {len(data)}")
    base = load_base_for(list(loaded), base_name, console.progress)
    each = list(data) * (len(loaded) if len(data) == 1 else 1)
    chosen = [
        held_out_rows(name, adapter, base, rows, console.seed) for name, adapter in zip(each, loaded, strict=True)
    ]
    slots = slots_of(base, {str(index): adapter for index, adapter in enumerate(loaded)})
    judged = []
    with console.progress.task("judge on data", len(loaded)) as advance:
        for index, (name, (new, seen)) in enumerate(zip(each, chosen, strict=True)):
            judged.append(judge(slots, str(index), new, name, seen, console.seed))
            advance(1, "")
    return judged


def _tell(console: Console, audited: PoolAudit, judged: Sequence[Eligibility], every_module: bool) -> None:
    from mlx_rsgwm.audit.advice import advise
    from mlx_rsgwm.audit.eligibility import WEAK
    from mlx_rsgwm.audit.report import notes, sections
    from mlx_rsgwm.core.tables import text_page

    if audited.pairs:
        weak = [index for index, each in enumerate(judged) if each.verdict == WEAK]
        advice = advise(audited, weak)
        console.line(f"{advice.word}: {advice.reason}")
        console.line(f"next: {advice.command}")
        if advice.leave_out is not None:
            console.line(f"leave out: {audited.labels[advice.leave_out]}")
        console.line()
    console.line(text_page(sections(audited, judged, every_module), notes(audited, judged)))


def _result(
    console: Console,
    audited: PoolAudit,
    judged: Sequence[Eligibility],
    loaded: Sequence[Adapter],
    merged: Path | str | None,
    base_name: str | None,
) -> dict[str, Any]:
    from mlx_rsgwm.audit.outcomes import structure_of
    from mlx_rsgwm.audit.report import structure_rows, to_json
    from mlx_rsgwm.core.tables import text_page
    from mlx_rsgwm.models.adapter_sources import load_adapter

    result = to_json(audited, judged)
    if merged is not None:
        adapter = load_adapter(merged, base_name, lazy=True, progress=console.progress)
        structure = structure_of(adapter, loaded)
        console.line()
        console.line(text_page([(f"What of each is in {adapter.where}", structure_rows(structure, audited.labels))]))
        if structure.dominated:
            console.line("one of them drowns another: D is above 0.2")
        result["merged"] = structure.to_dict()
    return result


def _plan(console: Console, audited: PoolAudit, path: Path, compat: bool) -> None:
    from mlx_rsgwm.audit.plan import plan_of

    plan_of(audited, compat).save(path)
    console.line(f"plan: {path} (rsgwm merge --plan {path} --out FOLDER carries it out)")


def _page(console: Console, audited: PoolAudit, judged: Sequence[Eligibility], path: Path) -> None:
    from mlx_rsgwm.audit.page import write_page

    write_page(audited, judged, path)
    console.line(f"page: {path}")


def _check_quality(audited: PoolAudit, judged: Sequence[Eligibility]) -> None:
    from mlx_rsgwm.audit.eligibility import WEAK
    from mlx_rsgwm.core.errors import CheckFailed

    weak = [label for label, each in zip(audited.labels, judged, strict=True) if each.verdict == WEAK]
    if weak:
        raise CheckFailed(f"worse than the base on their own rows: {', '.join(weak)}")
