"""``rsgwm train``: one LoRA adapter from one corpus."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options


@click.command()
@click.option("--base", "base_name", default="smollm2-135m", show_default=True, help="Hub id, folder, .gguf or alias.")
@click.option(
    "--data", "folder", type=click.Path(path_type=Path), required=True, help="Corpus folder (rsgwm data build)."
)
@click.option("--held-out", type=click.Path(path_type=Path), help="Corpus scored before and after, never trained.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Adapter folder to write.")
@click.option("--rank", default=16, show_default=True)
@click.option("--alpha", default=32.0, show_default=True, help="Scale of the update is alpha / rank.")
@click.option("--dropout", default=0.05, show_default=True)
@click.option(
    "--layers", "num_layers", default=-1, show_default=True, help="Blocks to adapt, from the last; -1 for all."
)
@click.option("--epochs", default=2, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--learning-rate", default=5e-4, show_default=True)
@click.option("--schedule", default="linear", show_default=True, help="constant, linear or cosine.")
@click.option("--max-tokens", default=1024, show_default=True, help="Longer rows are left out, and counted.")
@click.option(
    "--init-seed", default=42, show_default=True, help="Seed of lora_a: the same for every adapter of a pool."
)
@common_options
def train(
    console: Console,
    base_name: str,
    folder: Path,
    held_out: Path | None,
    out: Path,
    rank: int,
    alpha: float,
    dropout: float,
    num_layers: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    schedule: str,
    max_tokens: int,
    init_seed: int,
) -> None:
    """Train one LoRA adapter and keep how hard the optimiser pulled on every parameter.

    Example: rsgwm train --data corpus/change --out pool/change --epochs 1
    """
    from mlx_rsgwm.adapter import is_complete
    from mlx_rsgwm.base import load_base
    from mlx_rsgwm.data.corpus import load_corpus
    from mlx_rsgwm.errors import RsgwmError
    from mlx_rsgwm.training.config import TrainConfig
    from mlx_rsgwm.training.loop import train as train_adapter

    if is_complete(out):
        raise RsgwmError(f"{out} already holds a finished adapter; choose another folder or remove it")
    config = TrainConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        num_layers=num_layers,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        max_tokens=max_tokens,
        seed=console.seed,
        init_seed=init_seed,
    )
    corpus = load_corpus(folder)
    held = load_corpus(held_out) if held_out else None
    adapter = train_adapter(
        load_base(base_name, progress=console.progress), corpus, config, held, progress=console.progress
    )
    adapter.save(out)
    manifest = adapter.manifest
    steps, last = len(manifest["history"]), manifest["history"][-1][2]
    rate = manifest["tokens"]["real"] / manifest["seconds"]
    console.line(f"{out}: {steps} steps in {manifest['seconds']:.0f} s ({rate:.0f} tokens/s), last loss {last:.3f}")
    if manifest["data"]["rows_too_long"]:
        console.line(f"{manifest['data']['rows_too_long']} rows were longer than {max_tokens} tokens and left out")
    for role, value in manifest["held_out_loss"]["after"].items():
        console.line(
            f"held-out {role} loss: {manifest['held_out_loss']['before'][role]:.3f} → {value:.3f} nats per token"
        )
    console.result(
        {
            "out": str(out),
            "steps": steps,
            "seconds": manifest["seconds"],
            "tokens": manifest["tokens"],
            "rows_too_long": manifest["data"]["rows_too_long"],
            "held_out_loss": manifest["held_out_loss"],
        }
    )
