"""``rsgwm lm-eval``: lm-evaluation-harness drives the drafter or the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options.loop import build_pipeline, loop_options
from mlx_rsgwm.cli.options.paths import PATH


@click.command(name="lm-eval")
@click.option("--task", "tasks", multiple=True, required=True, help="lm_eval task, or a .yaml of one; repeatable.")
@click.option("--limit", type=int, help="Items of each task; default: all.")
@click.option("--as", "role", default="pipeline", show_default=True, help="pipeline or drafter.")
@click.option("--out", type=PATH, help="JSON file for lm_eval's results and samples.")
@loop_options
@common_options
def lm_eval(
    console: Console, tasks: tuple[str, ...], limit: int | None, role: str, out: Path | None, **loop: Any
) -> None:
    """Let lm_eval (extra lm-eval) score the drafter or the pipeline on its own tasks, to check our figures there.

    Example: rsgwm lm-eval --task gsm8k --limit 20 --as drafter --out lm-eval.json
    """
    import json

    from mlx_rsgwm.core.config import read_yaml
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.files import LARGEST_YAML, read_text, write_json
    from mlx_rsgwm.studies.lm_eval import drive, load_lm_eval

    load_lm_eval()
    if limit is not None and limit < 1:
        raise RsgwmError(f"--limit must be at least 1, found {limit}")
    chosen: list[Any] = []
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            chosen.append(read_yaml(read_text(Path(task), LARGEST_YAML), task))
        else:
            chosen.append(task)
    found = drive(build_pipeline(console, loop), chosen, role, limit, console.seed)
    for name, scores in found["results"].items():
        for key, value in scores.items():
            if isinstance(value, float):
                console.line(f"{name}: {key} {value:.4f}")
    plain = json.loads(json.dumps({"results": found["results"], "samples": found.get("samples")}, default=str))
    if out is not None:
        write_json(out, plain)
        console.line(f"results: {out}")
    console.result({"results": plain["results"]})
