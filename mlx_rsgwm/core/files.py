"""Reading one file that somebody else may have made, and writing one so that it is whole or what it was before.

Whatever comes from outside is opened here: a regular file, no larger than its kind can be, UTF-8 where it is text.
Arrays are in :mod:`mlx_rsgwm.core.safetensors_io`, JSON lines in :mod:`mlx_rsgwm.core.json_lines`, YAML in
:mod:`mlx_rsgwm.core.config`; all of them open their files with :func:`open_regular`.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import flush
from mlx_rsgwm.core.temporary import remove_leftovers, temporary_file

# Bytes that a file of a kind may have. The index of the largest model or the history of a long run has a few millions.
LARGEST_JSON = 256 << 20
LARGEST_YAML = 16 << 20
LARGEST_TEXT = 512 << 20  # rows of data are all in memory, as objects of several times this size
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}  # of file systems without them
MOST_PARTS = 200  # folders inside each other: making them goes one call deeper for each
OTHER_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# --- reading ----------------------------------------------------------------------------------------------------


def open_regular(path: Path, largest: int | None = None) -> BinaryIO:
    """A regular file of at most ``largest`` bytes, opened for reading; nothing that could block or never end.

    Raises:
        RsgwmError: it is missing, no regular file (what it is is said), too large, or may not be read.
    """
    try:
        _check_regular(path, os.stat(path), largest)  # before it is opened: opening a device may already do something
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_regular(path, os.fstat(descriptor), largest)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError:
        dangling = os.path.islink(path)
        raise RsgwmError(f"{path} {'is a link to what does not exist' if dangling else 'does not exist'}") from None
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        loop = isinstance(error, OSError) and error.errno == errno.ELOOP
        why = "its links lead in a circle" if loop else getattr(error, "strerror", None) or error
        raise RsgwmError(f"cannot read {path}: {why}") from error


def _check_regular(path: Path, status: os.stat_result, largest: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RsgwmError(f"{path} is {_kind(status)}, not a file")
    if largest is not None and status.st_size > largest:
        raise RsgwmError(f"{path} has {status.st_size >> 20} MB, which is more than such a file can have")


def _kind(status: os.stat_result) -> str:
    return OTHER_KINDS.get(stat.S_IFMT(status.st_mode), "something else")


def other_kind(path: Path) -> str:
    """What a name or what it links to is, where that is no regular file: "a device"; empty for a file or nothing."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return "" if stat.S_ISREG(status.st_mode) else _kind(status)


def is_present(path: Path) -> bool:
    """Whether anything has this name: what is no regular file is to be refused when it is read, not passed over."""
    return os.path.lexists(path)


def read_bytes(path: Path, largest: int | None = None) -> bytes:
    """The bytes of a regular file of at most ``largest``.

    Raises:
        RsgwmError: whatever :func:`open_regular` raises, or reading fails.
    """
    with open_regular(path, largest) as file:
        try:
            data = file.read() if largest is None else _read_at_most(file, largest + 1)
        except OSError as error:
            raise RsgwmError(f"cannot read {path}: {error.strerror or error}") from error
    if largest is not None and len(data) > largest:
        raise RsgwmError(f"{path} grew beyond {largest >> 20} MB while it was read")
    return data


def _read_at_most(file: BinaryIO, size: int) -> bytes:
    """Up to ``size`` bytes; memory is asked for what the file has, and not for ``size``, which is far more."""
    now = os.fstat(file.fileno()).st_size + 1
    data = file.read(min(size, now))
    return data + file.read(size - len(data)) if now == len(data) < size else data  # it grew meanwhile


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """The UTF-8 text of a file of at most ``largest`` bytes, without a byte order mark, lines ended by line feeds.

    Raises:
        RsgwmError: the file is missing, cannot be read, is larger, or is not UTF-8; it names the file.
    """
    return decode_text(read_bytes(path, largest), path)


