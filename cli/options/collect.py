"""Options of the commands that pass once over data with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from mlx_rsgwm.cli.options.paths import PATH

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = (
    click.argument("adapter_folder", metavar="ADAPTER", type=PATH),
    click.option(
        "--data",
        "folder",
        type=PATH,
        required=True,
        help="Corpus folder, folder with train.jsonl, or .jsonl file.",
    ),
    click.option("--base", "base_name", help="Hub id, folder, .gguf or alias.  [default: the adapter's own]"),
    click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True),
    click.option(
        "--max-tokens", type=click.IntRange(2), default=1024, show_default=True, help="Longer rows are left out."
    ),
)


def collect_options(command: F) -> F:
    """Add them; the command takes them as keywords."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
