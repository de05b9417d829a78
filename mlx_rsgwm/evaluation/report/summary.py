"""From item records to one JSON object with every figure of a report; everything shown is drawn from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from mlx_rsgwm.evaluation import calculator_systems, metrics
from mlx_rsgwm.evaluation.calculator import calculator_slice
from mlx_rsgwm.evaluation.records import ItemRecord, by_seed, read_with
from mlx_rsgwm.evaluation.report.exchange import exchange
from mlx_rsgwm.evaluation.stats.intervals import Rate, bootstrapped
from mlx_rsgwm.evaluation.stats.paired import fewest_discordant, mcnemar, mean_difference, smallest_difference
from mlx_rsgwm.evaluation.verifier_quality import verifier_quality

FORMAT = "mlx-rsgwm/report"
FORMAT_VERSION = 3
THRESHOLDS = tuple(step / 20 for step in range(21))
MODES: tuple[metrics.Mode, ...] = ("drafter", "draft_verify")


def json_value(value: Any) -> Any:
    """JSON values: a rate becomes ``{value, low, high, n}``."""
    return value.to_dict() if isinstance(value, Rate) else value


def summarise_records(
    records: Sequence[ItemRecord],
    k: int,
    metadata: Mapping[str, Any] | None = None,
    wall_seconds: Mapping[str, float] | None = None,
    seed: int = 0,
    check: str = "none",
) -> dict[str, Any]:
    """One JSON object with everything the report shows.

    With several sampling seeds the tables are those of the first; ``seeds`` holds all of them.

    Args:
        records: one per item and sampling seed.
        k: attempts the loop had in all.
        metadata: where the numbers come from (base, adapters, data, seed, versions); JSON values.
        wall_seconds: seconds the whole pass took, under ``drafter`` and ``draft_verify``; either may be missing.
        seed: of the bootstrap behind the intervals.
        check: where other than ``none``, what a calculator adds has rows of its own; all others stay as they are.
    """
    records = calculator_systems.annotated(records, check)
    times, seeds = dict(wall_seconds or {}), by_seed(records)
    rows = next(iter(seeds.values()), [])
    alone = metrics.table(rows, "drafter", wall_seconds=times.get("drafter"))
    checked = metrics.table(rows, "draft_verify", wall_seconds=times.get("draft_verify"), max_attempts=k)
    ceiling = metrics.any_of_k(rows, k)
    alone_by_task, checked_by_task = metrics.by_task(rows, "drafter"), metrics.by_task(rows, "draft_verify")
    checks = any(calculator_systems.checks_by_gold(record, check) for record in rows)
    quality = verifier_quality(rows, seed)
    recorded = min(len(record.drafts) for record in rows)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        # Above everything else: items that were trained or calibrated on are no test.
        "overlap": (metadata or {}).get("overlap"),
        "n": len(rows),
        "k": k,
        "score": rows[0].score_name,
        "threshold": rows[0].threshold,
        "drafter": alone.to_dict(),
        "draft_verify": checked.to_dict(),
        "paired": _paired(rows),
        "exchange": exchange(rows),
        "by_task": {
            task: {"drafter": rate.to_dict(), "draft_verify": checked_by_task[task].to_dict()}
            for task, rate in alone_by_task.items()
        },
        "readings": _readings(rows),
        "verifier_auroc": {
            name: {label: json_value(label_quality.auroc) for label, label_quality in labels.items()}
            for name, labels in quality.items()
        },
        "verifier": {name: {label: q.to_dict() for label, q in labels.items()} for name, labels in quality.items()},
        "oracle": {
            "any_of_k": json_value(ceiling),
            "majority_of_k": json_value(metrics.majority_of_k(rows, k)),
            "gap_closed": metrics.gap_closed(
                checked.accuracy.value, alone.accuracy.value, ceiling.value if ceiling else None
            ),
        },
        "calculator_passed": calculator_slice(rows, k, seed).to_dict(),
        "pass_at_k": _pass_at_k(rows, recorded, seed),
        "majority_at_k": {str(n): json_value(metrics.majority_of_k(rows, n)) for n in range(1, recorded + 1)},
        "attempts": {str(count): items for count, items in sorted(Counter(r.attempts for r in rows).items())},
        "latency_ms": {
            "drafter": [record.first.latency_ms for record in rows if record.first.latency_ms is not None],
            "draft_verify": [record.latency_ms for record in rows if record.latency_ms is not None],
        },
        "sweep": {
            name: {str(at): rates.to_dict() for at, rates in metrics.sweep(rows, THRESHOLDS, k, name).items()}
            for name in quality
        },
        "seeds": _seeds(seeds, k, seed) if len(seeds) > 1 else None,
        "metadata": dict(metadata or {}),
        **(_calculated(seeds, k, seed, check) if checks else {}),
    }


def _pass_at_k(rows: Sequence[ItemRecord], most: int, seed: int) -> dict[str, Any]:
    """By k; empty with grafted drafts, for the estimate is of draws from one distribution."""
    if not all(record.sampled for record in rows):
        return {}
    return {str(n): json_value(metrics.pass_at_k(rows, n, seed)) for n in range(1, most + 1)}


def _calculated(seeds: Mapping[int, Sequence[ItemRecord]], k: int, seed: int, check: str) -> dict[str, Any]:
    """The systems with a calculator: the rows of each, accuracy by task and over all seeds, and tests of the first."""
    summary: dict[str, Any] = {}
    about: dict[str, Any] = {"check": check, "by_task": {}}
    first = next(iter(seeds.values()))
    replayed = {
        name: {one_seed: [system(record, k) for record in rows] for one_seed, rows in seeds.items()}
        for name, (_, system) in calculator_systems.SYSTEMS.items()
    }
    for name, by_one_seed in replayed.items():
        rows = next(iter(by_one_seed.values()))
        summary[name] = metrics.table(rows, "draft_verify", max_attempts=k).to_dict()
        about["by_task"][name] = {task: rate.to_dict() for task, rate in metrics.by_task(rows, "draft_verify").items()}
        if len(seeds) > 1:
            about.setdefault("seeds", {})[name] = json_value(_pooled(list(by_one_seed.values()), "draft_verify", seed))
    checked, alone = (next(iter(replayed[name].values())) for name in ("draft_verify_arithmetic", "calculator"))
    right = {
        name: [record.returned.correct for record in rows] for name, rows in (("verified", checked), ("alone", alone))
    }
    about["against_draft_verify"] = mcnemar([r.returned.correct for r in first], right["verified"]).to_dict()
    about["against_calculator"] = mcnemar(right["alone"], right["verified"]).to_dict()
    return {**summary, "arithmetic": about}


def _paired(records: Sequence[ItemRecord]) -> dict[str, Any]:
    test = metrics.compare(records)
    discordant = (test.only_first + test.only_second) / test.n
    return {
        **test.to_dict(),
        "smallest_difference": smallest_difference(test.n, discordant),
        "fewest_discordant": fewest_discordant(),
    }


def _readings(records: Sequence[ItemRecord]) -> dict[str, Any]:
    """The same generations by every extractor that all of them were read with."""
    names = [set(draft.readings) for record in records for draft in record.drafts]
    common = (
        [name for name in records[0].first.readings if all(name in readings for readings in names)] if names else []
    )
    by_extractor = {}
    for name in common:
        read = [read_with(record, name) for record in records]
        by_extractor[name] = {
            mode: {
                key: json_value(getattr(metrics.table(read, mode), key))
                for key in ("accuracy", "wrong_rate", "no_answer_rate", "cut_off_rate")
            }
            for mode in MODES
        }
    return by_extractor


SEED_ROWS = (
    "accuracy", "wrong_rate", "no_answer_rate", "cut_off_rate", "accept_rate", "accepted_and_correct",
    "false_accept_rate", "accepted_wrong_rate", "average_attempts", "tokens_drafted", "tokens_verified",
)  # fmt: skip


def _seeds(seeds: Mapping[int, Sequence[ItemRecord]], k: int, seed: int) -> dict[str, Any]:
    """Tuples and medians over seeds, and the difference over all of them with items as units."""
    spreads: dict[str, Any] = {"seeds": list(seeds)}
    for mode in MODES:
        tables = [metrics.table(rows, mode, max_attempts=k).to_dict() for rows in seeds.values()]
        spreads[mode] = {name: spread([_value(table[name]) for table in tables]) for name in SEED_ROWS}
        spreads[mode]["accuracy_all_seeds"] = json_value(_pooled(list(seeds.values()), mode, seed))
    first, second = (correct_matrix(seeds, mode) for mode in MODES)
    spreads["difference"] = mean_difference(first, second, seed=seed).to_dict()
    return spreads


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Values per seed and their median, without the seeds where a figure does not apply."""
    known = [value for value in values if value is not None]
    return {"values": list(values), "median": median(known) if known else None}


def _value(cell: Any) -> float | None:
    return cell["value"] if isinstance(cell, Mapping) else cell


def correct_matrix(seeds: Mapping[int, Sequence[ItemRecord]], mode: metrics.Mode) -> np.ndarray:
    """Right or wrong as (items, seeds) float64, items in the order of the first seed."""
    order = [record.id for record in next(iter(seeds.values()))]
    columns = []
    for rows in seeds.values():
        correct = {record.id: float(metrics.final(record, mode).correct) for record in rows}
        columns.append([correct[name] for name in order])
    return np.asarray(columns, dtype=np.float64).T


def _pooled(seeds: Sequence[Sequence[ItemRecord]], mode: metrics.Mode, seed: int) -> Rate | None:
    """Accuracy over all seeds; items, not drafts, are resampled."""
    rows = [record for records in seeds for record in records]
    right = np.asarray([metrics.final(record, mode).correct for record in rows], dtype=np.float64)
    return bootstrapped(lambda chosen: float(right[chosen].mean()), [record.id for record in rows], seed=seed)
