"""Folders that are whole or absent, the lock that keeps two processes from writing one, and room on the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.temporary import remove_leftovers, shortened, temporary_folder

LOCK_FILE = ".lock"
LAST_FILES = {
    "adapters.safetensors",
    "adapter_config.json",
    "manifest.json",
    "config.json",
}  # without them nothing loads
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_held = threading.local()  # the locks that this thread holds, so that an inner writer may enter them too


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep every other process from writing ``folder``, which is made if need be, while the body runs.

    What a killed process left half written there is removed first. Whether there is a result in the way is to be looked
    at inside: before, another process may still be writing one. The thread that holds the lock may enter again.

    The system lets go of the lock when the process ends, however it ends. Where the file system knows no locks (some
    network drives), nothing is locked.

    Raises:
        RsgwmError: another process holds it, or the folder cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder)
    try:
        with _holding(folder / LOCK_FILE, folder):
            remove_leftovers(folder)
            yield
    finally:
        with suppress(OSError):  # unless one holds something now
            for each in made:
                each.rmdir()


@contextmanager
def exclusive_file(path: Path) -> Iterator[None]:
    """Keep every other process from writing the file ``path``, and what stands beside it, while the body runs.

    Raises:
        RsgwmError: another process holds it, or the folder cannot be written.
    """
    folder = make_folder(path.absolute().parent)
    with _holding(folder / f".{shortened(path.name)}{LOCK_FILE}", path):
        remove_leftovers(folder)
        yield


@contextmanager
def _holding(path: Path, place: Path) -> Iterator[None]:
    """Hold the lock of the file at ``path``, which is for ``place``; it is gone afterwards."""
    held: set[Path] = _held.__dict__.setdefault("locks", set())
    path = path.parent.resolve() / path.name
    if path in held:
        yield
        return
    try:
        descriptor = _locked(path)
    except BlockingIOError:
        raise RsgwmError(
            f"another process is writing {place}; wait until it has ended, or choose another place"
        ) from None
    except OSError as error:
        raise RsgwmError(f"cannot write {path}: {error.strerror or error}") from error
    held.add(path)
    try:
        yield
    finally:
        held.discard(path)
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """The descriptor of the file at ``path`` with its lock held; ``BlockingIOError`` where another process has it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except FileNotFoundError:  # whoever had made the folder removed it again
            make_folder(path.parent)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # whoever held it removed it meanwhile: that file is nobody's any more


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name ``out`` in one step when the body is done, or is removed when it fails.

    Whoever kills the process finds nothing under that name, and what it left beside it goes with the next folder or
    file that is written there. Bodies may nest: an inner one fills the folder of an outer one.

    Args:
        out: a folder that does not exist yet, or an empty one.
    """
    place = out.resolve()
    inside = place.is_mount()  # a file system's own root can be neither removed nor renamed
    parent = make_folder(place if inside else place.parent)
    remove_leftovers(parent)
    work = temporary_folder(parent / (place.name or "new"))
    try:
        work.mkdir()
        yield work
        _flush(work)
        if inside:
            for file in sorted(work.iterdir(), key=lambda file: file.name in LAST_FILES):
                os.rename(file, place / file.name)
        else:
            if place.is_dir():
                place.rmdir()
            os.rename(work, place)
    except OSError as error:
        raise RsgwmError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring every file below ``folder`` to the disk: after a power cut a name that is there is of whole files."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                flush(path)


def flush(path: Path) -> None:
    """Bring what was written to the file ``path`` to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Create ``path`` with its parents; a file in the way or a read-only place is a clear error."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a name with a zero byte in it is a ValueError
        if isinstance(error, FileExistsError):
            raise RsgwmError(f"{path} is a file, and a folder is to be there; choose another name") from error
        raise RsgwmError(f"cannot create folder {path}: {getattr(error, 'strerror', None) or error}") from error
    return path


def require_empty(out: Path) -> None:
    """Refuse an output folder that holds anything: a half-old, half-new result must never exist."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RsgwmError(f"{out} exists and is not an empty folder; choose another one or remove it")


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start writing ``needed`` bytes below ``folder`` when the file system has not that much room."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        units = ((1e6, "MB"), (1e3, "KB"), (1.0, "bytes"))
        size, unit = next((size, unit) for size, unit in units if round(needed / size) != round(free / size))
        raise RsgwmError(
            f"not enough disk space for {folder}: {needed / size:.0f} {unit} needed, {free / size:.0f} {unit} free; "
            "free some space or choose another folder"
        )
