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


@click.command()
@click.option("--config", "file", type=PATH, help="YAML of settings: ours, or one of mlx_lm.lora.")
@shared.base("smollm2-135m")
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
    base_name: str | None,
    folder: Path | None,
    held_out: Path | None,
    mask_prompt: bool | None,
    all_turns: bool,
    test: bool,
    warm_start: Path | None,
    out: Path | None,
    settings: Mapping[str, Any],
    running: Mapping[str, Any],
) -> None:
    """Train one adapter and keep its importance, Adam's second moment of every parameter.

    Ctrl-C and kill save first; the same command with --resume resumes; the final weights are bit-identical.

    \b
    Examples:
      rsgwm train --corpus corpus/change --out pool/change --epochs 1
      rsgwm train --config lora_config.yaml
      mlx.launch -n 2 -- rsgwm train --corpus corpus/change --out pool/change
    """
    from mlx_rsgwm.core.distributed import launched_processes
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.progress import SILENT
    from mlx_rsgwm.data.loading import load_data, load_test
    from mlx_rsgwm.models.adapter import is_complete
    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.training.checkpoints import new_adapter
    from mlx_rsgwm.training.loop import finish
    from mlx_rsgwm.training.loop import train as train_adapter
    from mlx_rsgwm.training.mlx_lm_yaml import TrainingFile, read_training_file
    from mlx_rsgwm.training.reporting import NO_REPORTS, open_reports
    from mlx_rsgwm.training.warm_start import WarmStart

    asked = read_training_file(file) if file else TrainingFile()
    chosen: dict[str, Any] = {
        "base": base_name or asked.run.get("base") or "smollm2-135m",
        "data": folder or asked.run.get("data"),
        "out": out or asked.run.get("out"),
        "held_out": held_out or asked.run.get("held_out"),
    }
    missing = [flag for flag, name in (("--corpus", "data"), ("--out", "out")) if chosen[name] is None]
    if missing:
        raise RsgwmError(f"{' and '.join(missing)} must be given, as options or in the --config file")
    target = Path(chosen["out"])
    processes = launched_processes()
    if processes.writes:
        click.get_current_context().with_resource(new_adapter(target))
    elif is_complete(target):
        raise RsgwmError(f"{target} already holds a finished adapter; choose another folder or remove it")
    config = train_config(console, asked.config, settings)
    saving = saving_options(target, asked.run, running)
    memory = memory_options(running)
    mask = mask_prompt if mask_prompt is not None else bool(asked.run.get("mask_prompt", False))
    reading: dict[str, Any] = {
        "mask_prompt": mask,
        "all_turns": (all_turns or asked.run.get("all_turns", False)) and mask_prompt is not False,
        "features": asked.run.get("features"),
    }
    data = Path(chosen["data"])
    corpus, held = load_data(data, Path(chosen["held_out"]) if chosen["held_out"] else None, **reading)
    tested = load_test(data, **reading) if test or asked.run.get("test") else None
    begin = warm_start or asked.run.get("warm_start")
    weights = WarmStart.load(Path(begin)) if begin else None
    if file and held is None and config.validate_every:  # mlx-lm goes on without validation, too
        from dataclasses import replace

        config = replace(config, validate_every=0, patience=0, select="last")
        asked.notes.append("there are no held-out rows: no validation")
    progress = console.progress if processes.writes else SILENT
    if processes.writes:
        for note in asked.notes:
            progress.message(f"{file}: {note}")
    services = [name.strip() for name in (running["report_to"] or asked.run.get("report_to") or "").split(",")]
    services = [name for name in services if name]
    base = load_base(chosen["base"], progress=progress)
    reports = NO_REPORTS
    if services and processes.writes:
        project = running["project"] or asked.run.get("project") or "mlx-rsgwm"
        reports = open_reports(services, project, target, config.describe())
    try:
        adapter = train_adapter(
            base, corpus, config, held, progress=progress, saving=saving, reports=reports, memory=memory,
            processes=processes, warm_start=weights, test=tested,
        )  # fmt: skip
    finally:
        reports.close()
    if not processes.writes:
        return
    finish(adapter, saving)
    summary = summarise(target, adapter.manifest)
    console.line(render(summary, config.max_tokens))
    console.result(summary)


def summarise(out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
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
