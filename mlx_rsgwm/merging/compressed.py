"""The modules' merged updates, cut to the result's rank, in the order of the modules.

Where NumPy alone computes them from sketches, modules are computed in threads, one BLAS thread each: a product of a few
hundred columns gains little from a second, and what is between the products nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import mlx.core as mx

from mlx_rsgwm.linalg.gram import SketchedGram
from mlx_rsgwm.linalg.lowrank import Factors, Truncated, truncate, truncate_dense
from mlx_rsgwm.linalg.metric import Solved, truncate_dense_in, truncate_in, truncate_solved
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.methods import find_method
from mlx_rsgwm.merging.pool_metric import output_errors, stay_sketched
from mlx_rsgwm.models.cpu_threads import cores, one_blas_thread

# A module whose adapters' sketches have more entries together is computed alone: several at once are in memory.
THREADED_ENTRIES = 3 << 19

_Merged = Future[tuple[Layer, Truncated]]


def compressed_modules(
    modules: Iterable[Layer], rank: int, diagnosed: bool, threads: bool = True
) -> Iterator[tuple[Layer, Truncated]]:
    """Every module, without its second moments and their metric, with its merged update; ``diagnosed``: with notes of
    what the result's outputs are like; without ``threads`` each is merged before the next is read.
    """

    def compute(module: Layer) -> tuple[Layer, Truncated]:
        compressed = _compressed(module, find_method(module.method).merge(module), rank)
        if diagnosed:
            _note_outputs(module, compressed)
        return replace(module, grams=()), compressed

    waiting: deque[_Merged] = deque()
    with ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(cores()))
        for module in modules:
            if not threads or (ready := _for_threads(module)) is None:
                yield from (merged.result() for merged in _popped(waiting, 0))
                yield compute(module)
                continue
            if not waiting:
                stack.enter_context(one_blas_thread())
            waiting.append(workers.submit(compute, ready))
            yield from (merged.result() for merged in _popped(waiting, cores()))
        yield from (merged.result() for merged in _popped(waiting, 0))


def _popped(waiting: deque[_Merged], most: int) -> Iterator[_Merged]:
    """The first of ``waiting``, until ``most`` are left."""
    while len(waiting) > most:
        yield waiting.popleft()


def _for_threads(module: Layer) -> Layer | None:
    """The module with all that it needs read, where no more than NumPy computes it; else None."""
    by_numpy = find_method(module.method).by_numpy and module.parameters["truncate"] == "metric"
    if not (by_numpy and stay_sketched(module.grams)):
        return None
    grams = tuple(module.grams)
    if sum(gram.factor.size for gram in grams if isinstance(gram, SketchedGram)) > THREADED_ENTRIES:
        return None
    mx.eval([(update.a, update.b) for update in module.factors])
    return replace(module, grams=grams)


def _compressed(module: Layer, merged: Factors | Solved | mx.array, rank: int) -> Truncated:
    in_metric = module.parameters.get("truncate") == "metric"
    if isinstance(merged, Solved):
        return truncate_solved(merged, rank) if in_metric else truncate(merged.factors(), rank)
    if isinstance(merged, Factors):
        return truncate_in(module.metric.metric, merged, rank) if in_metric else truncate(merged, rank)
    if in_metric:
        return truncate_dense_in(module.metric.metric, merged, rank, module.key)
    return truncate_dense(merged, rank, module.key)


def _note_outputs(module: Layer, compressed: Truncated) -> None:
    """What the result's outputs on the adapters' own inputs are like, where those are known."""
    if compressed.lost is not None:
        module.notes["output_discarded"] = compressed.lost
    if module.grams:
        errors = output_errors(module.grams, module.factors, compressed.factors, module.metric)
        module.notes["output_errors"] = errors
