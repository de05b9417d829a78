"""What merges keep of trained adapters: losses on rows that none of them was trained on, beside base and adapter alone.

The second half of ``bench/audit_study.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_rsgwm.audit.advice import advise
from mlx_rsgwm.audit.carry_out import merge_by_plan
from mlx_rsgwm.audit.eligibility import RESAMPLES, held_out_rows
from mlx_rsgwm.audit.outcomes import WORST_DOMINANCE, WORST_QUALITY, Outcome, structure_of
from mlx_rsgwm.audit.plan import plan_of
from mlx_rsgwm.audit.pool_audit import audit
from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.core.tables import Rows, text_page
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.evaluation.stats.bootstrap import percentile_interval, resampled
from mlx_rsgwm.inference.open import load_base_for, slots_of
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.adapter_sources import load_adapters
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.training.losses import row_nats

BATCH = 8


def measure_pool(
    folders: Sequence[str], data: Sequence[str], rows: int, seed: int, base_name: str | None
) -> dict[str, Any]:
    """Merge the pool in every way, measure, print the table, and give it as a JSON object."""
    progress = LineProgress()
    adapters = load_adapters(folders, base_name)
    base = load_base_for(adapters, base_name, progress)
    chosen = [held_out_rows(name, each, base, rows, seed)[0] for name, each in zip(data, adapters, strict=True)]
    audited = audit(adapters)
    merged = merges_of(adapters, seed)
    names = [adapter.name for adapter in adapters]
    slots = slots_of(base, {**{f"alone {index}": each for index, each in enumerate(adapters)}, **merged})
    floors = [nats_of(slots, None, each) for each in chosen]
    alone = [nats_of(slots, f"alone {index}", each) for index, each in enumerate(chosen)]
    table = {
        name: [
            retention(floors[index], alone[index], nats_of(slots, name, each), each, seed)
            for index, each in enumerate(chosen)
        ]
        for name in merged
    }
    result = {
        "adapters": names,
        "data": list(data),
        "rows": [len(each) for each in chosen],
        "seed": seed,
        "verdict": advise(audited).to_dict(audited.labels),
        "norms": [adapter.norm for adapter in audited.adapters],
        "base": [_mean(nats, each) for nats, each in zip(floors, chosen, strict=True)],
        "alone": [_mean(nats, each) for nats, each in zip(alone, chosen, strict=True)],
        "merges": {name: _told(sources, merged[name], adapters) for name, sources in table.items()},
    }
    print(text_page([("What merges keep of each adapter", rows_of(result))]))
    return result


def merges_of(adapters: Sequence[Adapter], seed: int) -> dict[str, Adapter]:
    """The pool merged naively, with equal norms, by its plan, and as ``rsgwm merge`` does it by itself."""
    equal = (1 / len(adapters),) * len(adapters)
    return {
        "naive": merge(adapters, MergeOptions("linear", weights=equal, seed=seed)),
        "norm_equalised": merge(adapters, MergeOptions("norm_equalised", seed=seed)),
        "recommended": merge_by_plan(plan_of(audit(adapters)), adapters, MergeOptions(seed=seed)),
        "default": merge(adapters, MergeOptions(seed=seed)),
    }


def nats_of(slots: AdapterSlots, name: str | None, rows: Sequence[TokenRow]) -> np.ndarray:
    """Nats of every row (rows,) under an adapter, or the base."""
    with slots.using(name):
        return row_nats(slots.model, rows, BATCH)[0]


def retention(
    floor: np.ndarray, alone: np.ndarray, merged: np.ndarray, rows: Sequence[TokenRow], seed: int
) -> dict[str, float]:
    """(base − merged) / (base − alone), its 95 % interval over rows, and the merge's loss; nats (rows,) of each."""

    def share(drawn: np.ndarray) -> float:
        gained = float((floor - alone)[drawn].sum())
        return float((floor - merged)[drawn].sum()) / gained if gained > 0 else float("nan")

    drawn = resampled(share, len(floor), seed, RESAMPLES)
    low, high = percentile_interval(drawn) if len(drawn) else (float("nan"), float("nan"))
    return {"retention": share(np.arange(len(floor))), "low": low, "high": high, "nll": _mean(merged, rows)}


def _told(sources: Sequence[Mapping[str, float]], merged: Adapter, adapters: Sequence[Adapter]) -> dict[str, Any]:
    outcome = Outcome(tuple(source["retention"] for source in sources))
    return {
        "method": "plan" if "plan" in merged.manifest["merge"] else merged.manifest["merge"]["method"],
        "sources": list(sources),
        "q_min": outcome.quality,
        "dominance": outcome.dominance,
        "bad": not (outcome.quality >= WORST_QUALITY and outcome.dominance <= WORST_DOMINANCE),
        "structure": structure_of(merged, adapters).to_dict(),
    }


def _mean(nats: np.ndarray, rows: Sequence[TokenRow]) -> float:
    return float(nats.sum() / sum(len(row.trained_positions()) for row in rows))


def rows_of(result: Mapping[str, Any]) -> Rows:
    """One line a merge: loss and retention of every source, Q_min, D."""
    table = [["", *result["adapters"], "Q_min", "D"]]
    for name in ("base", "alone"):
        table.append([name, *(f"{value:.3f} nats" for value in result[name]), "", ""])
    for name, row in result["merges"].items():
        cells = [
            "{nll:.3f} nats, kept {retention:.2f} [{low:.2f}, {high:.2f}]".format(**each) for each in row["sources"]
        ]
        table.append([f"{name} ({row['method']})", *cells, f"{row['q_min']:.2f}", f"{row['dominance']:.2f}"])
    return table
