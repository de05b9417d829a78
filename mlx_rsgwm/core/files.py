"""Reading and writing files safely: atomic renames, checked safetensors, hashes, room on disk.

Every file this project writes goes through here, so that a crash leaves either the old file or the new one and
never half of one. Only safetensors is read as array data.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_rsgwm.core.errors import RsgwmError

LARGEST_JSON = 256 << 20  # bytes; the index of the largest model or the history of a long run has a few millions
LOCK_FILE = ".lock"
HALF_WRITTEN = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")  # the names that `temporary_for` gives
NEW_FOLDER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.part")  # the names that `new_folder` gives meanwhile
LAST_FILES = {
    "adapters.safetensors",
    "adapter_config.json",
    "manifest.json",
    "config.json",
}  # without them nothing loads
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def replace_file(path: Path, temporary: Path) -> None:
    """Flush ``temporary`` to disk, then rename it to ``path`` in one step."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def temporary_for(path: Path) -> Path:
    """Name of the temporary file beside ``path``: the same folder, so that the rename stays on one file system.

    The suffix is kept, since ``mx.save_safetensors`` appends its own to names without it.
    """
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    temporary = temporary_for(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        replace_file(path, temporary)
    except OSError as error:
        raise RsgwmError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sorted by insertion, two-space indent, NaN refused (it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_figure(path: Path, figure: Any, dpi: int = 110) -> None:
    """Write a matplotlib figure as PNG, whole or not at all; a failure is a :class:`RsgwmError` that names the file.

    Names of tasks and adapters are shown as they are: a ``$`` in one begins no formula, and a sign that the font lacks
    is drawn as a box without a word on standard error.
    """
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    temporary = temporary_for(path)
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)  # a "$" in the name of a task or an adapter is a dollar, not mathematics
    try:
        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(temporary, dpi=dpi, format="png")
        replace_file(path, temporary)
    except OSError as error:
        raise RsgwmError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a :class:`RsgwmError` that names it."""
    try:
        return parse_json(read_text(path, LARGEST_JSON))
    except ValueError as error:
        raise RsgwmError(f"{path} is not valid JSON: {error}") from error


def parse_json(text: str) -> Any:
    """``json.loads`` with every refusal a ``ValueError``: also of deep nesting, endless integers, half characters."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(str(error).partition(";")[0]) from None
    if "\\ud" in text.lower():  # half of a surrogate pair is a string to Python and to nothing that it is given to
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_text(path: Path, largest: int | None = None) -> str:
    """The UTF-8 text of a file of at most ``largest`` bytes.

    Raises:
        RsgwmError: the file is missing, cannot be read, is larger, or is not UTF-8; it names the file.
    """
    try:
        size = path.stat().st_size
        if largest is not None and size > largest:
            raise RsgwmError(f"{path} has {size >> 20} MB, which is more than such a file can have")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RsgwmError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise RsgwmError(f"{path} is a folder, not a file") from None
    except UnicodeDecodeError as error:
        if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise RsgwmError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8") from None
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RsgwmError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}, in line {line}; save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        raise RsgwmError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if "\0" in text[:4]:  # plain ASCII in UTF-16 without a mark is valid UTF-8
        raise RsgwmError(f"{path} is not UTF-8 text but UTF-16 or binary; save it as UTF-8")
    return text


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level must be an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RsgwmError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_safetensors(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays atomically as safetensors, with string metadata (``format: mlx`` is always there)."""
    temporary = temporary_for(path)
    try:
        mx.save_safetensors(str(temporary), dict(arrays), {"format": "mlx", **(metadata or {})})
        replace_file(path, temporary)
    except (OSError, RuntimeError) as error:
        raise RsgwmError(f"cannot write {path}: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_safetensors(path: Path, evaluate: bool = True) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a safetensors file into arrays and its metadata; with ``evaluate=False`` an array's values are read when
    they are first used.

    The header is validated by the safetensors library first (sizes, offsets, dtypes, truncation), so that MLX only
    ever maps a sound file. Pickle-based formats are refused by name.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise RsgwmError(f"{path} is a pickle file, which can run code when loaded; only .safetensors is read")
    if not path.is_file():
        raise RsgwmError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = dict(file.metadata() or {})
        arrays = mx.load(str(path), format="safetensors")
        if evaluate:
            mx.eval(arrays)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RsgwmError(f"{path} is not a sound safetensors file: {reason}") from error
    assert isinstance(arrays, dict)
    return arrays, metadata


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 17):
                digest.update(block)
    except OSError as error:
        raise RsgwmError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start writing ``needed`` bytes below ``folder`` when the file system has not that much room."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RsgwmError(
            f"not enough disk space for {folder}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            "free some space or choose another folder"
        )


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep every other process from writing ``folder``, which is made if need be, while the body runs.

    Half-written files that a killed process left there are removed first.

    The system lets go of the lock when the process ends, however it ends. Where the file system knows no locks (some
    network drives), nothing is locked.

    Raises:
        RsgwmError: another process holds it, or the folder cannot be written.
    """
    made = not folder.exists()
    make_folder(folder)
    path = folder / LOCK_FILE
    try:
        descriptor = _locked(path)
    except BlockingIOError:
        raise RsgwmError(
            f"another process is writing {folder}; wait until it has ended, or choose another folder"
        ) from None
    except OSError as error:
        raise RsgwmError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        for left in folder.iterdir():
            if HALF_WRITTEN.fullmatch(left.name) and left.is_file():
                left.unlink(missing_ok=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with suppress(OSError):  # unless it holds something now
                folder.rmdir()


def _locked(path: Path) -> int:
    """The descriptor of the file at ``path`` with its lock held; ``BlockingIOError`` where another process has it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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

    Whoever kills the process finds nothing under that name, and what it left beside it goes when ``out`` is made again.
    Bodies may nest: an inner one fills the folder of an outer one.

    Args:
        out: a folder that does not exist yet, or an empty one.
    """
    place = out.resolve()
    inside = place.is_mount()  # a file system's own root can be neither removed nor renamed
    parent = make_folder(place if inside else place.parent)
    for left in parent.iterdir():
        if _left_behind(left.name, place.name):
            shutil.rmtree(left, ignore_errors=True)
    work = parent / f".{place.name}.{os.getpid()}.part"
    try:
        work.mkdir()
        yield work
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


def _left_behind(name: str, wanted: str) -> bool:
    """Whether ``name`` is what :func:`new_folder` calls ``wanted`` meanwhile, in a process that has ended."""
    ended = False
    while named := NEW_FOLDER.fullmatch(name):
        name = named["name"]
        ended = not _process_runs(int(named["pid"]))
    return ended and name == wanted


def _process_runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def make_folder(path: Path) -> Path:
    """Create ``path`` with its parents; a file in the way or a read-only place is a clear error."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RsgwmError(f"cannot create folder {path}: {error.strerror or error}") from error
    return path


def expanded(name: str) -> Path:
    """``name`` as a path, a leading ``~`` or ``~user`` replaced by the home folder.

    Raises:
        RsgwmError: there is no such user, or the name is longer than a file system takes.
    """
    try:
        path = Path(name).expanduser()
        path.lstat()
    except RuntimeError:
        user = name.split("/")[0].removeprefix("~")
        raise RsgwmError(f"{name}: there is no user {user}; give the whole path") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise RsgwmError(f"{name[:80]!r} is no name of a file or folder ({why})") from None
    return path
