"""``rsgwm run`` and ``rsgwm demo``: a whole job from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.core.errors import CheckFailed

if TYPE_CHECKING:
    from mlx_rsgwm.recipes.schema import Recipe


def look(function: Callable[..., None]) -> Callable[..., None]:
    """``--show`` and ``--dry-run``: what a recipe is and would do."""
    show = click.option("--show", is_flag=True, help="Print the recipe with every setting, and run nothing.")
    return show(shared.dry_run("run nothing, print the stages and their time, by one forward pass timed now")(function))


@click.command()
@click.argument("recipe")
@shared.out("the run's folder, by default runs/NAME; run again to resume")
@shared.settings("of the recipe, as train.epochs=3")
@look
@common_options
def run(console: Console, recipe: str, out: Path | None, settings: tuple[str, ...], show: bool, dry_run: bool) -> None:
    """Run RECIPE (a .yaml file, or the name of a shipped one: demo, paper, rounds) and say what came out.

    Stages that are already done with the same settings are skipped, so the same command resumes a run.

    \b
    Examples:
      rsgwm run own.yaml --dry-run
      rsgwm run paper --out runs/paper --set data.folder=../data --set evaluate.items=20
    """
    _run(console, recipe, out, settings, show, dry_run)


@click.command()
@shared.out("the run's folder; run again to resume", default="runs/demo")
@shared.settings("of the recipe, as train.epochs=3")
@look
@common_options
def demo(console: Console, out: Path, settings: tuple[str, ...], show: bool, dry_run: bool) -> None:
    """Train four adapters on SmolLM2-135M, merge them, compare drafter and draft–verify, export to PEFT.

    Some minutes on a laptop; nothing but PyPI is needed. Run again, it resumes.
    """
    _run(console, "demo", out, settings, show, dry_run)


def _run(console: Console, source: str, out: Path | None, settings: tuple[str, ...], show: bool, dry_run: bool) -> None:
    from mlx_rsgwm.core.files import read_json_object
    from mlx_rsgwm.recipes.ending import ending
    from mlx_rsgwm.recipes.run import load_recipe, run_recipe

    if not any(setting.startswith("seed=") for setting in settings) and console.seed_given:
        settings = (*settings, f"seed={console.seed}", f"train.seed={console.seed}")
    recipe = load_recipe(source, settings)
    out = out or Path("runs") / recipe.name
    if show or dry_run:
        _look(console, recipe, out, show, dry_run)
        return
    summary = run_recipe(recipe, out, console.progress, details=console.verbose)
    if console.verbose:
        console.line(f"{render(summary, out)}\n")
    console.line("\n".join(ending(read_json_object(out / "report" / "report.json"), summary)))
    console.result(summary)
    parity = summary["parity"]
    if parity and not parity["passed"]:
        raise CheckFailed(f"the drafter differs between MLX and torch: {'; '.join(parity['failures'])}")


def _look(console: Console, recipe: Recipe, out: Path, show: bool, dry_run: bool) -> None:
    """What a recipe is and would do, without doing it."""
    from mlx_rsgwm.recipes.estimate import duration, forecast
    from mlx_rsgwm.recipes.own import written_out
    from mlx_rsgwm.recipes.run import RecipeRun

    if show:
        console.line(written_out(recipe).rstrip())
    seconds = forecast(RecipeRun(recipe, out, console.progress)) if dry_run else {}
    for name, time in seconds.items():
        console.line(f"{name:<{max(map(len, seconds))}}  {'done' if time is None else duration(time)}")
    left = sum(time for time in seconds.values() if time is not None)
    if dry_run:
        console.line(f"in all {duration(left)} on this machine, give or take half; into {out}")
    console.result({"recipe": recipe.name, "out": str(out), "seconds": left if dry_run else None, "stages": seconds})


def render(summary: Mapping[str, Any], out: Path) -> str:
    """Every table of a run, and what was measured on its way."""
    from mlx_rsgwm.core.files import read_json_object
    from mlx_rsgwm.core.tables import text_page
    from mlx_rsgwm.evaluation.report.folder import render_table

    lines = [render_table(read_json_object(out / "report" / "report.json")), ""]
    if any(name in summary for name in ("draft_verify_paper", "draft_verify_own_mistakes")):
        lines += [text_page([("The same questions by", _systems(summary))]), ""]
    calibration = summary["calibration"]
    if calibration:
        for title, key in (("own drafts", "auroc"), ("gold against perturbed gold", "perturbed_auroc")):
            shown = ", ".join(f"{name} {_two(value)}" for name, value in calibration[key].items())
            lines.append(f"calibration, AUROC on {title}: {shown}")
        lines.append(
            f"chosen there ({calibration['drafts']} drafts): score {summary['score']}, "
            f"threshold {summary['threshold']:.3f}"
        )
    parity = summary["parity"]
    if parity:
        verdict = "passed" if parity["passed"] else "failed"
        lines.append(
            f"parity: max |Δlogit| {parity['max_abs_logit']:.1e} over {parity['tokens']} tokens "
            f"({parity['dtype']}, torch {parity['device']}) — {verdict}"
        )
    executed = ", ".join(summary["executed"]) or "nothing, all stages were done"
    lines += [
        "",
        f"adapters: {out / 'drafter'}, {out / 'verifier'}; PEFT: {out / 'export'}; report: {out / 'report'}",
        f"ran {executed}, in {summary['seconds']:.0f} s",
    ]
    return "\n".join(lines)


# Systems that answered the same questions: their key in the summary, what they are called.
SYSTEMS = {
    "draft_verify_paper": "draft–verify, the paper's merge",
    "draft_verify": "draft–verify",
    "draft_verify_own_mistakes": "draft–verify, verifier trained on own mistakes",
    "draft_verify_arithmetic": "draft–verify, arithmetic checked",
    "calculator": "calculator, no verifier",
}
SHOWN = ("accuracy", "accept_rate", "accepted_and_correct", "false_accept_rate", "average_attempts")


def _systems(summary: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: drafters first, then what checks their drafts."""
    from mlx_rsgwm.core.tables import show
    from mlx_rsgwm.evaluation.report.folder import ROWS

    paper = summary.get("draft_verify_paper")
    rows = {
        **({"drafter alone, the paper's merge": paper["drafter"]} if paper else {}),
        "drafter alone": summary["drafter"],
        **{label: summary[key] for key, label in SYSTEMS.items() if key in summary},
    }
    head = ["", *(ROWS[name] for name in SHOWN)]
    return [head, *([label, *(show(rates[name]) for name in SHOWN)] for label, rates in rows.items())]


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
