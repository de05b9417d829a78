"""The edges: PEFT, GGUF and the Hub, and the proof that what crosses them is unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_rsgwm.core.progress import Progress
from mlx_rsgwm.models.file_readers import ADAPTER_READERS, FILE_READERS, PEFT_WEIGHTS_FILE, AdapterReader, FileReader

if TYPE_CHECKING:
    from mlx_rsgwm.models.adapter import Adapter

PEFT_FILES = (PEFT_WEIGHTS_FILE, f"{PEFT_WEIGHTS_FILE}.index.json")


def _gguf_reader() -> FileReader:
    from mlx_rsgwm.converters.gguf.file import open_gguf
    from mlx_rsgwm.converters.gguf.read import CONVERSION_VERSION, convert_gguf

    return FileReader(CONVERSION_VERSION, convert_gguf, open_gguf)


def _from_peft(path: Path, base: str | None, progress: Progress, lazy: bool) -> Adapter:
    from mlx_rsgwm.converters.peft.convert import from_peft_on

    return from_peft_on(path, base, progress, lazy)


def _from_gguf(path: Path, base: str | None, progress: Progress, lazy: bool) -> Adapter:
    from mlx_rsgwm.converters.gguf.read_adapter import from_gguf

    return from_gguf(path, base, progress)


FILE_READERS[".gguf"] = _gguf_reader
ADAPTER_READERS["peft"] = AdapterReader(lambda path: any((path / name).is_file() for name in PEFT_FILES), _from_peft)
ADAPTER_READERS["gguf"] = AdapterReader(lambda path: path.suffix == ".gguf" and path.is_file(), _from_gguf)
