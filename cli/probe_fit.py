"""``rsgwm probe fit``: predictors of retention from a table of pairs and what merges did."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH, OneOf
from mlx_rsgwm.cli.probe_outcomes import UTILITIES, UTILITY

MODELS = ("ridge", "trees", "blend", "fingerprint")


@click.command()
@click.argument("table", type=PATH)
@click.argument("outcomes", type=PATH)
@click.option(
    "--fit",
    "models",
    multiple=True,
    type=OneOf(MODELS),
    help="What is fitted: ridge, boosted trees, the mean of both, or each method's fingerprint; repeatable.  "
    "[default: ridge]",
)
@shared.methods("as the outcomes call them; repeatable", "all of the outcomes")
@click.option("--utility", type=OneOf(UTILITIES), default="nll", show_default=True, help=UTILITY)
@click.option(
    "--target",
    type=OneOf(["mean", "worst"]),
    default="mean",
    show_default=True,
    help="Retention of a set: the mean of its members, or the worst.",
)
@shared.out("a folder that gets a file for every method and model", required=True)
@common_options
def fit(
    console: Console,
    table: Path,
    outcomes: Path,
    models: tuple[str, ...],
    methods: tuple[str, ...],
    utility: str,
    target: str,
    out: Path,
) -> None:
    """Fit predictors of what merges of OUTCOMES leave to the measures in TABLE.

    Each is judged on tasks that were left out, with intervals, beside the norm ratio alone and the cosine alone, and a
    permutation null; then it is fitted to everything, with a bound below which one in five sets may fall.

    \b
    Examples:
      rsgwm probe fit table.jsonl outcomes.jsonl --out predictors
      rsgwm probe fit early.jsonl outcomes.jsonl --fit ridge --fit fingerprint --target worst --out predictors
    """
    from mlx_rsgwm.core.folders import make_folder
    from mlx_rsgwm.core.tables import aligned
    from mlx_rsgwm.probe.fingerprints import left_out_rows
    from mlx_rsgwm.probe.outcomes import read_outcomes
    from mlx_rsgwm.probe.predictor import file_name, fit_predictor
    from mlx_rsgwm.probe.table import read_table

    pairs, merged = read_table(table), read_outcomes(outcomes)
    jobs = [(method, kind) for method in methods or merged.methods for kind in models or MODELS[:1]]
    fitted = []
    with console.progress.task("probe fit", len(jobs)) as advance:
        for method, kind in jobs:
            fitted.append(fit_predictor(pairs, merged, method, kind, utility, target, console.seed).predictor)
            advance(1, f"{method}, {kind}")
    for predictor in fitted:
        predictor.save(make_folder(out) / file_name(predictor.method, predictor.kind))
    console.line(aligned(left_out_rows(fitted)))
    told = [{"method": each.method, "model": each.kind, **each.about["left_out"]} for each in fitted]
    console.result({"out": str(out), "predictors": told})
