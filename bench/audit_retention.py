"""What merges keep of trained adapters, and whether a verdict held: the second half of ``bench/audit_study.py``.

Pools are those of ``bench/merge_study.py``. What is measured is kept beside them at once, in ``audit/`` of the study's
folder, so that a run which was cut off goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.audit.advice import CARE, GO, STOP, advise, word_of
from mlx_rsgwm.audit.carry_out import merge_by_plan
from mlx_rsgwm.audit.eligibility import Measured, held_out_rows, nats_under
from mlx_rsgwm.audit.outcomes import WORST_QUALITY, structure_of
from mlx_rsgwm.audit.plan import plan_of
from mlx_rsgwm.audit.pool_audit import PoolAudit, audit
from mlx_rsgwm.audit.report import share_of
from mlx_rsgwm.audit.retention import Behaviour, Retention, retention
from mlx_rsgwm.bench.merge_study import POOLS, save_questions
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.core.resume import Journal
from mlx_rsgwm.core.tables import Rows, Section, show, text_page, write_page
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.evaluation.stats.intervals import wilson
from mlx_rsgwm.inference.open import load_base_for
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter, is_complete
from mlx_rsgwm.models.adapter_sources import load_adapters
from mlx_rsgwm.models.slots import AdapterSlots

MERGES = ("naive", "norm_equalised", "plan", "default")  # of a whole pool
PAIR_MERGES = ("naive", "default")
WORDS = (GO, CARE, STOP)


@dataclass(frozen=True)
class Trained:
    """One pool of one seed, trained."""

    pool: str
    seed: int
    folder: Path

    @property
    def tasks(self) -> list[str]:
        """Of its adapters, in their order."""
        return [family.task for family in POOLS[self.pool]]

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.pool}-seed-{self.seed}"


class Meter:
    """Nats of rows under merges, measured once and kept in a journal."""

    def __init__(self, slots: AdapterSlots, rows: Sequence[Sequence[TokenRow]], path: Path, about: Any) -> None:
        self._slots, self._rows = slots, rows
        self._known: dict[tuple[str, int], np.ndarray] = {}
        self._told: dict[str, dict[str, Any]] = {}
        self._journal = Journal(path, about, self._take)

    def _take(self, row: Mapping[str, Any], _where: str) -> None:
        if "nats" in row:
            self._known[row["name"], row["source"]] = np.asarray(row["nats"], np.float64)
        else:
            self._told[row["name"]] = row["told"]

    def nats(self, name: str, source: int, made: Callable[[], Adapter] | None) -> np.ndarray:
        """Of the rows of a source under what ``made`` gives, or the base."""
        if (name, source) not in self._known:
            if made is not None:
                self._slots.load(name, made())
            measured = nats_under(self._slots, name if made else None, self._rows[source])
            if made is not None:
                self._slots.unload(name)
            self._journal.append([row := {"name": name, "source": source, "nats": measured.tolist()}])
            self._take(row, "")
        return self._known[name, source]

    def told(self, name: str, tell: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``tell`` says of a merge, asked once."""
        if name not in self._told:
            self._journal.append([row := {"name": name, "told": tell()}])
            self._take(row, "")
        return self._told[name]


def study(folder: Path, rows: int, pools: Iterable[str], seeds: Iterable[int], tables: Path | None) -> dict[str, Any]:
    """Measure every pool that is trained, print the tables, and give them as a JSON object.

    Raises:
        RsgwmError: no pool in ``folder`` is trained.
    """
    pools_asked = [Trained(pool, seed, folder / pool / f"seed-{seed}") for pool in pools for seed in seeds]
    trained = [each for each in pools_asked if all(is_complete(each.folder / task) for task in each.tasks)]
    for each in pools_asked:
        if each not in trained:
            print(f"{each.name}: not trained yet, left out", flush=True)
    if not trained:
        raise RsgwmError(f"no pool in {folder} is trained; python bench/merge_study.py {folder} --stage train does")
    first = load_adapters([trained[0].folder / trained[0].tasks[0]], lazy=True)
    slots = AdapterSlots(load_base_for(first, None, LineProgress()))
    measured = []
    for each in trained:
        measured.append(measure_pool(slots, each, folder / "audit", rows))
        print(text_page([pool_table(measured[-1])]), "\n", flush=True)
    result = {"rows": rows, "pools": measured, "verdicts": verdict_counts(measured)}
    print(text_page(summaries(result)))
    if tables is not None:
        write_page(tables, "What merges keep", [*map(pool_table, measured), *summaries(result)])
    return result


