"""``rsgwm recipe init``: a commented recipe for one's own questions."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.core.errors import RsgwmError


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@shared.base("smollm2-135m")
@shared.out("a .yaml file", default="own.yaml")
@common_options
def init(console: Console, files: tuple[str, ...], base_name: str | None, out: Path) -> None:
    """Write a commented recipe that trains on FILES of questions and answers: JSONL, JSON, CSV or TSV.

    One file makes one adapter, which drafts and verifies; several make a pool, which is merged.

    \b
    Examples:
      rsgwm recipe init my_questions.jsonl
      rsgwm recipe init sums.jsonl prices.csv --base TinyLlama/TinyLlama-1.1B-Chat-v1.0 --out own.yaml
    """
    from mlx_rsgwm.core.files import require_absent, write_text
    from mlx_rsgwm.data.question_files import SUFFIXES, is_question_file
    from mlx_rsgwm.recipes.own import own_recipe
    from mlx_rsgwm.recipes.schema import parse_recipe

    if out.suffix not in (".yaml", ".yml"):
        raise RsgwmError(f"{out}: a recipe is a .yaml file; give --out a name that ends in .yaml")
    require_absent(out, "edit it, remove it, or give --out another name")
    unknown = [name for name in files if not is_question_file(name)]
    if unknown:
        raise RsgwmError(f"{', '.join(unknown)}: questions come from files that end in {', '.join(SUFFIXES)}")
    text = own_recipe(files, base_name or "smollm2-135m", str(out))
    recipe = parse_recipe(text, str(out))
    write_text(out, text, replace=False)
    console.line(f"recipe: {out}; rsgwm run {out} --dry-run says what it would do, and for how long")
    console.result({"recipe": str(out), "tasks": list(recipe.data.tasks), "rows": recipe.data.rows})
