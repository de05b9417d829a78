"""``rsgwm blindspot``: questions that sampling never finds, and what grafted chains find there."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import SOURCE


@click.command()
@click.argument("adapter", type=SOURCE, required=False)
@shared.task()
@shared.questions()
@shared.items(100)
@shared.split("test")
@shared.allow_overlap()
@shared.slice_order()
@shared.layer()
@shared.temperature()
@shared.top_p()
@shared.max_tokens(256)
@shared.batch_rows()
@shared.base()
@shared.out("a folder; run again, it goes on", required=True)
@common_options
def blindspot(
    console: Console,
    adapter: Path | str | None,
    tasks: tuple[str, ...],
    folder: Path | None,
    items: int,
    split: str | None,
    allow_overlap: bool,
    how: str,
    layer: int | None,
    temperature: float,
    top_p: float,
    max_tokens: int,
    batch_rows: int,
    base_name: str | None,
    out: Path,
) -> None:
    """Find questions that ADAPTER (or --base alone) misses in six samples, and try six grafted chains there.

    A chain is greedy decoding with one activation replaced at the prompt's last token. Beside it stands its control,
    six fresh samples of the same questions, with intervals, a paired test, and the tokens that each spent.

    \b
    Examples:
      rsgwm blindspot runs/demo/drafter --task change --task prices --max-tokens 32 --out blind
      rsgwm blindspot my-adapter --task questions.jsonl --out blind
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.folders import exclusive
    from mlx_rsgwm.evaluation.chosen_questions import choose_questions
    from mlx_rsgwm.evaluation.contamination import rows_seen
    from mlx_rsgwm.evaluation.runner import describe_run
    from mlx_rsgwm.evaluation.slices import Slice
    from mlx_rsgwm.inference.grafting import grafted_layer
    from mlx_rsgwm.inference.speaker import ADAPTER, open_speaker
    from mlx_rsgwm.studies.blind_spot import find_blind_spot
    from mlx_rsgwm.studies.blind_spot_report import study_text

    if adapter is None and base_name is None:
        raise RsgwmError("nothing to ask: name an adapter, or --base for a model alone")
    speaker = open_speaker(
        adapter, base_name, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=console.seed,
        progress=console.progress,
    )  # fmt: skip
    grafted_layer(speaker.slots.model, layer)
    seen = (
        {} if adapter is None else rows_seen({"adapter": speaker.slots.adapter(ADAPTER)}, base_name, console.progress)
    )
    slices = [Slice(task, items, how, console.seed, split, folder) for task in tasks]
    chosen = choose_questions(slices, seen, allow_overlap, console.progress)
    for question in chosen.questions:
        speaker.loop.prompt(question.question, f"question {question.id}")  # before anything is written
    with exclusive(out):
        about = describe_run(speaker.loop, chosen.questions, None)
        summary = find_blind_spot(speaker.loop, chosen.questions, out, about, layer, batch_rows, console.progress)
    for line in chosen.overlap.lines():
        console.line(line)
    console.line(study_text(summary))
    console.line(f"blind spot: {out}")
    console.result({name: value for name, value in summary.items() if name != "items"})
