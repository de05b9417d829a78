"""Every pair of adapters measured, in blocks: memory is that of a module of two blocks, of however many adapters.

A block's rows are kept as soon as they are done, and not in memory, so that a table which was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, Protocol

from mlx_rsgwm.audit.pair_audit import NOTHING
from mlx_rsgwm.audit.pool_audit import Arrays, each_module
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import exclusive_file
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.resume import Journal
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.linalg.spectrum import Decompositions
from mlx_rsgwm.merging.pool import Pool, PoolAdapter
from mlx_rsgwm.models.adapter import WEIGHTS_FILE, Adapter
from mlx_rsgwm.probe.inputs import require_common_modules, task_of
from mlx_rsgwm.probe.module_pair import ModuleMeasures, measure_module, some_entries
from mlx_rsgwm.probe.pair_measures import pair_measures
from mlx_rsgwm.probe.signals import signal_measures
from mlx_rsgwm.probe.table import TABLE, VERSION, PairRow, Table

# Adapters of a block. Twice as many are decomposed for its square of pairs, so that decomposing counts little.
BLOCK = 8

Pair = tuple[int, int]


class DataMeasures(Protocol):
    """Measures of pairs that need data (:mod:`~mlx_rsgwm.probe.data_measures`)."""

    @property
    def about(self) -> Mapping[str, Any]: ...

    def of(self, first: int, second: int) -> Mapping[str, float]: ...


def measure_pairs(
    adapters: Sequence[Adapter],
    data: DataMeasures | None = None,
    progress: Progress = SILENT,
    block: int = BLOCK,
    done: frozenset[Pair] = frozenset(),
) -> Iterator[dict[Pair, PairRow]]:
    """The pairs that are not ``done``, rows by positions, block after block.

    Raises:
        AdapterError: an adapter is damaged, or holds values that are not finite.
        RsgwmError: adapters of different bases, without a common module, one that changes nothing another does.
    """
    pool = Pool.open(adapters)
    require_common_modules(pool.sources)
    total = len(adapters) * (len(adapters) - 1) // 2
    with pool.checked(), progress.task("probe measure", total) as advance:
        advance(len(done), "measured before" if done else "")
        for pairs in pair_blocks(len(adapters), block):
            rows = {}
            for pair, row in _measure_block(pool, adapters, [pair for pair in pairs if pair not in done]):
                rows[pair] = row if data is None else replace(row, measures={**row.measures, **data.of(*pair)})
            if rows:
                yield rows
                advance(len(rows), "")


def write_table(
    path: Path,
    adapters: Sequence[Adapter],
    at: float = 1.0,
    data: DataMeasures | None = None,
    replace_other: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Measure every pair that the table at ``path`` has not, and keep each there.

    Raises:
        RsgwmError: also a table of other adapters or settings at ``path``, unless it may be replaced.
    """
    pool = Pool.open(adapters)
    require_common_modules(pool.sources)
    about = table_about(pool.sources, adapters, at, data)
    places = {label: place for place, label in enumerate(about["adapters"])}
    done: set[Pair] = set()

    def take(row: Any, _: str) -> None:
        first, second = (places[name] for name in PairRow.from_dict(row).adapters)
        done.add((first, second))

    with exclusive_file(path):
        journal = Journal(path, about, take, replace_other)
        for rows in measure_pairs(adapters, data, progress, done=frozenset(done)):
            journal.append(row.to_dict() for row in rows.values())


def measured_table(adapters: Sequence[Adapter], at: float = 1.0, progress: Progress = SILENT) -> Table:
    """The table of all pairs, in memory."""
    rows = {pair: row for block in measure_pairs(adapters, None, progress) for pair, row in block.items()}
    about = table_about(Pool.open(adapters).sources, adapters, at, None)
    return Table(about, tuple(rows[pair] for pair in combinations(range(len(adapters)), 2)))


def named_adapters(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Identities by the names that a table has."""
    return {source.label: identity(source) for source in Pool.open(adapters).sources}


def table_about(
    sources: Sequence[PoolAdapter], adapters: Sequence[Adapter], at: float, data: DataMeasures | None
) -> dict[str, Any]:
    """What a table depends on.

    Raises:
        RsgwmError: two adapters of one name.
    """
    labels = [source.label for source in sources]
    if double := sorted({label for label in labels if labels.count(label) > 1}):
        raise RsgwmError(f"adapters need names of their own, two are called {double[0]}")
    return {
        "kind": TABLE,
        "version": VERSION,
        "made_by": versions()["mlx-rsgwm"],
        "at": at,
        "base": next((adapter.base_fingerprint for adapter in adapters if adapter.base_fingerprint), None),
        "adapters": {source.label: identity(source) for source in sources},
        "data": dict(data.about) if data is not None else None,
    }


def identity(source: PoolAdapter) -> str:
    """What tells an adapter from others: the hash of its manifest, of its content, or of its weights' file."""
    known = source.content_hash()
    if known is None and source.folder is not None:
        known = files.sha256_file(source.folder / WEIGHTS_FILE)
    return known or (source.held.content_hash() if source.held is not None else "")


def pair_blocks(count: int, block: int) -> Iterator[list[Pair]]:
    """Every pair of ``count`` once, those of two blocks of ``block`` together."""
    starts = range(0, count, block)
    for first, second in ((i, j) for i in starts for j in starts if i <= j):
        rows, columns = range(first, min(first + block, count)), range(second, min(second + block, count))
        yield [(i, j) for i, j in product(rows, columns) if i < j]


def _measure_block(pool: Pool, adapters: Sequence[Adapter], pairs: Sequence[Pair]) -> Iterator[tuple[Pair, PairRow]]:
    positions = sorted({position for pair in pairs for position in pair})
    if not positions:
        return
    sources = [pool.sources[position] for position in positions]
    local = [(positions.index(first), positions.index(second)) for first, second in pairs]
    modules: dict[Pair, list[ModuleMeasures]] = {pair: [] for pair in local}
    for measured in each_module(replace(pool, sources=tuple(sources)), partial(_measure_module, local)):
        for pair, values in measured.items():
            modules[pair].append(values)
    signals = signal_measures(sources)
    for pair, (first, second) in zip(local, pairs, strict=True):
        names = (sources[pair[0]].label, sources[pair[1]].label)
        if not modules[pair]:
            raise RsgwmError(f"{names[0]} and {names[1]} change no module both: what one changes is zero in the other")
        shared = modules.pop(pair)
        measures = {**pair_measures(shared), **signals.get(pair, {})}
        tasks = (task_of(adapters[first]), task_of(adapters[second]))
        yield (first, second), PairRow(names, tasks, len(shared), measures)


def _measure_module(pairs: Sequence[Pair], name: str, factors: dict[int, Arrays]) -> dict[Pair, ModuleMeasures]:
    together, places = Decompositions(list(factors.values())), {place: at for at, place in enumerate(factors)}
    norms = {place: together.updates[at].norm for place, at in places.items()}
    entries = {place: some_entries(*factors[place]) for place, norm in norms.items() if norm > NOTHING}
    return {
        (first, second): measure_module(
            name, together, (places[first], places[second]), (entries[first], entries[second])
        )
        for first, second in pairs
        if first in entries and second in entries
    }
