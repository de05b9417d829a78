"""``rsgwm data negatives``: verifier pairs from drafts that adapters wrote themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import SHARE


@click.command()
@shared.adapter("it drafts", required=True, name="sources")
@shared.task()
@shared.base()
@shared.verify_rows()
@shared.draft_rows(0, "gold ones, put before the others")
@click.option(
    "--share",
    type=SHARE,
    default=0.75,
    show_default=True,
    help="Share of the wrong answers that are drafts; the rest is perturbed gold.",
)
@shared.true_equations()
@shared.items(None, "training ones to draft on", "--verify-rows")
@shared.offset("those that the adapters were trained on")
@shared.draft_count(2, "by each adapter", name="attempts")
@shared.temperature()
@shared.top_p()
@shared.max_tokens()
@shared.batch_rows()
@shared.questions()
@shared.template()
@shared.out("a corpus folder", required=True)
@shared.replace()
@common_options
def negatives(
    console: Console,
    sources: tuple[Path, ...],
    base_name: str | None,
    tasks: tuple[str, ...],
    out: Path,
    replace: bool,
    **options: Any,
) -> None:
    """Build a corpus whose wrong answers are mistakes that adapters made themselves.

    Adapters draft on training questions (never on those for calibration or test), gold says which drafts are right, and
    right and wrong answers to the same question make a pair. A verifier trained on its drafters' own mistakes tells
    these apart; one that knows perturbed gold answers only may not.

    \b
    Examples:
      rsgwm data negatives --adapter runs/demo/drafter --task change --task groups --offset 200 --out corpus/own
      rsgwm data negatives --adapter pool/change --task change --draft-rows 144 --verify-rows 160 --out corpus/change
      rsgwm data negatives --adapter runs/blind/drafter --task choice --offset 144 --true-equations --out corpus/own
    """
    from mlx_rsgwm.core.folders import exclusive
    from mlx_rsgwm.evaluation.own_mistakes import MistakePlan, build_from_mistakes
    from mlx_rsgwm.inference.sampling import Sampling

    drafting = {name: options.pop(name) for name in ("temperature", "top_p", "max_tokens")}
    sampling = Sampling(**drafting, seed=console.seed)
    plan = MistakePlan(tasks, template=options.pop("template_name"), sampling=sampling, seed=console.seed, **options)
    click.get_current_context().with_resource(exclusive(out))  # drafting takes minutes: nobody else is to begin it
    corpus, counts = build_from_mistakes(sources, base_name, plan, out, console.line, console.progress, replace)
    console.line(f"corpus: {out}")
    console.result(
        {
            "out": str(out),
            "counts": corpus.manifest["counts"],
            "negatives": counts,
            "hash": corpus.hash,
            "template": corpus.template.hash,
        }
    )
