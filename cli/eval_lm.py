"""``rsgwm lm-eval``: lm-evaluation-harness drives the drafter or the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import OneOf
from mlx_rsgwm.cli.options.loop import build_pipeline, loop_options


@click.command(name="lm-eval")
@click.option(
    "--task",
    "tasks",
    metavar="TASK",
    multiple=True,
    required=True,
    help="Task: lm_eval's name of it, or a .yaml; repeatable.",
)
@shared.items(None, shown="all")
@click.option(
    "--as", "role", type=OneOf(["pipeline", "drafter"]), default="pipeline", show_default=True, help="What answers."
)
@shared.out("a JSON file of lm_eval's results and samples")
@loop_options()
@common_options
def lm_eval(
    console: Console, tasks: tuple[str, ...], items: int | None, role: str, out: Path | None, **loop: Any
) -> None:
    """Let lm_eval (extra lm-eval) score the drafter or the pipeline on its own tasks, to check our figures there.

    Those of draft–verify are without a check; so is this, unless --check arithmetic is given.

    Example: rsgwm lm-eval --task gsm8k --items 20 --as drafter --out lm-eval.json
    """
    from mlx_rsgwm.core.config import read_yaml
    from mlx_rsgwm.core.files import LARGEST_YAML, read_text, write_json
    from mlx_rsgwm.core.resume import json_values
    from mlx_rsgwm.studies.lm_eval import drive, load_lm_eval

    load_lm_eval()
    chosen: list[Any] = []
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            chosen.append(read_yaml(read_text(Path(task), LARGEST_YAML), task))
        else:
            chosen.append(task)
    loop["check"] = "none" if loop["check"] == "auto" else loop["check"]
    results = drive(build_pipeline(console, loop), chosen, role, items, console.seed)
    for name, scores in results["results"].items():
        for key, value in scores.items():
            if isinstance(value, float):
                console.line(f"{name}: {key} {value:.4f}")
    scored = json_values({"results": results["results"], "samples": results.get("samples")})
    if out is not None:
        write_json(out, scored)
        console.line(f"results: {out}")
    console.result({"results": scored["results"]})
