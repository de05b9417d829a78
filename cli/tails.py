"""``rsgwm tails``: whether a claim about the tail of scores holds."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options.kinds import NEW_FILE, PATH, Number, Whole


@click.command()
@click.argument("first", type=PATH, required=False)
@click.argument("second", type=PATH, required=False)
@click.option(
    "--second",
    "again",
    nargs=2,
    type=PATH,
    metavar="FIRST SECOND",
    help="The same two by another scorer: an effect counts once it is found there, too.",
)
@click.option("--column", default="score", show_default=True, metavar="NAME", help="Column of the scores.")
@click.option(
    "--id",
    "id_column",
    metavar="NAME",
    help="Column of the items' names.  [default: id, where it is; else their order]",
)
@click.option("--logit", "as_logits", is_flag=True, help="Scores are chances in (0, 1): take their log odds.")
@click.option(
    "--quantile", type=Number(0.5, 1, max_open=True), default=0.95, show_default=True, help="Where the tail begins."
)
@click.option(
    "--effect", type=Number(0.01, 1), default=0.1, show_default=True, help="Difference in the shape ξ that counts."
)
@click.option("--resamples", type=Whole(99, 100_000), default=999, show_default=True, help="Bootstrap samples.")
@click.option("--plot", "picture", type=NEW_FILE, help="Write mean excess, quantiles and stability here: .png or .svg.")
@common_options
def tails(
    console: Console,
    first: Path | None,
    second: Path | None,
    again: tuple[Path, Path] | None,
    column: str,
    id_column: str | None,
    as_logits: bool,
    quantile: float,
    effect: float,
    resamples: int,
    picture: Path | None,
) -> None:
    """Say whether scores have a tail that can be spoken of, and whether SECOND's is heavier than FIRST's.

    FIRST and SECOND are files of scores of the same items (JSONL or CSV; high is bad), or runs: then it is how sure
    the verifier was of wrong answers that it accepted. Five gates decide: enough of a tail, a fit, stability, an
    effect, and more than mean and CVaR say. Without files: how many scores a difference takes.

    \b
    Examples:
      rsgwm tails
      rsgwm tails toxicity.jsonl --column score --logit
      rsgwm tails before.csv after.csv --second other-before.csv other-after.csv --plot tails.png
      rsgwm tails runs/a runs/b
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.folders import make_folder
    from mlx_rsgwm.evaluation.report.figures import picture_format, write_figure
    from mlx_rsgwm.evaluation.tails.gates import Settings, judge_tail, judge_tails
    from mlx_rsgwm.evaluation.tails.report import SIZE, draw_tails, power_text, verdict_text
    from mlx_rsgwm.evaluation.tails.scores import read_scores, same_items

    if again is not None and second is None:
        raise RsgwmError("--second repeats a comparison; give two files of scores before it")
    settings = Settings(quantile, effect, resamples=resamples, seed=console.seed)
    if first is None:
        if picture is not None or as_logits:
            raise RsgwmError(f"{'--plot' if picture is not None else '--logit'} is of scores; name a file of them")
        console.line(power_text(settings))
        console.result({"needed": settings.least_excesses, "effect": effect, "quantile": quantile})
        return
    if picture is not None:
        picture_format(picture)
    read = [read_scores(path, column, id_column) for path in (first, second, *(again or ())) if path is not None]
    paired = not any(path.is_dir() for path in (first, second) if path is not None)
    if paired:
        read = [read[0], *(same_items(read[0], other) for other in read[1:])]
        if len(read) > 1 and not read[0].named:
            console.progress.warning(
                "warning: items have no names: scores are paired in their files' order; --id names the column of them"
            )
    if as_logits:
        read = [arm.logits() for arm in read]
    elif paired and all(arm.look_like_chances() for arm in read):
        console.progress.warning(
            "warning: all scores lie in [0, 1]: a sigmoid's pile up at its ends and have no tail; --logit undoes it"
        )
    arms = [(arm.name, arm.scores) for arm in read]
    if second is None:
        verdict = judge_tail(*arms[0], settings)
    else:
        scores = [values for _, values in arms]
        verdict = judge_tails([name for name, _ in arms[:2]], scores[:2], settings, scores[2:] or None)
    console.line(verdict_text(verdict))
    if picture is not None:
        make_folder(picture.absolute().parent)
        write_figure(picture, draw_tails(arms[: len(verdict.arms)], verdict), SIZE)
        console.line(f"plot: {picture}")
    console.result(verdict.to_dict())
