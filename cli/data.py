"""``rsgwm data``: corpora for training."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared


@click.command()
@shared.task("repeat for a mix")
@shared.draft_rows(102)
@shared.verify_rows()
@shared.true_equations()
@shared.questions()
@shared.split("train; another one for held-out rows; of a file also all of it: all")
@shared.offset()
@shared.template("plain")
@shared.out("a corpus folder", required=True)
@shared.replace()
@common_options
def build(
    console: Console,
    tasks: tuple[str, ...],
    draft_rows: int,
    verify_rows: int,
    true_equations: bool,
    folder: Path | None,
    split: str | None,
    offset: int,
    template_name: str,
    out: Path,
    replace: bool,
) -> None:
    """Build a corpus folder.

    Of a file of your own, the rows of its training share are taken: a row's content decides whether it is for
    training, calibration or test. A gold answer stays as the file has it.

    \b
    Examples:
      rsgwm data build --task change --out corpus/change
      rsgwm data build --task gsm8k --questions ../data --draft-rows 400 --verify-rows 0 --out corpus/gsm8k
      rsgwm data build --task my_questions.jsonl --out corpus/mine
    """
    from mlx_rsgwm.data.build import build_corpus

    corpus = build_corpus(
        tasks, out, draft_rows=draft_rows, verify_rows=verify_rows, data=folder, split=split, offset=offset,
        template=template_name, seed=console.seed, true_equations=true_equations, replace=replace,
        progress=console.progress,
    )  # fmt: skip
    counts = corpus.manifest["counts"]
    for task, rows in counts.items():
        console.line(f"{task}: {rows['draft']} draft rows, {rows['verify']} verify rows")
    console.line(f"corpus: {out}")
    console.result({"out": str(out), "counts": counts, "hash": corpus.hash, "template": corpus.template.hash})
