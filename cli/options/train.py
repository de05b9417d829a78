"""The options of training commands, and how they and a YAML become settings: given options win over the file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import COUNT, FORMAT, INSIDE, PERCENTAGES, POSITIVE, Number, OneOf, Whole
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.training.config import FINE_TUNE_TYPES, LONG_ROWS, OPTIMIZERS, SCHEDULES, SELECTIONS, TrainConfig
from mlx_rsgwm.training.reporting import SERVICES

if TYPE_CHECKING:
    from mlx_rsgwm.training.checkpoints import Saving

# Defaults of Saving, which is slow to import; a test holds them equal.
SAVE_EVERY, KEEP, SNAPSHOTS = 100, 3, (0.01, 0.02, 0.05)
OPEN_SHARE = Number(0, 1, max_open=True)
AT_LEAST_0 = Number(0)
ABOVE_0 = Number(0, min_open=True)

# Option, field of TrainConfig, type, help; the defaults are TrainConfig's.
FIELDS: tuple[tuple[str, str, click.ParamType, str], ...] = (
    ("--rank", "rank", POSITIVE, "Rank of the result."),
    ("--alpha", "alpha", ABOVE_0, "Scale of the update is alpha / rank."),
    ("--dropout", "dropout", OPEN_SHARE, "Share of an adapter's inputs left out of a step."),
    ("--layers", "num_layers", Whole(-1), "Blocks to adapt, from the last; -1 for all."),
    ("--type", "fine_tune_type", OneOf(FINE_TUNE_TYPES), "Kind of adapter."),
    ("--epochs", "epochs", POSITIVE, "Passes over the rows."),
    ("--steps", "steps", COUNT, "End after so many steps instead of epochs; 0 for epochs."),
    ("--batch-size", "batch_size", POSITIVE, shared.BATCH_SIZE),
    ("--accumulate", "accumulate", POSITIVE, "Batches of a step."),
    ("--optimizer", "optimizer", OneOf(OPTIMIZERS), "How gradients become steps."),
    ("--learning-rate", "learning_rate", INSIDE, "Highest learning rate."),
    ("--warmup", "warmup", OPEN_SHARE, "Share of the run in which the rate rises."),
    ("--schedule", "schedule", OneOf(SCHEDULES), "How the rate goes on after it."),
    ("--weight-decay", "weight_decay", AT_LEAST_0, "Decoupled, for adamw."),
    ("--clip", "clip", AT_LEAST_0, "Greatest norm of the gradient; 0 for none."),
    ("--max-seq-length", "max_tokens", Whole(2), f"{shared.ROW_LENGTH}; see --long-rows."),
    ("--long-rows", "long_rows", OneOf(LONG_ROWS), "What becomes of longer rows; both are counted."),
    ("--validate-every", "validate_every", COUNT, "Score the held-out rows every so many steps; 0 for never."),
    ("--patience", "patience", COUNT, "Stop after so many scores without a new lowest; 0 for never."),
    ("--select", "select", OneOf(SELECTIONS), "Keep the weights of the last step, or of the best score."),
    ("--init-seed", "init_seed", COUNT, "Seed of lora_a: the same for every adapter of a pool."),
    (
        "--directions",
        "directions",
        COUNT,
        f"{shared.SKETCH_COLUMNS}; 0 for none.",
    ),
    ("--directions-every", "directions_every", POSITIVE, "Every nth token goes into them."),
)


def _option(flag: str, field: str, kind: click.ParamType, text: str) -> Any:
    """An option that is None unless given, so that a YAML's value stands; help shows the config's default."""
    return click.option(flag, field, type=kind, help=f"{text}  [default: {getattr(TrainConfig, field)}]")


SETTINGS = (
    *(_option(*row) for row in FIELDS),
    click.option(
        "--key", "keys", multiple=True, help="Module to adapt (self_attn.q_proj, …), or all-linear; repeatable."
    ),
    click.option(
        "--qat",
        type=FORMAT,
        help="Train through the rounding to this format, on a dense base: 4, or 3,32, or 4,mxfp4, or 3,symmetric.",
    ),
    click.option("--recompute/--no-recompute", default=None, help="Less memory, more time: gradient checkpointing."),
)
RUNNING = (
    click.option("--resume", is_flag=True, help="Continue an unfinished run from its newest checkpoint."),
    click.option(
        "--save-every", type=COUNT, help=f"Steps between checkpoints; 0 for only the last.  [default: {SAVE_EVERY}]"
    ),
    click.option("--keep", type=POSITIVE, help=f"Checkpoints to keep.  [default: {KEEP}]"),
    click.option(
        "--snapshots",
        type=PERCENTAGES,
        help="Per cents of the steps after which the adapter is kept, for rsgwm probe; 0 for none.  [default: 1,2,5]",
    ),
    click.option("--report-to", help=f"{', '.join(SERVICES)}; several with commas. Needs their packages."),
    click.option("--project", help="Project name at these services.  [default: mlx-rsgwm]"),
    click.option("--cache-limit", type=AT_LEAST_0, help="Gigabytes of freed memory that MLX may hold on to."),
    click.option("--wired-limit", type=AT_LEAST_0, help="Gigabytes that MLX may wire (Apple silicon)."),
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


def train_config(
    console: Console, from_file: Mapping[str, Any], settings: Mapping[str, Any], file: Path | None = None
) -> TrainConfig:
    """The :class:`TrainConfig` of a YAML's settings with the options that were given laid over them.

    Raises:
        RsgwmError: what is out of range, with the name of the ``file`` where there is one.
    """
    given = {name: value for name, value in settings.items() if value is not None and value != ()}
    if console.seed_given or "seed" not in from_file:
        given["seed"] = console.seed
    known = {field.name for field in fields(TrainConfig)}
    assert set(given) <= known
    if set(given) & {"schedule", "warmup", "learning_rate"}:
        from_file = {name: value for name, value in from_file.items() if name != "lr_schedule"}
    try:
        return TrainConfig.from_mapping({**from_file, **given})
    except RsgwmError as error:
        raise RsgwmError(f"{file}: {error}") if file else error from None


def memory_options(running: Mapping[str, Any]) -> Any:
    """The :class:`MemoryOptions` that the options ask for."""
    from mlx_rsgwm.training.memory import MemoryOptions

    return MemoryOptions(running["cache_limit"], running["wired_limit"], not running["ignore_memory"])


def saving_options(folder: Path, from_file: Mapping[str, Any], running: Mapping[str, Any]) -> Saving:
    """The :class:`Saving` for an adapter folder."""
    from mlx_rsgwm.training.checkpoints import Saving

    given = {
        name: next((value for value in (running[option], from_file.get(option)) if value is not None), default)
        for name, option, default in (("every", "save_every", SAVE_EVERY), ("keep", "keep", KEEP))
    }
    snapshots = SNAPSHOTS if running["snapshots"] is None else running["snapshots"]
    return Saving(folder, given["every"], given["keep"], "continue" if running["resume"] else "refuse", snapshots)


def _names(options: tuple[Callable[..., Any], ...]) -> list[str]:
    """Parameter names of click options, in order."""

    def probe() -> None:
        """Carries the options for a moment."""

    for option in options:
        option(probe)
    return [parameter.name for parameter in probe.__click_params__]  # type: ignore[attr-defined]
