"""Rows by their content: which share of a file a row belongs to, and which rows an adapter has seen.

A row is known by its question, whatever its case, spacing and Unicode form, so that the same row is recognised in
another order, file or format. What was trained or calibrated on travels as 48-bit hashes: from a corpus to its adapter,
from adapters to their merge, and into a calibration.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_rsgwm.data.families import split_of
from mlx_rsgwm.errors import RsgwmError

KEY = "row_hashes"  # in manifests
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
class RowRecord:
    """Hashes of the rows that were ``used``, and of these and all others in the user's files they were taken from.

    ``unknown`` names adapters that do not say what they were trained on.
    """

    used: frozenset[bytes] = frozenset()
    in_files: frozenset[bytes] = frozenset()
    unknown: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, used: Iterable[str], in_files: Iterable[str] = ()) -> RowRecord:
        """From the texts."""
        hashes = frozenset(map(row_hash, used))
        return cls(hashes, hashes | frozenset(map(row_hash, in_files)))

    def __or__(self, other: RowRecord) -> RowRecord:
        unknown = tuple(dict.fromkeys((*self.unknown, *other.unknown)))
        return RowRecord(self.used | other.used, self.in_files | other.in_files, unknown)

    def describe(self) -> dict[str, Any]:
        """For a manifest: sorted hashes, each eight characters of base64, in one string."""
        return {
            "rows": len(self.used),
            "used": _packed(self.used),
            "not_used": _packed(self.in_files - self.used),
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
            return cls(used, used | _unpacked(description["not_used"]), unknown)
        except (TypeError, KeyError, ValueError, AttributeError):
            raise RsgwmError(f"{where}: {KEY} is damaged") from None


def record_of(manifest: Mapping[str, Any], name: str) -> RowRecord:
    """What an adapter's manifest records of its training rows; ``unknown`` where it records nothing."""
    data = manifest.get("data")
    description = manifest.get(KEY) or (data.get(KEY) if isinstance(data, Mapping) else None)
    return RowRecord.from_description(description, name) if description else RowRecord(unknown=(name,))


def _packed(hashes: Iterable[bytes]) -> str:
    return base64.b64encode(b"".join(sorted(hashes))).decode()


def _unpacked(text: str) -> frozenset[bytes]:
    data = base64.b64decode(text, validate=True)
    if len(data) % BYTES:
        raise ValueError
    return frozenset(data[start : start + BYTES] for start in range(0, len(data), BYTES))
