"""The one question that stands for a run: drafts that were rejected, and the one that was accepted after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord


def exchange(records: Sequence[ItemRecord]) -> dict[str, Any] | None:
    """A question whose first draft was rejected and a later one accepted: mended before any other, then the shortest.

    Returns:
        ``id``, ``question``, ``gold``, ``mended`` and two ``drafts`` ({text, value, correct, score, state}); None where
        no later draft was accepted.
    """
    retried = [record for record in records if record.accepted and record.chosen > 0]
    if not retried:
        return None
    record = min(retried, key=lambda row: (not _mended(row), _length(row), row.id))
    return {
        "id": record.id,
        "question": record.question,
        "gold": record.gold,
        "mended": _mended(record),
        "drafts": [_told(record, record.first, "rejected"), _told(record, record.returned, "accepted")],
    }


def _mended(record: ItemRecord) -> bool:
    return record.returned.correct and not record.first.correct


def _length(record: ItemRecord) -> int:
    return len(record.question) + len(record.first.text) + len(record.returned.text)


def _told(record: ItemRecord, draft: DraftRecord, state: str) -> dict[str, Any]:
    return {
        "text": draft.text,
        "value": draft.value,
        "correct": draft.correct,
        "score": draft.scores.get(record.score_name),
        "state": state,
    }
