"""``rsgwm probe decide``: merge, reweight, prune or route, and do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH, SOURCE, OneOf
from mlx_rsgwm.cli.probe_fit import MODELS
from mlx_rsgwm.cli.probe_measure import AT, AT_HELP

if TYPE_CHECKING:
    from mlx_rsgwm.models.adapter import Adapter
    from mlx_rsgwm.probe.decide import Choice, Decision
    from mlx_rsgwm.probe.table import Table

RULE = "rule"


@click.command()
@click.argument("adapters", metavar="POOL...", nargs=-1, required=True, type=SOURCE)
@click.option("--at", type=AT, help=AT_HELP)
@shared.predictors()
@click.option(
    "--decide-by",
    type=OneOf((*MODELS, RULE)),
    help="Which fit decides, or the rule of the measures.  [default: ridge]",
)
@click.option("--table", type=PATH, help="Table of the pool's pairs, measured before (with data, say).")
@click.option("--apply", is_flag=True, help="Carry it out: merge the groups into --out.")
@shared.base()
@shared.out("a new folder for what --apply merges")
@common_options
def decide(
    console: Console,
    adapters: tuple[Path | str, ...],
    at: float | None,
    predictors: Path | None,
    decide_by: str | None,
    table: Path | None,
    apply: bool,
    base_name: str | None,
    out: Path | None,
) -> None:
    """Say what to do with every pair of POOL, and which of its adapters go together.

    Merge as they are, reweight, prune, or leave apart and route: what costs least, counting what a merge is forecast to
    lose. Then the pool is grouped: groups whose union costs least more are joined, and the cheapest grouping is taken.

    What merges lose is forecast by --predictors, or by those that come with rsgwm. These know adapters of SmolLM2-135M,
    finished or after 5 % of training; of any other a rule of the measures decides, which is said.

    \b
    Examples:
      rsgwm probe decide pool
      rsgwm probe decide pool --decide-by rule
      rsgwm probe decide pool --predictors predictors --apply --out decided
      rsgwm probe decide pool --at 0.05 --predictors early-predictors
    """
    from mlx_rsgwm.core.folders import require_empty
    from mlx_rsgwm.models.adapter_sources import load_adapters
    from mlx_rsgwm.probe.apply import apply as carry_out
    from mlx_rsgwm.probe.inputs import probed_adapters
    from mlx_rsgwm.probe.measure import measured_table, named_adapters
    from mlx_rsgwm.probe.table import read_table

    if apply != (out is not None):
        raise click.UsageError("--apply and --out belong together: where the merged groups go")
    if out is not None:
        require_empty(out)
    decider = decider_of(predictors, decide_by)
    loaded, share = probed_adapters(adapters, at, base_name, console.progress)
    finished = load_adapters(adapters, base_name, lazy=True, hashes=False)
    pairs = (
        measured_table(loaded, share, console.progress)
        if table is None
        else read_table(table).chosen(named_adapters(loaded), share)
    )
    decision = decider(pairs, finished)
    tell_decision(console, decision)
    result = decision.to_dict()
    if out is not None:
        by_name = {each.where: each for each in finished}
        result["written"] = carry_out(decision, by_name, out, console.progress)
        console.line(f"written: {out}")
    console.result(result)


def decider_of(predictors: Path | None, decide_by: str | None) -> Callable[[Table, Sequence[Adapter]], Decision]:
    """What decides by the options: predictors of a folder, those of the package, or the rule.

    Raises:
        RsgwmError: there are no such predictors.
        click.UsageError: options that do not go together.
    """
    from mlx_rsgwm.probe.decide import decide, feasible, only_method
    from mlx_rsgwm.probe.predictor import read_predictors
    from mlx_rsgwm.probe.shipped import decide_by_default

    if predictors is not None:
        if decide_by == RULE:
            raise click.UsageError("--decide-by rule looks at no predictors; leave --predictors out")
        fitted = only_method(read_predictors(predictors), decide_by or MODELS[0])
        return lambda table, adapters: decide(table, feasible(fitted, adapters))
    if decide_by not in (None, MODELS[0], RULE):
        raise click.UsageError(f"--decide-by {decide_by} needs --predictors, which rsgwm probe fit makes")
    return lambda table, adapters: decide(table) if decide_by == RULE else decide_by_default(table, adapters)


def tell_decision(console: Console, decision: Decision) -> None:
    """Print what to do with the pairs and with all together."""
    from mlx_rsgwm.core.tables import text_page

    head = ["adapters", "do", "by", "keeps", "at least", "why"]
    names = {name for choice in decision.pairs for name in choice.members}
    short = {name: PurePath(name).name for name in names}
    short = short if len(set(short.values())) == len(names) else {name: name for name in names}
    sections = [
        (title, [head, *(_row(choice, short) for choice in choices)])
        for title, choices in (("Pairs", decision.pairs), ("Together", decision.groups))
    ]
    reason = f"; {decision.reason}" if decision.reason else ""
    notes = [] if decision.predicted else [f"a rule of the measures decided, retention is not forecast{reason}"]
    console.line(text_page(sections, notes))


def _row(choice: Choice, names: Mapping[str, str]) -> list[str]:
    shown: Sequence[float | None] = (choice.retention, choice.bound)
    return [
        " + ".join(names[member] for member in choice.members),
        choice.action,
        choice.method,
        *("–" if value is None else f"{value:.3f}" for value in shown),
        choice.reason,
    ]
