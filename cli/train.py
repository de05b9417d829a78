"""``rsgwm train``: one LoRA or DoRA adapter from a corpus, or from mlx-lm's chat, completions or text rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH
from mlx_rsgwm.cli.options.train import memory_options, saving_options, train_config, train_options
from mlx_rsgwm.models.base import DEFAULT_BASE


@click.command()
@click.option("--config", "file", type=PATH, help="YAML of settings: ours, or one of mlx_lm.lora.")
@shared.base(DEFAULT_BASE)
@shared.corpus(name="folder")
@click.option("--held-out", type=PATH, help="As --corpus: scored, never trained.  [default: valid.jsonl beside it]")
@shared.mask_prompt(None)
@click.option("--all-turns", is_flag=True, help="Mask prompts, and train every answer of a chat, not the last alone.")
@click.option("--test", is_flag=True, help="Score test.jsonl, beside the training rows, at the end.")
@click.option("--warm-start", type=PATH, help="Adapter folder or .safetensors to begin with.")
@shared.out("an adapter folder")
@train_options
@common_options
def train(
    console: Console,
    file: Path | None,
    folder: Path | None,
    out: Path | None,
    settings: Mapping[str, Any],
    running: Mapping[str, Any],
    **options: Any,
) -> None:
    """Train one adapter and keep its importance, Adam's second moment of every parameter.

    Ctrl-C and kill save first; the same command with --resume resumes; the final weights are bit-identical.

    \b
    Examples:
      rsgwm train --corpus corpus/change --out pool/change --epochs 1
      rsgwm train --corpus corpus/change --out pool/change-4bit --qat 4
      rsgwm train --config lora_config.yaml
      mlx.launch -n 2 -- rsgwm train --corpus corpus/change --out pool/change
    """
    from mlx_rsgwm.training.job import make_job, run_job, target_folder
    from mlx_rsgwm.training.mlx_lm_yaml import TrainingFile, read_training_file

    asked = read_training_file(file) if file else TrainingFile()
    target = target_folder(asked, folder, out)
    config = train_config(console, asked.config, settings, file)
    saving = saving_options(target, asked.run, running)
    given = {**options, **running, "folder": folder}
    job = make_job(asked, given, config, saving, memory_options(running), file)
    adapter = run_job(job, console.progress)
    if adapter is None:  # another process writes and tells
        return
    summary = training_summary(target, adapter.manifest)
    console.line(render(summary, config.max_tokens))
    console.result(summary)


def training_summary(out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the command's JSON says of a finished run."""
    return {
        "out": str(out),
        "steps": len(manifest["history"]),
        "kept_step": manifest["kept_step"],
        "last_loss": manifest["history"][-1][2],
        "seconds": manifest["seconds"],
        "tokens": manifest["tokens"],
        "rows": manifest["data"]["rows"],
        "rows_too_long": manifest["data"]["rows_too_long"],
        "rows_cut": manifest["data"]["rows_cut"],
        "held_out_loss": manifest["held_out_loss"],
        "held_out_rows": manifest.get("held_out_rows"),
        "test_loss": manifest.get("test_loss"),
        "test_rows": manifest.get("test_rows"),
        "memory": manifest["memory"],
    }


def render(summary: Mapping[str, Any], max_tokens: int) -> str:
    """The text a person reads at the end of a run."""
    rate = summary["tokens"]["real"] / max(summary["seconds"], 1e-9)
    lines = [
        f"{summary['out']}: {summary['steps']} steps in {summary['seconds']:.0f} s ({rate:.0f} tokens/s), "
        f"last loss {summary['last_loss']:.3f}"
    ]
    if summary["kept_step"] != summary["steps"]:
        lines.append(f"kept the weights of step {summary['kept_step']}, the best held-out score")
    if summary["rows_too_long"]:
        lines.append(f"{summary['rows_too_long']} rows were longer than {max_tokens} tokens and left out")
    if summary["rows_cut"]:
        lines.append(f"{summary['rows_cut']} rows were cut to {max_tokens} tokens")
    held = summary["held_out_rows"] or {"rows_too_long": 0, "rows_cut": 0}
    if held["rows_too_long"] or held["rows_cut"]:
        lines.append(
            f"held-out rows above {max_tokens} tokens: {held['rows_too_long']} left out, {held['rows_cut']} cut"
        )
    for name, counts in (("held-out", summary["held_out_rows"]), ("test", summary["test_rows"])):
        if counts and counts.get("also_trained"):
            lines.append(
                f"NOT NEW: {counts['also_trained']} of {counts['rows']} {name} rows ask what was trained on, too"
            )
    for role, value in summary["held_out_loss"]["after"].items():
        before = summary["held_out_loss"]["before"][role]
        lines.append(f"held-out {role} loss: {before:.3f} → {value:.3f} nats per token")
    for role, value in (summary["test_loss"] or {}).items():
        lines.append(f"test {role} loss: {value:.3f} nats per token, perplexity {math.exp(value):.3f}")
    return "\n".join(lines)
