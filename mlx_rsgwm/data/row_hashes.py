"""Rows by their content: when two are the same, which share of a file a row belongs to, and what an adapter has seen.

A row is known by its question, whatever its case, spacing and Unicode form, so that the same row is recognised in
another order, file or format; ids and other fields do not count. Splits, held-out rows, calibration and evaluation all
compare rows here. What was trained or calibrated on travels as 48-bit hashes: from a corpus to its adapter, from
adapters to their merge, into a calibration, and with an adapter into the base that it is fused into.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.asked import bare, parts
from mlx_rsgwm.data.synthetic import split_of

KEY = "row_hashes"  # in manifests
FUSED_FILE = "fuse.json"  # in the folder of a fused base
BYTES = 6  # among a million rows two differ with probability 0.998; 8 characters a row in a manifest


def folded(text: str) -> str:
    """``text`` without what does not make another row: case, spacing, Unicode's compatible forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def row_hash(text: str) -> bytes:
    """48 bits of the SHA-256 of a folded text."""
    return hashlib.sha256(folded(text).encode()).digest()[:BYTES]


def share_of(text: str) -> str:
    """``train`` (six in ten), ``calibration`` or ``test`` (two each), by the folded text alone."""
    return split_of(folded(text))


@dataclass(frozen=True)
class RowKeys:
    """What a row is recognised by: hashes of its ``question``, and of ``parts`` of it that may be one.

    Two rows are the same if the whole question of one is that of the other, or a part of it.
    """

    question: frozenset[bytes] = frozenset()
    parts: frozenset[bytes] = frozenset()


def row_keys(question: str, turns: Sequence[str] = ()) -> RowKeys:
    """The keys of a row by its question, or by all user ``turns`` of a chat, each of which is a part, too."""
    asked = frozenset(map(row_hash, {question, bare(question)}))
    more = (text for turn in turns or (question,) for text in (*((turn,) if turns else ()), *parts(turn)))
    return RowKeys(asked, frozenset(map(row_hash, more)) - asked)


def contents_hash(question: str, answer: str) -> bytes:
    """What rows have in common that ask the same and are answered alike."""
    return row_hash(f"{bare(question)}\n{answer}")


@dataclass(frozen=True)
class RowRecord:
    """Hashes of the rows that were ``used``, and of these and all others in the user's files they were taken from.

    ``parts``: of the used rows' questions (:class:`RowKeys`). ``unknown`` names adapters that do not say what they were
    trained on.
    """

    used: frozenset[bytes] = frozenset()
    in_files: frozenset[bytes] = frozenset()
    unknown: tuple[str, ...] = field(default=())
    parts: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, used: Iterable[str], in_files: Iterable[str] = ()) -> RowRecord:
        """From the texts of questions."""
        return cls.of_keys(map(row_keys, used)) | cls(frozenset(), frozenset(map(row_hash, in_files)))

    @classmethod
    def of_keys(cls, rows: Iterable[RowKeys]) -> RowRecord:
        """From the keys of the rows that were used."""
        keys = list(rows)
        used = frozenset().union(*(row.question for row in keys))
        return cls(used, used, parts=frozenset().union(*(row.parts for row in keys)))

    def has(self, row: RowKeys) -> bool:
        """Whether the row was used."""
        return not (row.question.isdisjoint(self.used) and row.question.isdisjoint(self.parts)) or not (
            row.parts.isdisjoint(self.used)
        )

    def __or__(self, other: RowRecord) -> RowRecord:
        unknown = tuple(dict.fromkeys((*self.unknown, *other.unknown)))
        return RowRecord(self.used | other.used, self.in_files | other.in_files, unknown, self.parts | other.parts)

    def describe(self) -> dict[str, Any]:
        """For a manifest: sorted hashes, each eight characters of base64, in one string."""
        return {
            "rows": len(self.used),
            "used": _packed(self.used),
            "not_used": _packed(self.in_files - self.used),
            **({"parts": _packed(self.parts)} if self.parts else {}),
            **({"unknown": list(self.unknown)} if self.unknown else {}),
        }

    @classmethod
    def from_description(cls, description: Any, where: str) -> RowRecord:
        """What :meth:`describe` gave.

        Raises:
            RsgwmError: anything else.
        """
        try:
            used = _unpacked(description["used"])
            unknown = tuple(str(name) for name in description.get("unknown", ()))
            in_files = used | _unpacked(description["not_used"])
            return cls(used, in_files, unknown, _unpacked(description.get("parts", "")))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise RsgwmError(f"{where}: {KEY} is damaged") from None


def record_of(manifest: Mapping[str, Any], name: str) -> RowRecord:
    """What an adapter's manifest records of its training rows; ``unknown`` where it records nothing."""
    data = manifest.get("data")
    description = manifest.get(KEY) or (data.get(KEY) if isinstance(data, Mapping) else None)
    return RowRecord.from_description(description, name) if description else RowRecord(unknown=(name,))


def record_of_base(folder: Path) -> RowRecord:
    """What the adapters were trained on that were fused into the base in ``folder``; nothing where none was."""
    file = folder / FUSED_FILE
    if not file.is_file():
        return RowRecord()
    return record_of(files.read_json_object(file), f"{folder.name}, a fused base,")


def not_recorded(names: Sequence[str]) -> str:
    """One line on adapters, and calibrations, of which nobody knows what they have seen."""
    return (
        f"What {', '.join(names)} was trained on is not recorded, so that nobody can tell whether these items are new "
        "to it."
    )


def repeated_items(repeated: int, asked: int) -> str:
    """One line on items that are asked more than once: they make intervals narrower than they should be."""
    return f"{repeated} of {asked} items ask what another item asks, and count each time"


def _packed(hashes: Iterable[bytes]) -> str:
    return base64.b64encode(b"".join(sorted(hashes))).decode()


def _unpacked(text: str) -> frozenset[bytes]:
    data = base64.b64decode(text, validate=True)
    if len(data) % BYTES:
        raise ValueError
    return frozenset(data[start : start + BYTES] for start in range(0, len(data), BYTES))
