"""Names of what is half written, so that whoever comes after a killed process knows it and removes it.

A name holds the process id, the boot it belongs to and a token of the process's start: process ids are given out again
after a restart, and in a container every process may have the same one.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path

BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")
START = secrets.token_hex(2)  # of this process, whatever ids it shares with earlier ones
NAME = re.compile(r"\..+\.(?P<pid>\d+)-(?P<boot>[0-9a-f]{8})(?P<start>[0-9a-f]{4})-\d+\.(part|tmp(\.\w+)?)")
_number = count()  # threads may write the same name at once
LONGEST = 150  # bytes of a final name that a temporary one repeats: file systems take 255 in all


def temporary_file(path: Path) -> Path:
    """Where the file ``path`` is written meanwhile: the same folder, so that the rename stays on one file system.

    The suffix is kept, since ``mx.save_safetensors`` appends its own to names without it.
    """
    return path.with_name(f".{shortened(path.stem)}.{_owner()}.tmp{path.suffix}")


def temporary_folder(path: Path) -> Path:
    """Where the folder ``path`` is filled meanwhile, beside it."""
    return path.with_name(f".{shortened(path.name)}.{_owner()}.part")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that have ended left half written in ``folder``."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if (match := NAME.fullmatch(name)) and not _runs(int(match["pid"]), match["boot"], match["start"]):
                _remove(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def shortened(name: str) -> str:
    """``name`` as far as the name of a file beside it can repeat it."""
    return os.fsencode(name)[:LONGEST].decode("utf-8", "ignore") or "x"


def _owner() -> str:
    return f"{os.getpid()}-{boot()}{START}-{next(_number)}"


@cache
def boot() -> str:
    """Eight hex digits that another start of this machine does not have."""
    try:
        text = BOOT_FILE.read_text()
    except OSError:
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        with suppress(OSError, subprocess.SubprocessError):
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            return _digits(text)
        text = ""
    return _digits(text)


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _runs(pid: int, of_boot: str, start: str) -> bool:
    """Whether the process that has written a name may still be there."""
    if of_boot != boot():
        return False
    if pid == os.getpid():
        return start == START
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    return True
