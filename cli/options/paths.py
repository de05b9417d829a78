"""Names of files and folders on the command line: written out where they begin with ``~``, never empty."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
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
        if not isinstance(value, str) or value == "-":
            return super().convert(value, param, ctx)
        path = expanded(value)
        if value.endswith("/") and os.path.isfile(path):
            self.fail(f"{value!r} names a folder, and there is a file; leave the / at its end out", param, ctx)
        return super().convert(path, param, ctx)


class NewPath(FilePath):
    """A file or folder to write: what could not be written is said before the work.

    Its name is UTF-8, for MLX opens no others, and it is no device or pipe, whose place a file would take.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from mlx_rsgwm.core.files import other_kind

        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            self.fail("is not UTF-8; choose another name", param, ctx)
        path = super().convert(value, param, ctx)
        if isinstance(path, Path) and (kind := other_kind(path)) and not os.path.isdir(path):
            self.fail(f"{value!r} is {kind}; name a file or folder", param, ctx)
        return path


class NewFile(NewPath):
    """A file to write, in the place of a file or of nothing."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if isinstance(path, Path) and (os.path.isdir(path) or str(value).endswith("/")):
            self.fail(f"{str(value)!r} is a folder; name a file", param, ctx)
        return path


PATH = FilePath()
NEW_PATH = NewPath()
NEW_FILE = NewFile()


class AdapterSourceType(FilePath):
    """A source as :func:`mlx_rsgwm.models.adapter_sources.load_adapter` takes it; hf://… stays text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.startswith("hf:/"):
            return value
        return super().convert(value, param, ctx)


class SeveralOption(click.Option):
    """An option that may be given more than once, and takes what a shell makes of a pattern: ``--verifier pool/*``.

    Arguments after its value belong to it, too, as long as they are files or folders that are there.
    """

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """As click does it, with a look at the arguments that follow."""
        super().add_to_parser(parser, ctx)
        for name in self.opts:
            option = parser._long_opt[name]
            option.process = functools.partial(_process_with_rest, option.process)


def _process_with_rest(process: Callable[[Any, Any], None], value: Any, state: Any) -> None:
    process(value, state)
    while state.rargs and not state.rargs[0].startswith("-") and os.path.exists(os.path.expanduser(state.rargs[0])):
        process(state.rargs.pop(0), state)


SOURCE = AdapterSourceType()
SOURCES = "a folder (ours, mlx-lm's or PEFT's), a .gguf file, a Hub id or hf://owner/name@revision"
