"""What grafted drafts add to draft–verify where samples were rejected, at equal drafted tokens: replays of two runs.

    rsgwm eval --drafter D --verifier V --task … --draft-count 11 --out sampled
    rsgwm eval --drafter D --verifier V --task … --drafts mixed --out mixed
    python bench/mixed_drafts.py sampled/items.jsonl mixed/items.jsonl

Both begin with the same sampled drafts. Mixed goes on with the eight chains where ``--attempts`` of these were
rejected; sampled goes on sampling, up to the fewest drafts for which its mean of drafted tokens is at least that of
mixed. With and without false equations rejected: shares right with 95 % bootstrap intervals over items, tokens drafted
a question, and the paired difference. The last line is JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.bench.replay_drafts import right, share_right
from mlx_rsgwm.bench.results import give_result
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.tables import aligned
from mlx_rsgwm.evaluation.calculator_systems import annotated
from mlx_rsgwm.evaluation.records import ItemRecord, read_items, replay
from mlx_rsgwm.evaluation.stats.paired import mean_difference
from mlx_rsgwm.inference.draft import SAMPLED


def chosen_right(record: ItemRecord, k: int) -> bool:
    """Whether the answer that was chosen is right; the record is replayed already."""
    return bool(record.drafts[record.chosen].correct)


def drafted(records: Sequence[ItemRecord]) -> float:
    """Tokens of the drafts that were made, a question."""
    return float(np.mean([sum(draft.tokens for draft in record.drafts[: record.attempts]) for record in records]))


def check_alike(sampled: Sequence[ItemRecord], mixed: Sequence[ItemRecord]) -> int:
    """The number of sampled drafts of a mixed record; RsgwmError unless both runs begin with the same ones."""
    by_item = {(record.seed, record.id): record for record in sampled}
    if by_item.keys() != {(record.seed, record.id) for record in mixed}:
        raise RsgwmError("the runs have other questions or seeds")
    (count,) = {sum(draft.kind == SAMPLED for draft in record.drafts) for record in mixed}
    for record in mixed:
        pair = [[draft.text for draft in each.drafts[:count]] for each in (record, by_item[record.seed, record.id])]
        if pair[0] != pair[1] or record.threshold != by_item[record.seed, record.id].threshold:
            raise RsgwmError(f"{record.id}: the runs differ in their sampled drafts or thresholds")
    return count


def equal_tokens(records: Sequence[ItemRecord], tokens: float, check: str) -> tuple[int, list[ItemRecord]]:
    """The fewest drafts with which the loop drafts ``tokens`` a question on average, and its records; else all."""
    most = min(len(record.drafts) for record in records)
    for k in range(1, most + 1):
        replayed = [replay(record, record.threshold, k, check=check) for record in records]
        if drafted(replayed) >= tokens:
            break
    return k, replayed


def main() -> None:
    """Parse, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sampled", type=Path, help="items.jsonl of a run with sampled drafts, more than the loop makes")
    parser.add_argument("mixed", type=Path, help="items.jsonl of the same with --drafts mixed")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    runs = [read_items(path) for path in (options.sampled, options.mixed)]
    count = check_alike(*runs)
    sampled, mixed = (annotated(records, "arithmetic") for records in runs)
    table = [["check", "drafts", "right", "tokens drafted", "mixed minus it", "p"]]
    result: dict[str, Any] = {}
    for check in ("none", "arithmetic"):
        every = min(len(record.drafts) for record in mixed)
        systems = {f"{count} sampled": [replay(record, record.threshold, count, check=check) for record in sampled]}
        systems["mixed"] = [replay(record, record.threshold, every, check=check) for record in mixed]
        k, replayed = equal_tokens(sampled, drafted(systems["mixed"]), check)
        systems[f"up to {k} sampled"] = replayed
        reference = right(systems["mixed"], chosen_right, 0)
        for name, records in systems.items():
            flags = right(records, chosen_right, 0)
            rate: Any = share_right(flags)
            gap = mean_difference(flags, reference)
            tokens = drafted(records)
            shown = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
            table.append([check, name, str(rate), f"{tokens:.1f}", shown, f"{gap.p_value:.4f}"])
            result[f"{name}, {check}"] = {"right": rate.to_dict(), "drafted": tokens, "difference": gap.to_dict()}
    print(aligned(table))
    give_result(result, options.out)


if __name__ == "__main__":
    main()
