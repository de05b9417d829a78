"""``rsgwm data``: corpora for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options.paths import PATH


@click.command()
@click.option(
    "--task", "tasks", multiple=True, required=True, help="Family, data set, or file of questions; repeat for a mix."
)
@click.option("--draft-rows", default=102, show_default=True, help="Rows per task that teach to answer.")
@click.option(
    "--verify-rows", default=100, show_default=True, help="Rows per task that teach to judge, half of them wrong."
)
@click.option("--data", "folder", type=PATH, help="Folder with <task>/<split>.jsonl; default: Hub.")
@click.option(
    "--split", help="Split to take; default: train. Take another one for held-out rows; of a file also all of it: all."
)
@click.option("--offset", default=0, show_default=True, help="Questions to pass over first.")
@click.option("--template", "template_name", default="plain", show_default=True, help="Prompt template: plain or chat.")
@click.option("--out", type=PATH, required=True, help="Corpus folder to write.")
@common_options
def build(
    console: Console,
    tasks: tuple[str, ...],
    draft_rows: int,
    verify_rows: int,
    folder: Path | None,
    split: str | None,
    offset: int,
    template_name: str,
    out: Path,
) -> None:
    """Build a corpus folder.

    Of a file of your own, the rows of its training share are taken: a row's content decides whether it is for
    training, calibration or test. A gold answer stays as the file has it.

    \b
    Examples:
      rsgwm data build --task change --out corpus/change
      rsgwm data build --task gsm8k --data ../data --draft-rows 400 --verify-rows 0 --out corpus/gsm8k
      rsgwm data build --task my_questions.jsonl --out corpus/mine
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.data.corpus import make_rows, save_corpus
    from mlx_rsgwm.data.question_files import is_question_file
    from mlx_rsgwm.data.select import select_questions
    from mlx_rsgwm.data.template import find_template

    if draft_rows < 0 or verify_rows < 0 or draft_rows + verify_rows == 0:
        raise RsgwmError("--draft-rows and --verify-rows must not be negative, and not both 0")
    if offset < 0:
        raise RsgwmError(f"--offset must not be negative, found {offset}")
    template = find_template(template_name)
    rows: list[Any] = []
    of_files: list[Any] = []
    splits: dict[str, Any] = {}
    for task in tasks:
        own = is_question_file(task)
        wanted = None if own else max(draft_rows, 2 * verify_rows, 1)
        chosen = select_questions(task, "train", wanted, console.seed, folder, offset, split)
        made = make_rows(chosen.questions, draft_rows, verify_rows, console.seed, at_most=own)
        verify = sum(row.role == "verify" for row in made)
        if chosen.note(task):
            console.line(chosen.note(task))
        if verify < min(verify_rows, len(chosen.questions)):
            console.line(
                f"{task}: {verify} verify rows instead of {verify_rows}: no wrong answer can be made for the others"
            )
        rows += made
        of_files += chosen.file_questions
        splits[task] = chosen.split
    about = {"seed": console.seed, "tasks": list(tasks), "split": split or "train", "splits": splits}
    corpus = save_corpus(out, rows, template, about, of_files)
    counts = corpus.manifest["counts"]
    for task, found in counts.items():
        console.line(f"{task}: {found['draft']} draft rows, {found['verify']} verify rows")
    console.line(f"corpus: {out}")
    console.result({"out": str(out), "counts": counts, "hash": corpus.hash, "template": template.hash})
