"""What a calculator is worth on recorded drafts: beside the verifier, and in its place.

Every system here is replayed on drafts that were made and scored without it, so that what is reported without a check
stays what it was. Under check ``auto`` a draft is looked at where the gold answer is a number; the loop, which knows no
gold answer, goes by the draft's last line (:func:`~mlx_rsgwm.inference.policy.failed_check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_rsgwm.data.arithmetic import first_false_equation
from mlx_rsgwm.data.numbers import parse_number
from mlx_rsgwm.evaluation import metrics
from mlx_rsgwm.evaluation.records import ItemRecord, replay

SCORE = "calculator"  # 1 for a draft without a false equation, 0 for one with


def checks_by_gold(record: ItemRecord, check: str) -> bool:
    """Whether the drafts of an item are checked; under ``auto`` those whose gold answer is a number are."""
    return check == "arithmetic" or (check == "auto" and parse_number(record.gold) is not None)


def annotated(records: Sequence[ItemRecord], check: str) -> list[ItemRecord]:
    """The records with the first false equation of every draft that is looked at; all else is as it was."""
    return [_annotated(record) if checks_by_gold(record, check) else record for record in records]


def _annotated(record: ItemRecord) -> ItemRecord:
    equations = [first_false_equation(draft.text, record.question) for draft in record.drafts]
    pairs = zip(record.drafts, equations, strict=True)
    return replace(
        record, drafts=tuple(replace(draft, false_equation=text) if text else draft for draft, text in pairs)
    )


def draft_verify(record: ItemRecord, k: int) -> ItemRecord:
    """Draft–verify that accepts no draft with a false equation and does not show it to the verifier."""
    return replay(record, record.threshold, k, check="arithmetic")


def first_calculated(record: ItemRecord, k: int) -> ItemRecord:
    """The first of ``k`` drafts without a false equation, no verifier; with none the first, not accepted."""
    drafts = tuple(
        replace(draft, scores={**draft.scores, SCORE: float(draft.false_equation is None)}) for draft in record.drafts
    )
    return replay(replace(record, drafts=drafts), 0.5, k, SCORE)


def majority_calculated(record: ItemRecord, k: int) -> ItemRecord:
    """A vote of those of ``k`` drafts that state no false equation; it accepts nothing."""
    chosen = metrics.majority_index(record.drafts[:k], calculated=True)
    return replace(record, score_name="", threshold=1.0, accepted=False, attempts=k, chosen=chosen, latency_ms=None)


# By the key under which reports hold them: what they are called in tables, and what they make of a record.
SYSTEMS = {
    "draft_verify_arithmetic": ("arithmetic checked", draft_verify),
    "calculator": ("calculator, no verifier", first_calculated),
    "calculator_majority": ("calculator, majority", majority_calculated),
}
