"""Readers of bases that are one file: a table that converters fill and :mod:`base` asks, which knows none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_rsgwm.core.progress import Progress


@dataclass(frozen=True)
class FileReader:
    """How a file becomes a Hugging Face folder.

    ``version``: of what ``convert`` makes, part of the cached folder's name. ``convert``: called with the file, the
    folder to write and a progress; writes it whole or not at all, and returns it.
    """

    version: int
    convert: Callable[[Path, Path, Progress], Path]


# By a file's suffix; called when the first such file is met, so that no start pays for the imports.
FILE_READERS: dict[str, Callable[[], FileReader]] = {}
