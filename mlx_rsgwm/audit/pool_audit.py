"""Every adapter of a pool and every pair of them, streamed from disk module by module.

A module's factors are decomposed once for all pairs; nothing of it is kept but numbers, so memory does not grow with
modules or adapters beyond those.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_rsgwm.audit.adapter_audit import AdapterAudit, ModuleSpectrum, audit_of, spectrum_of
from mlx_rsgwm.audit.pair_audit import ENERGY, ModulePair, PairAudit, compare
from mlx_rsgwm.audit.verdicts import PRESETS, Thresholds
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.batching import ROLES
from mlx_rsgwm.linalg.spectrum import Decompositions
from mlx_rsgwm.merging.automatic import has_directions
from mlx_rsgwm.merging.pool import HASHING_THREADS, Pool
from mlx_rsgwm.models.adapter_sources import AdapterSource
from mlx_rsgwm.models.cpu_threads import cores, one_blas_thread

Arrays = tuple[np.ndarray, np.ndarray]
Result = TypeVar("Result")


@dataclass(frozen=True)
class PoolAudit:
    """``adapters`` in their order, and ``pairs`` of their positions that have a common module, each once.

    ``directions``: whether every adapter has directions to draft by, so that a merge can weigh them by what their
    inputs are, and not only by what they hold. ``warnings``: what is odd about the pool; ``base``: what the adapters
    call theirs, empty where they do not.
    """

    adapters: tuple[AdapterAudit, ...]
    pairs: tuple[PairAudit, ...]
    thresholds: Thresholds
    directions: bool = False
    warnings: tuple[str, ...] = ()
    base: str = ""

    @cached_property
    def only_here(self) -> tuple[list[str], ...]:
        """Of every adapter in a pool of several the modules that no other has."""
        owners = Counter(module.name for adapter in self.adapters for module in adapter.modules)
        several = len(self.adapters) > 1
        return tuple(
            [module.name for module in adapter.modules if several and owners[module.name] == 1]
            for adapter in self.adapters
        )

    @property
    def labels(self) -> list[str]:
        """Where the adapters are, in their order."""
        return [adapter.label for adapter in self.adapters]


@dataclass(frozen=True)
class _Module:
    """What is kept of one module: a spectrum of each adapter that has it, and the pairs among those."""

    spectra: dict[int, ModuleSpectrum]
    pairs: dict[tuple[int, int], ModulePair]


def audit(
    adapters: Sequence[AdapterSource],
    thresholds: Thresholds = PRESETS["post"],
    energy: float = ENERGY,
    progress: Progress = SILENT,
) -> PoolAudit:
    """Audit every adapter, and of several every pair.

    Args:
        adapters: one or more, each as for :func:`~mlx_rsgwm.models.adapter_sources.load_adapters`.
        thresholds: where the verdicts change.
        energy: the share of Σσ² whose directions count as an update's subspace.
        progress: told of modules.

    Raises:
        AdapterError: an adapter is damaged, or holds values that are not finite.
        RsgwmError: adapters of different bases, one without a module of the first (some of both are named).
    """
    if not 0 < energy <= 1:
        raise RsgwmError(f"energy must be above 0 and at most 1, found {energy}")
    pool = Pool.open(adapters)
    with (
        pool.checked(),
        ThreadPoolExecutor(HASHING_THREADS) as hashing,
        progress.task("audit", len(pool.modules)) as advance,
    ):
        hashed = [hashing.submit(source.content_hash) for source in pool.sources]
        modules = []
        for module in each_module(pool, partial(_measure, thresholds, energy)):
            modules.append(module)
            advance(1, "")
    return PoolAudit(
        tuple(
            audit_of(
                source.label, hashed[index].result(), [each.spectra[index] for each in modules if index in each.spectra]
            )
            for index, source in enumerate(pool.sources)
        ),
        tuple(
            PairAudit(*pair, shared)
            for pair in combinations(range(len(pool.sources)), 2)
            if (shared := tuple(each.pairs[pair] for each in modules if pair in each.pairs))
        ),
        thresholds,
        has_directions(pool, ROLES[0]),
        pool.warnings,
        next((str(name) for each in pool.sources if (name := (each.manifest.get("base") or {}).get("name"))), ""),
    )


def each_module(pool: Pool, work: Callable[[str, dict[int, Arrays]], Result]) -> Iterator[Result]:
    """``work`` of every module's name and factors, in order: a (in, r) and b (r, out, scale in it) by the positions of
    the adapters that have it. In threads of one BLAS thread each; a few modules are in memory at a time.
    """
    waiting: deque[Future[Result]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(cores()) as workers:
        for name, factors in pool.updates():
            mx.eval([(update.a, update.b) for update in factors])
            present = {
                index: (np.array(update.a, copy=False), np.array(update.b, copy=False))
                for index, (source, update) in enumerate(zip(pool.sources, factors, strict=True))
                if name in source.shapes
            }
            waiting.append(workers.submit(work, name, present))
            if len(waiting) > cores():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _measure(thresholds: Thresholds, energy: float, name: str, factors: dict[int, Arrays]) -> _Module:
    together, places = Decompositions(list(factors.values())), list(factors)
    updates = together.updates
    return _Module(
        {place: spectrum_of(name, update) for place, update in zip(places, updates, strict=True)},
        {
            (places[a], places[b]): compare(name, updates[a], updates[b], together.products(a, b), thresholds, energy)
            for a, b in combinations(range(len(places)), 2)
        },
    )