def decode_text(data: bytes, where: Path | str) -> str:
    """The text that the bytes of a file, or of another place, are: see :func:`read_text`."""
    zero = data.find(b"\0")
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise RsgwmError(f"{where} is not UTF-8 text but UTF-16; save it as UTF-8")
    if 0 <= zero < 4:  # plain ASCII in UTF-16 without a mark is valid UTF-8
        raise RsgwmError(f"{where} is not UTF-8 text but UTF-16 or binary; save it as UTF-8")
    if zero >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise RsgwmError(f"{where} is not text: a NUL byte at byte {zero}, in line {line}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RsgwmError(
            f"{where} is not UTF-8 text: {error.reason} at byte {error.start}, in line {line}; save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """The value of a JSON file of at most ``largest`` bytes; one that is malformed is a :class:`RsgwmError`, too."""
    try:
        return parse_json(read_text(path, largest))
    except ValueError as error:
        raise RsgwmError(f"{path} is not valid JSON: {error}") from error


def parse_json(text: str, unique: bool = False) -> Any:
    """``json.loads`` with every refusal a ``ValueError``: also of deep nesting, endless integers, half characters, and,
    where they must be ``unique``, of keys that an object has twice."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(str(error).partition(";")[0] if text.strip() else "it is empty") from None
    if "\\ud" in text.lower():  # half of a surrogate pair is a string to Python and to nothing that it is given to
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"{half} is half of a character, without its other half") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; json.loads alone takes the last of two values in silence."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return row


def read_json_object(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Read a JSON file whose top level must be an object."""
    value = read_json(path, largest)
    if not isinstance(value, dict):
        raise RsgwmError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def sha256_file(path: Path, largest: int | None = None) -> str:
    """Hex SHA-256 of a file's bytes, of which there may be ``largest``."""
    digest = hashlib.sha256()
    with open_regular(path, largest) as file:
        try:
            while block := file.read(1 << 17):
                digest.update(block)
        except OSError as error:
            raise RsgwmError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def sha256_unchanged(path: Path) -> str:
    """:func:`sha256_file`, taken once while the file's inode, size and time stay what they are."""
    try:
        now = path.stat()
    except OSError as error:
        raise RsgwmError(f"cannot read {path}: {error.strerror or error}") from error
    return _sha256_while(path, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns))


@lru_cache(maxsize=256)
def _sha256_while(path: Path, stamp: tuple[int, ...]) -> str:
    return sha256_file(path)


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def expanded(name: str) -> Path:
    """``name`` as a path, a leading ``~`` or ``~user`` replaced by the home folder.

    Raises:
        RsgwmError: there is no such user, or the name is longer than a file system takes.
    """
    try:
        path = Path(name).expanduser()
        if len(path.parts) > MOST_PARTS:
            raise RsgwmError(f"{name[:80]!r}… leads through {len(path.parts)} folders, more than anybody has")
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


# --- writing ----------------------------------------------------------------------------------------------------


def require_absent(path: Path, advice: str = "choose another file or remove it") -> None:
    """Refuse a name that is taken; what killed processes left half written beside it is removed first.

    Raises:
        RsgwmError: there is something of that name.
    """
    remove_leftovers(path.parent)
    if is_present(path):
        raise RsgwmError(f"{path} exists already; {advice}")


@contextmanager
def new_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """A name to write a file under, which becomes ``path`` in one step when the body is done and it is on the disk.

    When the body fails nothing is left; what killed processes left half written in the folder is removed.

    Raises:
        RsgwmError: it cannot be written; it is a folder, a pipe or a device, which a rename would put an end to (root's
            even to /dev/null); without ``replace`` also when there is a file by then.
    """
    if replace and (kind := other_kind(path)):
        raise RsgwmError(f"cannot write {path}: it is {kind}, not a file")
    remove_leftovers(path.parent)
    temporary = temporary_file(path)
    try:
        yield temporary
        flush(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    except OSError as error:
        raise RsgwmError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless another process was faster, which a rename would overwrite."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if is_present(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def write_bytes(path: Path, content: bytes, replace: bool = True) -> None:
    """Write bytes atomically; without ``replace`` a file that is there by then is left and refused."""
    with new_file(path, replace) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, replace: bool = True) -> None:
    """Write UTF-8 text atomically, see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"), replace)


def json_problems(value: Any, where: str) -> list[str]:
    """The places in ``value`` (called ``where``; mappings, lists) of numbers that are not finite, so no JSON."""
    if isinstance(value, Mapping):
        return [line for name, inner in value.items() for line in json_problems(inner, f"{where}.{name}")]
    if isinstance(value, (list, tuple)):
        return [line for place, inner in enumerate(value) for line in json_problems(inner, f"{where}[{place}]")]
    return [f"{where} is {value}, not finite"] if isinstance(value, float) and not math.isfinite(value) else []


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sorted by insertion, two-space indent, NaN refused (it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