def measure_pool(slots: AdapterSlots, trained: Trained, out: Path, count: int) -> dict[str, Any]:
    """Every merge of a pool, and of its pairs, on rows that are new to each of its adapters."""
    adapters = load_adapters([trained.folder / task for task in trained.tasks])
    files = [save_questions(out / trained.name, task, count, trained.seed) for task in trained.tasks]
    rows = [
        held_out_rows(str(file), each, slots.base, count, trained.seed)[0]
        for file, each in zip(files, adapters, strict=True)
    ]
    about = {"rows": count, "adapters": [adapter.files_hash() for adapter in adapters]}
    meter = Meter(slots, rows, out / f"{trained.name}.jsonl", about)
    sources = [
        Measured(
            task,
            tuple(rows[index]),
            meter.nats("base", index, None),
            meter.nats(f"alone {task}", index, lambda index=index: adapters[index]),  # type: ignore[misc]
            np.array([len(row.trained_positions()) for row in rows[index]]),
        )
        for index, task in enumerate(trained.tasks)
    ]
    audited = audit(adapters)
    return {
        "pool": trained.pool,
        "seed": trained.seed,
        "adapters": trained.tasks,
        "norms": [adapter.norm for adapter in audited.adapters],
        "verdict": advise(audited).to_dict(trained.tasks),
        "alone": [each.eligibility(trained.seed).to_dict() for each in sources],
        "merges": {name: of_pool(meter, name, adapters, sources, trained.seed) for name in MERGES},
        "pairs": [of_pair(meter, audited, place, adapters, sources, trained) for place in range(len(audited.pairs))],
    }


def of_pool(
    meter: Meter, name: str, adapters: Sequence[Adapter], sources: Sequence[Measured], seed: int
) -> dict[str, Any]:
    """What one merge of the whole pool keeps of every adapter, and what of each is in it."""
    made = cache(partial(merged_by, name, adapters, seed))

    def tell() -> dict[str, Any]:
        described = made().manifest["merge"]
        return {"method": described["method"], "structure": structure_of(made(), adapters).to_dict()}

    retained = [retention(each, meter.nats(name, index, made), seed) for index, each in enumerate(sources)]
    return {**meter.told(name, tell), **Behaviour(tuple(retained)).to_dict()}


def of_pair(
    meter: Meter,
    audited: PoolAudit,
    place: int,
    adapters: Sequence[Adapter],
    sources: Sequence[Measured],
    trained: Trained,
) -> dict[str, Any]:
    """One pair: the verdict on it, and what merges of the two keep of each."""
    pair = audited.pairs[place]
    both = (pair.first, pair.second)
    names = [trained.tasks[index] for index in both]
    merges = {}
    for name in PAIR_MERGES:
        made = cache(partial(merged_by, name, [adapters[index] for index in both], trained.seed))
        label = f"{name} {' '.join(names)}"
        retained = [retention(sources[index], meter.nats(label, index, made), trained.seed) for index in both]
        merges[name] = Behaviour(tuple(retained)).to_dict()
    told = {"adapters": names, "verdict": pair.verdict, "word": word_of(pair), "ratio": pair.frobenius_ratio}
    return {**told, "overlap": pair.mean_overlap, "merges": merges}


