"""Inner products of a module's merged update with its sources, while its factors are in memory: what a diagnosis needs.

Nothing dense is formed but where that is cheaper; products are float32. On Linux's CPU NumPy takes them, in
threads beside the merge: there MLX computes elementwise on one core, and thin products slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.linalg.lowrank import Factors, Truncated, cross, owner_matrix, stack
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.models.cpu_threads import cores, one_blas_thread
from mlx_rsgwm.models.linux_cpu import applies

# Updates are stacked for their inner products until their ranks reach this sum.
STACKED_RANK = 128
# Weights below this share of the largest are not divided by.
SMALLEST_WEIGHT = 1e-3

# Of one module: ``square`` ‖merged‖², ``squares`` (T,), ``dots`` (T,), ``mean_square`` ‖mean of the sources‖²,
# ``discarded`` (what truncation took from ``square``), and the method's notes under note/.
MeasuredRow = Mapping[str, Any]


def measured_beside(updates: Sequence[Factors], merged: Factors) -> bool:
    """Whether :func:`measure_in_numpy` takes these, in a thread beside the merge, once all arrays are evaluated."""
    return applies() and sum(update.rank for update in updates) + merged.rank <= STACKED_RANK


def measure_in_numpy(updates: Sequence[Factors], merged: Factors, ranks: Sequence[int]) -> dict[str, Any]:
    """A row's ``square``, ``squares``, ``dots`` and ``mean_square`` as numbers, from evaluated arrays."""
    everything = (*updates, merged)
    a = np.concatenate([np.array(update.a, copy=False) for update in everything], axis=1)
    b = np.concatenate([np.array(update.b, copy=False) for update in everything], axis=0)
    starts = np.cumsum([0, *ranks])
    with np.errstate(over="ignore", invalid="ignore"):
        pieces = ((a.T @ a) * (b @ b.T)).astype(np.float64)  # symmetric: NumPy has BLAS do half the work
        products = np.add.reduceat(np.add.reduceat(pieces, starts, axis=0), starts, axis=1)
    return {
        "square": float(products[-1, -1]),
        "squares": np.diag(products)[:-1].tolist(),
        "dots": products[-1, :-1].tolist(),
        "mean_square": float(products[:-1, :-1].sum()) / len(ranks) ** 2,
    }


def measure(updates: Sequence[Factors], merged: Factors) -> dict[str, mx.array]:
    """The same as arrays, not yet evaluated, of whatever number and ranks: (T,) or scalar float32.

    Time is linear in T.
    """
    if sum(update.rank for update in updates) + merged.rank <= STACKED_RANK:
        stacked = stack((*updates, merged))
        pieces, rank = _products(stacked, stacked), merged.rank
        owners = owner_matrix(tuple(update.rank for update in updates))
        # Sources apart from the result: where that is not finite, they may well be.
        sources = pieces[:-rank, :-rank]
        squares, square_of_sum = ((sources @ owners) * owners).sum(axis=0), sources.sum()
        square, dots = pieces[-rank:, -rank:].sum(), pieces[-rank:, :-rank].sum(axis=0) @ owners
    else:
        squares, square_of_sum = _squares(updates)
        square, dots = cross(merged, merged), _dots(merged, updates)
    return {"square": square, "squares": squares, "dots": dots, "mean_square": square_of_sum / len(updates) ** 2}


# A module's name, its sources as factors or stacks of them, its result, and the T sources' ranks in these.
Job = tuple[str, tuple[Factors, ...], Factors, tuple[int, ...]]


@dataclass
class LayerBatch:
    """Modules that are evaluated together: ``arrays`` to evaluate, and the ``jobs`` that can be measured thereafter.

    ``entries`` of the updates ΔW and ``held`` entries of the adapters' factors, so far.
    """

    arrays: list[Any] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    entries: int = 0
    held: int = 0

    def diagnose(self, module: Layer, merged: Truncated) -> dict[str, Any]:
        """A :data:`MeasuredRow`, of which :func:`measuring` fills in the inner products where it takes them."""
        row: dict[str, Any] = {f"note/{name}": value for name, value in module.notes.items()}
        row["discarded"] = merged.discarded
        if measured_beside(module.factors, merged.factors):
            updates, result = _in_core(module, merged) or (module.factors, merged.factors)
            self.jobs.append((module.name, updates, result, tuple(update.rank for update in module.factors)))
            self.arrays += [part for factors in (*updates, result) for part in (factors.a, factors.b)]
        else:
            row |= measure(module.factors, merged.factors)
        self.arrays.append(dict(row))
        return row


