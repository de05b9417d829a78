"""Readers of files of other formats: tables that converters fill and ``base`` and ``adapter_sources`` ask.

Neither of those knows a format; whoever adds one adds a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_rsgwm.core.progress import Progress

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_rsgwm.models.adapter import Adapter

# The array file of a PEFT adapter: converters read and write it, others tell by it what a folder is.
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class FileReader:
    """How a file becomes a Hugging Face folder.

    ``version``: of what ``convert`` makes, part of the cached folder's name. ``convert``: called with the file, the
    folder to write and a progress; writes it whole or not at all, and returns it. ``check``: refuses a file that is not
    there or not sound, by its header alone.
    """

    version: int
    convert: Callable[[Path, Path, Progress], Path]
    check: Callable[[Path], object]


@dataclass(frozen=True)
class AdapterReader:
    """How an adapter of another format becomes one of ours in memory.

    ``recognises``: whether a file or folder is of the format, by names alone. ``read``: called with it, the name of the
    base to read it for (None: the one that it names itself), a progress, and whether values may be left on disk, as
    :class:`UnreadArrays`; else they are checked. Nothing is written.
    """

    recognises: Callable[[Path], bool]
    read: Callable[[Path, str | None, Progress, bool], Adapter]


class UnreadArrays(dict[str, "mx.array"]):
    """Arrays of a file of another format by our names, lazy; ``anew`` opens the file again, so that whoever drops an
    array after its use needs the memory of a few: an array in here stays once it is read.
    """

    def __init__(self, arrays: Mapping[str, mx.array], anew: Callable[[], dict[str, mx.array]]) -> None:
        super().__init__(arrays)
        self.anew = anew


# By a file's suffix; called when the first such file is met, so that no start pays for the imports.
FILE_READERS: dict[str, Callable[[], FileReader]] = {}
# By the format's name. Their functions import what they need when they are called.
ADAPTER_READERS: dict[str, AdapterReader] = {}