def merged_by(name: str, adapters: Sequence[Adapter], seed: int) -> Adapter:
    """The mean, equal norms, the plan of their audit, or what ``rsgwm merge`` does by itself."""
    if name == "plan":
        return merge_by_plan(plan_of(audit(adapters)), adapters, MergeOptions(seed=seed))
    equal = (1 / len(adapters),) * len(adapters)
    options = {
        "naive": MergeOptions("linear", weights=equal, seed=seed),
        "norm_equalised": MergeOptions("norm_equalised", seed=seed),
        "default": MergeOptions(seed=seed),
    }
    return merge(adapters, options[name])


def verdict_counts(pools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By merge and verdict: of how many pairs at least .95 of each adapter was kept, among those where both have
    something to keep."""
    rows = []
    for merge_name, word in ((merge_name, word) for merge_name in PAIR_MERGES for word in WORDS):
        pairs = [pair["merges"][merge_name] for pool in pools for pair in pool["pairs"] if pair["word"] == word]
        known = [pair for pair in pairs if all(source["share"] is not None for source in pair["sources"])]
        passed = sum(pair["q_min"] >= WORST_QUALITY for pair in known)
        rate = wilson(passed, len(known))
        told = {"merge": merge_name, "word": word, "pairs": len(pairs), "judged": len(known), "kept": passed}
        rows.append({**told, "share": rate and rate.to_dict()})
    return rows


def pool_table(measured: Mapping[str, Any]) -> Section:
    """One line a merge: what it keeps of every source, Q_min, D."""
    losses = measured["alone"]
    table = [["", *measured["adapters"], "Q_min", "D"]]
    table.append(["norm", *(f"{norm:.3g}" for norm in measured["norms"]), "", ""])
    for name in ("base", "adapter"):
        cells = (f"{each[f'{name}_nll']:.3f} nats" for each in losses)
        table.append(["base" if name == "base" else "alone", *cells, "", ""])
    for name, row in measured["merges"].items():
        cells = (share_of(Retention(**source)) for source in row["sources"])
        table.append([f"{name} ({row['method']})", *cells, show(row["q_min"]), show(row["dominance"])])
    rows = sorted({each["rows"] for each in losses})
    told = f"{'–'.join(map(str, rows))} rows each; verdict: {measured['verdict']['verdict']}"
    return f"Pool {measured['pool']}, seed {measured['seed']}: what merges keep ({told})", table


def summaries(result: Mapping[str, Any]) -> list[Section]:
    """Means over seeds by pool and merge, and how often each verdict held."""
    return [("Over the seeds: mean, least and most", over_seeds(result["pools"])), held(result["verdicts"])]


def over_seeds(pools: Sequence[Mapping[str, Any]]) -> Rows:
    """Q_min and D of every merge of a pool: mean of its seeds, the least and the most."""
    table = [["pool", "merge", "seeds", "Q_min", "D"]]
    for pool in dict.fromkeys(each["pool"] for each in pools):
        for name in MERGES:
            rows = [each["merges"][name] for each in pools if each["pool"] == pool]
            cells = [_spread([row[key] for row in rows if row[key] is not None]) for key in ("q_min", "dominance")]
            table.append([pool, name, str(len(rows)), *cells])
    return table


def _spread(values: Sequence[float]) -> str:
    if not values:
        return show(None)
    return show({"value": float(np.mean(values)), "low": min(values), "high": max(values)})


def held(counts: Sequence[Mapping[str, Any]]) -> Section:
    """How often each verdict held."""
    table = [["verdict on the pair", "merge", "pairs", "both have something to keep", "kept .95 of both", "share"]]
    for row in counts:
        table.append(
            [row["word"], row["merge"], *(str(row[key]) for key in ("pairs", "judged", "kept")), show(row["share"])]
        )
    return "Pairs: how often a merge kept at least .95 of both", table