def _in_core(module: Layer, merged: Truncated) -> tuple[tuple[Factors], Factors] | None:
    """The sources of a weighted mean, stacked, and the result, in the few coordinates that the mean was truncated in.

    Inner products there are those of the updates, and Σ r_t is a fraction of their length. None of other results, whose
    coefficients may vanish, and where a source has so little weight that dividing by it would lose it.
    """
    coefficients = module.notes.get("coefficients")
    sizes = [abs(weight) for weight in module.weights]
    if module.method != "linear" or merged.core is None or coefficients is None:
        return None
    if min(sizes) < SMALLEST_WEIGHT * max(sizes):
        return None
    stacked, result = merged.core
    each = owner_matrix(tuple(update.rank for update in module.factors)) @ coefficients.astype(mx.float32)
    return (Factors(stacked.a, stacked.b / each[:, None]),), result


@contextmanager
def measuring(
    rows: Mapping[str, dict[str, Any]], merged_by_numpy: bool = False
) -> Iterator[Callable[[Sequence[Job]], None]]:
    """What takes inner products beside the merge, from jobs whose arrays are evaluated; ``rows`` has them all when the
    block ends.

    A batch waits for the one before, so no more factors are held than those of two. A thread a core takes every other
    module: a product of 80 columns gains nothing from a second BLAS thread. With ``merged_by_numpy`` the merge itself
    is NumPy's, and is left them all.
    """
    running: list[Future[None]] = []

    def measure_share(jobs: Sequence[Job]) -> None:
        for name, updates, merged, ranks in jobs:
            rows[name].update(measure_in_numpy(updates, merged, ranks))

    def finish() -> None:
        while running:
            running.pop().result()

    workers = ThreadPoolExecutor(cores())

    def start(jobs: Sequence[Job]) -> None:
        finish()
        shares = [jobs[first :: cores()] for first in range(cores())]
        running.extend(workers.submit(measure_share, share) for share in shares if share)

    try:
        with nullcontext() if merged_by_numpy else one_blas_thread():
            yield start
            finish()
    finally:
        workers.shutdown(cancel_futures=True)


def _squares(updates: Sequence[Factors]) -> tuple[mx.array, mx.array]:
    """‖ΔW_t‖² of every update, (T,), and ‖Σ_t ΔW_t‖², by whichever takes less time."""
    rows, columns = updates[0].a.shape[0], updates[0].b.shape[1]
    # Of a sum every product is taken; a pair is taken once, but the later of its stacks is made anew.
    if sum(update.rank for update in updates) * (rows + columns) < 3 * rows * columns:
        return _squares_by_pairs(updates)
    return _squares_by_sum(updates)


def _squares_by_pairs(updates: Sequence[Factors]) -> tuple[mx.array, mx.array]:
    squares, total = [], mx.array(0.0)
    for index, (some, owners) in enumerate(_stacks(updates)):
        products = _products(some, some)
        squares.append(((products @ owners) * owners).sum(axis=0))
        total = total + products.sum()
        for later, _ in islice(_stacks(updates), index + 1, None):
            total = total + 2 * _products(some, later).sum()
            mx.eval(total)  # before the next stack is made
    return mx.concatenate(squares), total


def _squares_by_sum(updates: Sequence[Factors]) -> tuple[mx.array, mx.array]:
    squares, total = [], mx.zeros((updates[0].a.shape[0], updates[0].b.shape[1]))
    for some, owners in _stacks(updates):
        squares.append(((_products(some, some) @ owners) * owners).sum(axis=0))
        total = mx.addmm(total, some.a, some.b)
        mx.eval(squares, total)  # before the next stack is made
    flat = total.reshape(-1)
    return mx.concatenate(squares), flat @ flat


def _dots(merged: Factors, updates: Sequence[Factors]) -> mx.array:
    """(T,): inner products of the merged update with every other."""
    dots = mx.zeros((0,))
    for some, owners in _stacks(updates):
        mx.eval(dots)  # before the next stack is made
        dots = mx.concatenate([dots, _products(merged, some).sum(axis=0) @ owners])
    return dots


def _stacks(updates: Sequence[Factors]) -> Iterator[tuple[Factors, mx.array]]:
    """Some updates after the others stacked, so that never all are in memory twice, with their owner matrix."""
    step = max(1, STACKED_RANK // max(update.rank for update in updates))
    for start in range(0, len(updates), step):
        some = updates[start : start + step]
        yield stack(some), owner_matrix(tuple(update.rank for update in some))


def _products(first: Factors, second: Factors) -> mx.array:
    """(r₁, r₂): inner products of the rank-1 parts of one update with those of the other."""
    return (first.a.T @ second.a) * (first.b @ second.b.T)
