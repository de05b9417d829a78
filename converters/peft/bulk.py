"""Conversions of folders: one adapter or many, proved afterwards if asked for, and what became of each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_rsgwm.converters.base_layers import BaseLayers, read_base_layers
from mlx_rsgwm.converters.peft.convert import Converted, convert_from_peft, convert_to_peft
from mlx_rsgwm.converters.peft.folder import INDEX_FILE, PeftFolder, open_peft
from mlx_rsgwm.converters.peft.layout import PeftReading
from mlx_rsgwm.converters.peft.names import parse_name
from mlx_rsgwm.converters.peft.raw_arrays import RawArray, read_raw
from mlx_rsgwm.converters.peft.sidecar import PEFT_CONFIG_FILE
from mlx_rsgwm.converters.peft.verify import require_equal
from mlx_rsgwm.core.errors import CheckFailed, RsgwmError
from mlx_rsgwm.core.folders import new_folder, require_empty
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.models.adapter import WEIGHTS_FILE
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.models.base import resolve_base
from mlx_rsgwm.models.file_readers import PEFT_WEIGHTS_FILE

MOST_FOLDERS = 20_000  # that are looked into for adapters: a whole disk is a mistake


@dataclass(frozen=True)
class FolderResult:
    """What became of one folder: a conversion, a reason why there is none, or neither where it was there already."""

    source: Path
    out: Path
    converted: Converted | None = None
    error: str | None = None


def from_peft_verified(folder: Path, base: BaseLayers, out: Path, reading: PeftReading | None = None) -> Converted:
    """``convert_from_peft``, then the proof: both folders give the same updates, and back come the same bits.

    Raises:
        CheckFailed: naming the first layer that differs; the result is removed.
        RsgwmError: as ``convert_from_peft``.
    """
    reading = reading or PeftReading()
    with _proving(out) as (work, temporary):
        converted = convert_from_peft(folder, base, work, reading)
        require_equal(folder, work, base.names)
        convert_to_peft(work, base.name, temporary / "back")
        before = _peft_arrays(open_peft(folder))
        for name in [name for name in before if name.partition(" ")[0] in reading.left_out]:
            del before[name]
        _require_same_arrays(before, _peft_arrays(open_peft(temporary / "back")), folder)
    return converted._replace(out=out)


def to_peft_verified(source: AdapterSource, base_name: str | None, out: Path, progress: Progress = SILENT) -> Converted:
    """``convert_to_peft``, then the proof as in :func:`from_peft_verified`; the base is needed for the way back."""
    with _proving(out) as (work, temporary):
        adapter = load_adapter(source, base_name, progress=progress)
        folder = adapter.path or adapter.save(temporary / "ours")
        converted = convert_to_peft(folder, base_name, work)
        base = read_base_layers(converted.base, resolve_base(converted.base, progress))
        require_equal(work, folder, base.names)
        convert_from_peft(work, base, temporary / "back")
        _require_same_arrays(read_raw(folder / WEIGHTS_FILE), read_raw(temporary / "back" / WEIGHTS_FILE), folder)
    return converted._replace(out=out)


def is_peft(folder: Path) -> bool:
    """Whether a folder holds PEFT's weights, in one file or in shards."""
    return (folder / PEFT_WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def is_whole_peft(folder: Path) -> bool:
    """Whether a conversion to PEFT ended there; its configuration is written last."""
    return is_peft(folder) and (folder / PEFT_CONFIG_FILE).is_file()


def is_mlx(folder: Path) -> bool:
    """Whether a folder holds mlx-lm's adapter weights."""
    return (folder / WEIGHTS_FILE).is_file()


def adapter_folders(root: Path, is_adapter: Callable[[Path], bool]) -> list[Path]:
    """Every adapter below ``root``, in order; links to folders are not followed, nor is an adapter looked into.

    Raises:
        RsgwmError: there are more folders than anybody keeps adapters in.
    """
    folders = []
    for seen, (name, below, _) in enumerate(os.walk(root, followlinks=False)):
        if seen >= MOST_FOLDERS:
            raise RsgwmError(f"{root} has more than {MOST_FOLDERS} folders below; name the one that holds the adapters")
        below[:] = sorted(entry for entry in below if not entry.startswith("."))  # half-written folders have such names
        folder = Path(name)
        if is_adapter(folder):
            folders.append(folder)
            below.clear()
    return folders


def convert_all(
    root: Path,
    out: Path,
    is_adapter: Callable[[Path], bool],
    is_result: Callable[[Path], bool],
    convert: Callable[[Path, Path], Converted],
    suffix: str = "",
    progress: Progress = SILENT,
) -> list[FolderResult]:
    """Convert every adapter below ``root`` into what has the same relative name, and ``suffix``, below ``out``.

    One that cannot be converted does not stop the others; one whose result is there already is left alone.

    Raises:
        RsgwmError: there is no adapter below ``root``, or ``out`` lies inside it.
    """
    if not root.is_dir():
        raise RsgwmError(f"{root} does not exist")
    if out.resolve().is_relative_to(root.resolve()):
        raise RsgwmError(f"{out} lies inside {root}; choose a folder beside it")
    folders = adapter_folders(root, is_adapter)
    if not folders:
        raise RsgwmError(f"there is no such adapter in {root} or below")
    outcomes = []
    with progress.task("converting", len(folders)) as advance:
        for folder in folders:
            place = out / folder.relative_to(root)
            target = place.with_name(place.name + suffix)
            if is_result(target):
                outcomes.append(FolderResult(folder, target))
            else:
                try:
                    outcomes.append(FolderResult(folder, target, convert(folder, target)))
                except RsgwmError as error:
                    outcomes.append(FolderResult(folder, target, error=str(error)))
            advance(1, folder.name)
    return outcomes


@contextmanager
def _proving(out: Path) -> Iterator[tuple[Path, Path]]:
    """A folder that becomes ``out`` once what the body asks of it holds, and one for what goes afterwards."""
    require_empty(out)
    with new_folder(out) as work, tempfile.TemporaryDirectory(prefix="rsgwm-verify-") as temporary:
        try:
            yield work, Path(temporary)
        except RsgwmError as error:
            raise type(error)(str(error).replace(str(work), str(out))) from error


def _peft_arrays(folder: PeftFolder) -> dict[str, RawArray]:
    """A PEFT folder's arrays by what they are, so that names of older versions equal those of today."""
    arrays = {name: value for file in folder.weights for name, value in read_raw(file).items()}
    return {" ".join(parse_name(name) or (name,)): value for name, value in arrays.items()}


def _require_same_arrays(before: dict[str, RawArray], after: dict[str, RawArray], source: Path) -> None:
    lost = [name for name, value in before.items() if name not in after or not value.same_bits(after[name])]
    more = sorted(after.keys() - before.keys())
    if lost or more:
        what = f"{lost[0]} comes back changed" if lost else f"{more[0]} comes back in addition"
        raise CheckFailed(f"{source} does not survive there and back: {what} ({len(lost) + len(more)} arrays in all)")
