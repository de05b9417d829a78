"""Work that may be cut off: what it depends on, what of it is done, and the word that it is whole.

A *key* is the hash of everything that a result depends on. A *journal* keeps finished parts as they come, one a line; a
line that a crash left half written is dropped, and what is missing is done anew. A *stamp* is a file that says from
what a result was made: it goes before the work starts and comes back last, so that what was half done is never taken
for done. Who writes a folder holds its lock (:func:`mlx_rsgwm.core.folders.exclusive`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import make_folder

LARGEST_ROW = 64 << 20  # bytes of a line


def content_key(settings: Any, contents: Mapping[str, str] | None = None, version: int = 0) -> str:
    """Hex SHA-256 of all that a result depends on.

    Args:
        settings: JSON values; what is none is taken as its text.
        contents: hashes of what is read, by names that do not change when a folder is moved.
        version: raised whenever the same settings and contents would give another result.
    """
    return files.sha256_json([json_values(settings), dict(contents or {}), *([version] if version else [])])


def json_values(value: Any) -> Any:
    """``value`` as it is read back from JSON; what JSON does not know is its text."""
    return json.loads(json.dumps(value, default=str))


def differing(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two trees of JSON values, by dotted name and with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in differing(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    lists = all(isinstance(value, (list, tuple)) for value in (before, now))
    same = before == now or (lists and list(before) == list(now))
    return [] if same else [f"{name} is {_shown(now)} now, was {_shown(before)}"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else f"{text[:12]}…"


class Journal:
    """Rows of JSON in one append-only file, whose first line says what they depend on.

    Args:
        path: the file; one of several processes writes a ``shard`` of its own beside it, and whoever opens the journal
            reads all of them.
        about: what the rows depend on. A journal of something else is refused, or with ``replace`` started anew; what
            is no journal is nobody's to replace.
        take: given every row that is there, and where it stands; whatever it raises means a damaged row.

    Raises:
        RsgwmError: the file is of something else (what differs is named), is no journal, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        take: Callable[[Any, str], None],
        replace: bool = False,
        shard: int = 0,
    ) -> None:
        self.path = path.with_name(f"{path.stem}.{shard}{path.suffix}") if shard else path
        self.about = json_values(about)
        self._first, self._take = path, take
        complete = self._read(self.path, replace) if os.path.lexists(self.path) else 0
        make_folder(path.parent)
        try:
            if 0 < complete < os.path.getsize(self.path):
                os.truncate(self.path, complete)
            elif not complete:
                head = {"key": content_key(self.about), "about": self.about}
                files.write_text(self.path, json.dumps(head, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RsgwmError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.read_others(replace)

    def read_others(self, replace: bool = False) -> None:
        """Take over what the other shards hold by now."""
        shards = self._first.parent.glob(f"{_literal(self._first.stem)}.*{_literal(self._first.suffix)}")
        for path in sorted({*shards, self._first} - {self.path}):
            if path.is_file() and not self._read(path, replace) and replace and os.path.getsize(path):
                path.unlink()  # of something else: the next run, which may not replace it, would be refused by it

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep rows; they are on disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RsgwmError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _read(self, path: Path, replace: bool) -> int:
        """Take over what is there; returns how many bytes of the file are whole lines, 0 to start anew."""
        with files.open_regular(path) as file:
            head = file.readline(LARGEST_ROW)
            if self._is_of_something_else(path, head, replace):
                return 0
            number, complete = 1, len(head)
            while (line := file.readline(LARGEST_ROW)).endswith(b"\n"):
                number, complete = number + 1, complete + len(line)
                where = f"{path} line {number}"
                try:
                    self._take(files.parse_json(line.decode("utf-8")), where)
                except (KeyError, TypeError, ValueError, AttributeError):
                    raise RsgwmError(f"{where} is damaged; delete the file to start anew") from None
            if len(line) == LARGEST_ROW:  # a row that was cut off by a kill is shorter
                raise RsgwmError(f"{path} line {number + 1} is longer than any row; delete the file to start anew")
            return complete

    def _is_of_something_else(self, path: Path, head: bytes, replace: bool) -> bool:
        """Whether a journal that begins with ``head`` is to be started anew; one that may not be is refused."""
        before = _about(head) if head.endswith(b"\n") else None
        if before != self.about:
            if not head.strip() or (replace and _begins_journal(head)):
                return True
            if before is None:
                raise RsgwmError(f"{path} is not a journal of this version; choose another place, or delete it")
            raise RsgwmError(
                f"{path} was made with other settings ({'; '.join(differing(before, self.about))}); choose another "
                "place, or delete it to start anew"
            )
        return False


def _about(line: bytes) -> dict[str, Any] | None:
    """What the first line of a journal says of it; None where it is not one."""
    with suppress(ValueError, KeyError, TypeError):
        head = files.parse_json(line.decode("utf-8"))
        if isinstance(head["about"], dict) and head.get("key") in (None, content_key(head["about"])):
            return dict(head["about"])
    return None


def _begins_journal(line: bytes) -> bool:
    """Whether a first line is that of a journal, of whatever version, be it damaged."""
    with suppress(ValueError):
        head = files.parse_json(line.decode("utf-8"))
        return isinstance(head, dict) and "about" in head
    return False


def _literal(text: str) -> str:
    """``text`` in a pattern of names, its brackets and stars standing for themselves."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)


def read_stamp(path: Path) -> dict[str, Any] | None:
    """What a stamp says; None where there is none, or a damaged one."""
    with suppress(RsgwmError):
        return files.read_json_object(path) if path.is_file() else None
    return None


def write_stamp(path: Path, key: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Write a stamp; returns what it says."""
    make_folder(path.parent)
    files.write_json(path, stamp := {"key": key, **fields})
    return stamp


def stamped(path: Path, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What ``make`` has given for this ``key``, read from the stamp at ``path``, or made now and kept there."""
    stamp = read_stamp(path)
    if stamp is not None and stamp.get("key") == key:
        return stamp
    with suppress(FileNotFoundError):
        path.unlink()  # before the work: a result of something else is none
    return json_values(write_stamp(path, key, make()))
