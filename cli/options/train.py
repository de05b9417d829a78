"""The options of training commands, and how they and a YAML become settings: given options win over the file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console

SETTINGS = (
    click.option("--rank", type=int, help="Rank of the update.  [default: 16]"),
    click.option("--alpha", type=float, help="Scale of the update is alpha / rank.  [default: 32]"),
    click.option("--dropout", type=float, help="[default: 0.05]"),
    click.option(
        "--key",
        "keys",
        multiple=True,
        help="Module to adapt (self_attn.q_proj, …), or all-linear; repeat.",
    ),
    click.option("--layers", "num_layers", type=int, help="Blocks to adapt, from the last; -1 for all.  [default: -1]"),
    click.option("--type", "fine_tune_type", help="lora or dora.  [default: lora]"),
    click.option("--epochs", type=int, help="[default: 2]"),
    click.option("--steps", type=int, help="End after so many steps instead of epochs."),
    click.option("--batch-size", type=int, help="Rows at once.  [default: 8]"),
    click.option("--accumulate", type=int, help="Batches of a step.  [default: 1]"),
    click.option("--optimizer", help="adam or adamw.  [default: adam]"),
    click.option("--learning-rate", type=float, help="[default: 0.0005]"),
    click.option("--warmup", type=float, help="Share of the run in which the rate rises.  [default: 0.05]"),
    click.option("--schedule", help="constant, linear or cosine.  [default: linear]"),
    click.option("--weight-decay", type=float, help="Decoupled, for adamw.  [default: 0]"),
    click.option("--clip", type=float, help="Greatest norm of the gradient; 0 for none.  [default: 0]"),
    click.option("--max-tokens", type=int, help="Longest row.  [default: 1024]"),
    click.option("--long-rows", help="drop longer rows, or cut them; both are counted.  [default: drop]"),
    click.option("--recompute/--no-recompute", default=None, help="Less memory, more time: gradient checkpointing."),
    click.option("--validate-every", type=int, help="Score the held-out rows every so many steps.  [default: never]"),
    click.option("--patience", type=int, help="Stop after so many scores without a new lowest.  [default: 0, never]"),
    click.option("--select", help="Keep the weights of the last step, or of the best score.  [default: last]"),
    click.option("--init-seed", type=int, help="Seed of lora_a: the same for every adapter of a pool.  [default: 42]"),
)
RUNNING = (
    click.option("--resume", is_flag=True, help="Continue an unfinished run from its newest checkpoint."),
    click.option("--save-every", type=int, help="Steps between checkpoints; 0 for only the last.  [default: 100]"),
    click.option("--keep", type=int, help="Checkpoints to keep.  [default: 3]"),
    click.option("--report-to", help="wandb, swanlab, trackio; several with commas. Needs their packages."),
    click.option("--project", help="Project name at these services.  [default: mlx-rsgwm]"),
    click.option("--cache-limit", type=float, help="Gigabytes of freed memory that MLX may hold on to."),
    click.option("--wired-limit", type=float, help="Gigabytes that MLX may wire (Apple silicon)."),
    click.option("--ignore-memory", is_flag=True, help="Start even if the memory estimate says that it will not fit."),
)


def train_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command all settings of a run; they come as two mappings, ``settings`` and ``running``."""
    names = {"settings": _names(SETTINGS), "running": _names(RUNNING)}

    @functools.wraps(function)
    def command(*arguments: Any, **options: Any) -> None:
        for group, members in names.items():
            options[group] = {name: options.pop(name) for name in members}
        function(*arguments, **options)

    wrapped: Callable[..., None] = command
    for option in reversed((*SETTINGS, *RUNNING)):
        wrapped = option(wrapped)
    return wrapped


def train_config(console: Console, from_file: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """The :class:`TrainConfig` of a YAML's settings with the options that were given laid over them."""
    from mlx_rsgwm.training.config import TrainConfig

    given = {name: value for name, value in settings.items() if value is not None and value != ()}
    if console.seed_given or "seed" not in from_file:
        given["seed"] = console.seed
    known = {field.name for field in fields(TrainConfig)}
    assert set(given) <= known
    if set(given) & {"schedule", "warmup", "learning_rate"}:
        from_file = {name: value for name, value in from_file.items() if name != "lr_schedule"}
    return TrainConfig.from_mapping({**from_file, **given})


def memory_options(running: Mapping[str, Any]) -> Any:
    """The :class:`MemoryOptions` that the options ask for."""
    from mlx_rsgwm.training.memory import MemoryOptions

    return MemoryOptions(running["cache_limit"], running["wired_limit"], not running["ignore_memory"])


def saving_options(folder: Path, from_file: Mapping[str, Any], running: Mapping[str, Any]) -> Any:
    """The :class:`Saving` for an adapter folder."""
    from mlx_rsgwm.training.checkpoints import Saving

    given = {
        name: next((value for value in (running[option], from_file.get(option)) if value is not None), default)
        for name, option, default in (("every", "save_every", 100), ("keep", "keep", 3))
    }
    return Saving(folder, given["every"], given["keep"], "continue" if running["resume"] else "refuse")


def _names(options: tuple[Callable[..., Any], ...]) -> list[str]:
    """Parameter names of click options, in order."""

    def probe() -> None:
        """Carries the options for a moment."""

    for option in options:
        option(probe)
    return [parameter.name for parameter in probe.__click_params__]  # type: ignore[attr-defined]
