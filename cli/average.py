"""``rsgwm average``: one adapter from the checkpoints of one training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import COUNT, PATH, Number, OneOf
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.training.average_weights import METRICS, SPACES, AverageOptions


@click.command()
@click.argument("sources", metavar="RUN...", nargs=-1, required=True, type=PATH)
@click.option(
    "--metric",
    type=OneOf(METRICS),
    default=AverageOptions.metric,
    show_default=True,
    help="What weighs: a loss (of validation where there is one), or the steps.",
)
@click.option(
    "--penalty", type=Number(0, 1, min_open=True), help=f"p: factor for each rank.  [default: {AverageOptions.penalty}]"
)
@click.option("--power", type=Number(0), help=f"q: exponent of 1 / loss.  [default: {AverageOptions.power}]")
@click.option("--last", type=COUNT, help="The newest so many checkpoints; 0 for all.  [default: 0]")
@click.option(
    "--space",
    type=OneOf(SPACES),
    default=AverageOptions.space,
    show_default=True,
    help="Mean of the factors, or of their products at the run's rank, without importance.",
)
@click.option("--log", type=PATH, help="What mlx_lm.lora printed, for its losses.")
@shared.choose("--last, --penalty and --power")
@shared.base()
@shared.out("an adapter folder", required=True)
@common_options
def average(
    console: Console,
    sources: tuple[Path, ...],
    metric: str,
    space: str,
    log: Path | None,
    rows: Path | None,
    base_name: str | None,
    out: Path,
    **given: Any,
) -> None:
    """Average the checkpoints of one run, weighted by their losses or steps (MWA): RUN is its folder, or checkpoints.

    Weights are p^rank · (1 / loss)^q, or p^rank · (step / last step)^q; p = 1 and q = 0 are the uniform mean. Read are
    runs of rsgwm train, of mlx_lm.lora (numbered files) and of PEFT's Trainer (checkpoint-N).

    \b
    Examples:
      rsgwm average pool/change --out averaged
      rsgwm average pool/change --metric steps --penalty 0.9 --last 5 --out averaged
      rsgwm average adapters --log train.log --out averaged
      rsgwm average pool/change --choose corpus/held --out averaged
    """
    from mlx_rsgwm.training.averaging import average_run

    settings = {name: value for name, value in given.items() if value is not None}
    options = AverageOptions(metric=metric, space=space, **settings)

    def settle(checkpoints: Any) -> Any:
        if rows is None:
            if base_name is not None and not any(each.reads_base for each in checkpoints):
                raise RsgwmError("--base is for --choose, and for checkpoints of a PEFT trainer")
            return options, None
        choice = _choose(console, checkpoints, rows, base_name, options, tuple(settings))
        if choice.warning:
            console.progress.warning(choice.warning)
        return choice.options, choice.describe()

    told = average_run(sources, settle, out, log, base_name, console.progress).manifest["average"]
    console.line(render(str(out), told))
    console.result({"out": str(out), **told})


def _choose(
    console: Console,
    checkpoints: Any,
    rows: Path,
    base_name: str | None,
    options: AverageOptions,
    fixed: tuple[str, ...],
) -> Any:
    from mlx_rsgwm.data.batching import tell_rows
    from mlx_rsgwm.data.loading import load_data
    from mlx_rsgwm.data.row_hashes import record_of
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.training.average_choice import choose
    from mlx_rsgwm.training.config import TrainConfig

    data, _ = load_data(rows, None)
    newest = checkpoints[-1].load()
    base = load_base_for([newest], base_name, console.progress)
    token_rows, dropped = data.token_rows(base.tokenizer, TrainConfig.max_tokens, "drop")
    tell_rows(token_rows, dropped, TrainConfig.max_tokens, console.progress)
    trained_on = sum(record_of(newest.manifest, newest.name).has(row.keys) for row in token_rows)
    if trained_on:
        console.progress.warning(f"NOT NEW: the run was trained on what {trained_on} of {len(token_rows)} rows ask")
    weighing = options.metric in ("loss", "validation-loss") and checkpoints[-1].validation_loss is not None
    if weighing and checkpoints[-1].run.get("held_out") == data.hash:
        console.progress.warning(
            "NOT NEW: the checkpoints' validation losses are of these rows, so weights by them have seen what they are "
            "chosen on; choose on other rows, or weigh by --metric train-loss or steps"
        )
    return choose(base, checkpoints, token_rows, options, fixed, console.seed, progress=console.progress)


def render(out: str, told: dict[str, Any]) -> str:
    """The text a person reads: every checkpoint's loss and weight, and how alike both means are."""
    shown = {"steps": "", "train-loss": "train_loss", "validation-loss": "validation_loss"}[told["metric"]]
    lines = [f"{'checkpoint':28}  {told['metric'].replace('-', ' '):>15}  weight"]
    for row in told["checkpoints"]:
        value = f"{row[shown]:15.4f}" if shown else f"{row['step']:15d}"
        lines.append(f"{row['checkpoint']:28}  {value}  {row['weight']:6.3f}")
    cosine = told["cosine_factor_product"]
    alike = "" if cosine is None else f"; cosine of the means of factors and products {cosine:.4f}"
    lines.append(f"{out}: worth {told['effective']:.2f} of {len(told['checkpoints'])} checkpoints{alike}")
    if choice := told.get("choice"):
        lines.append(
            f"chosen of {choice['settings']} settings on {choice['rows']} rows: last {choice['last'] or 'all'}, "
            f"penalty {choice['penalty']:g}, power {choice['power']:g}"
        )
        lines.append(
            f"loss there {choice['loss']:.4f}, chosen on other rows {choice['nested']:.4f} (optimism "
            f"{choice['optimism']:.4f}); uniform mean {choice['uniform']:.4f}, newest alone {choice['newest']:.4f}"
        )
    return "\n".join(lines)
