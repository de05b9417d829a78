"""How well the verifiers of a control study tell right drafts from wrong ones, with a calculator and where it is blind.

All judge the same drafts. A calculator that finds a false equation settles a draft for nothing (``checked``: such a
draft scores below all others), so what a verifier is worth beside it shows on the drafts that a calculator passes
(``passed``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_rsgwm.core.tables import ABSENT, show
from mlx_rsgwm.evaluation.calculator_systems import annotated
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.evaluation.report.summary import json_value
from mlx_rsgwm.evaluation.stats.intervals import Rate, auroc

REFUSED = -1.0  # below every score in [0, 1]
SLICES = ("all", "checked", "passed")
RecordedDraft = tuple[ItemRecord, DraftRecord]


def judge_scores(
    records: Sequence[ItemRecord], k: int, scores: Mapping[str, str], check: str, seed: int = 0
) -> list[dict[str, Any]]:
    """AUROC of every verifier's score on the first ``k`` drafts of every item, over all seeds.

    Args:
        records: all seeds, every draft with all ``scores``.
        scores: name of a verifier to the name of its score.
        check: of :class:`~mlx_rsgwm.inference.policy.LoopConfig`: whose drafts a calculator looks at.
        seed: of the intervals, which resample items.

    Returns:
        One mapping a verifier: its name, its score, and an interval each for all drafts, for all with a calculator
        before it, and for those that the calculator passes. None where all of them are right, or all wrong.
    """
    drafts = [(record, draft) for record in annotated(records, check) for draft in record.drafts[:k]]
    passed = [(record, draft) for record, draft in drafts if draft.false_equation is None]
    rows = []
    for name, score in scores.items():
        values = [draft.scores[score] for _, draft in drafts]
        checked = [
            value if draft.false_equation is None else REFUSED for value, (_, draft) in zip(values, drafts, strict=True)
        ]
        areas = {
            "all": _area(drafts, values, seed),
            "checked": _area(drafts, checked, seed),
            "passed": _area(passed, [draft.scores[score] for _, draft in passed], seed),
        }
        rows.append({"name": name, "score": score, **{key: json_value(area) for key, area in areas.items()}})
    return rows


def _area(drafts: Sequence[RecordedDraft], values: Sequence[float], seed: int) -> Rate | None:
    labels, items = [draft.correct for _, draft in drafts], [record.id for record, _ in drafts]
    return auroc(values, labels, groups=items, seed=seed)


def judge_rows(judges: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table of :func:`judge_scores`, first row its head."""
    head = ["verifier", "score", "AUROC", "with arithmetic", "calculator-passed drafts"]
    return [head, *([row["name"], row["score"], *map(_shown, (row[key] for key in SLICES))] for row in judges)]


def _shown(area: Mapping[str, Any] | None) -> str:
    return ABSENT if area is None else show(area)
