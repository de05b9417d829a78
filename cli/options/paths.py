"""Names of files and folders on the command line: written out where they begin with ``~``, never empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class FilePath(click.Path):
    """A path as :func:`mlx_rsgwm.core.files.expanded` takes it.

    ``--out "$FOLDER"`` with a variable that is not set would otherwise be the current folder.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from mlx_rsgwm.core.files import expanded

        if isinstance(value, str) and not value.strip():
            self.fail("is empty; name a file or folder", param, ctx)
        return super().convert(expanded(value) if isinstance(value, str) and value != "-" else value, param, ctx)


PATH = FilePath()


class AdapterSource(FilePath):
    """A source as :func:`mlx_rsgwm.models.adapter_sources.load_adapter` takes it; hf://… stays text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.startswith("hf:/"):
            return value
        return super().convert(value, param, ctx)


SOURCE = AdapterSource()
SOURCES = "a folder (ours, mlx-lm's or PEFT's), a .gguf file, a Hub id or hf://owner/name@revision"
