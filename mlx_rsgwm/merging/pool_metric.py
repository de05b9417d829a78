"""The metric in which a module's outputs are compared across a pool: M = Σ w_t Ḡ_t over its adapters' input moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.gram import Gram, Moment, SketchedGram, WholeGram, added, float64, no_gram
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.linalg.metric import (
    Metric,
    SketchedMetric,
    Solved,
    WholeMetric,
    inner,
    sketched_metric,
    whole_metric,
)
from mlx_rsgwm.merging.parameters import Parameter

RAISES = 5  # of the ridge, tenfold each, before second moments are given up
# An adapter whose outputs here have a norm a hundred times below the largest counts as if it were a hundred times.
LARGEST_RATIO = 1e4
TOGETHER = 512  # columns: all of a large pool would take as much memory as the sum
EXPONENTS = {"relative": 1.0, "root": 0.5, "equal": 0.0}

PARAMETERS: Mapping[str, Parameter] = {
    # Least loss of accuracy and AUROC where updates differ sixfold in norm, and the same where they are alike:
    # docs/lab-notes/merging-two-pools.md.
    "balance": Parameter(
        "equal",
        "an adapter's error counts relative to its own outputs, as it is, or halfway between (root)",
        choices=("relative", "root", "equal"),
    ),
    "off_diagonal": Parameter(1.0, "factor on the second moments' entries off the diagonal", 0, 1),
    # 1e-6 leaves directions without input free: on the demo's pool the result had 1.6 times the norm that it has here,
    # and outputs on held-out rows were no nearer; from 1e-2 on they are less near.
    "ridge": Parameter(1e-3, "times the mean of the diagonal, added to it", 0, 1),
    "truncate": Parameter(
        "metric", "what the rank keeps: the outputs on these inputs, or the update", choices=("metric", "plain")
    ),
}


class ModuleGrams(Sequence[Gram]):
    """The T second moments of the inputs of ``module`` (``width`` long), each read when asked for and not kept; zero
    where an adapter has no such module.
    """

    def __init__(self, readers: Sequence[Mapping[str, Gram]], module: str, width: int) -> None:
        self._readers, self._module, self._width = readers, module, width

    def __len__(self) -> int:
        return len(self._readers)

    @overload
    def __getitem__(self, index: int) -> Gram: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Gram]: ...
    def __getitem__(self, index: int | slice) -> Gram | Sequence[Gram]:
        if isinstance(index, slice):
            return ModuleGrams(self._readers[index], self._module, self._width)
        reader = self._readers[index]
        gram = reader[self._module] if self._module in reader else no_gram(self._width)
        if gram.width != self._width:
            raise RsgwmError(
                f"directions of {self._module} are of {gram.width} inputs, and it has {self._width}; collect them anew"
            )
        return gram


@dataclass(frozen=True)
class PoolMetric:
    """``metric`` M = Σ w_t Ḡ_t; ``right`` [w_1 Ḡ_1 a_1 … w_T Ḡ_T a_T] (in, Σ r) in the form that ``metric`` solves for;
    ``moments`` what products with the a_t take of the G_t; ``outputs`` the T ‖X_t ΔW_t‖²_F / n; ``weights`` the w_t;
    ``ridge`` the one in Ḡ_t.
    """

    metric: Metric
    right: tuple[np.ndarray, ...]
    moments: tuple[Moment, ...]
    outputs: tuple[float, ...]
    weights: tuple[float, ...]
    ridge: float

    def solution(self, factors: Sequence[Factors]) -> Solved:
        """M⁻¹ Σ w_t Ḡ_t a_t b_t of the T updates, of rank Σ r."""
        a, products = self.metric.solve(*self.right)
        return Solved(a, stacked_b(factors), products)


def stacked_b(factors: Sequence[Factors]) -> np.ndarray:
    """The T updates' b one below the other, (Σ r, out) float64."""
    return np.concatenate([float64(update.b) for update in factors], axis=0)


def pool_metric(
    name: str,
    grams: Sequence[Gram],
    factors: Sequence[Factors],
    weights: Sequence[float],
    parameters: Mapping[str, Any],
) -> PoolMetric:
    """From T second moments G_t and updates a_t b_t of the module ``name``, and the user's weights.

    Ḡ_t is G_t with its entries off the diagonal times ``off_diagonal``, and ``ridge`` · tr(G_t) / in added to its
    diagonal. w_t is the user's weight, with ``balance`` relative over ‖X_t ΔW_t‖², with root over ‖X_t ΔW_t‖. The ridge
    is added to every G_t and not to their sum alone, so that equal updates stay as they are and directions without any
    input get the mean. Where the data is too little for a sound solution (fewer tokens than inputs) it is raised
    tenfold until it suffices.

    Raises:
        RsgwmError: the second moments are zero or not finite.
    """
    settled = {key: parameters.get(key, parameter.default) for key, parameter in PARAMETERS.items()}
    moments = tuple(gram.moment(update.a) for gram, update in zip(grams, factors, strict=True))
    outputs = tuple(
        inner(gram.between(moment, moment), update, update)
        for gram, moment, update in zip(grams, moments, factors, strict=True)
    )
    balanced = _balanced(weights, outputs, EXPONENTS[settled["balance"]])
    ridge = settled["ridge"]
    summed = _sketched if stay_sketched(grams) else _whole
    for _ in range(RAISES):
        metric, right = summed(grams, moments, balanced, settled["off_diagonal"], ridge)
        if metric is not None:
            return PoolMetric(metric, right, moments, outputs, balanced, ridge)
        ridge = max(10 * ridge, 1e-7)
    raise RsgwmError(
        f"{name}: the directions of its inputs are singular or not finite; collect them on more rows "
        "(rsgwm directions collect ADAPTER --corpus ROWS --replace), or set off_diagonal below 1"
    )


def output_errors(grams: Sequence[Gram], factors: Sequence[Factors], merged: Factors, metric: PoolMetric) -> mx.array:
    """‖X_t (ΔW − ΔW_t)‖² / ‖X_t ΔW_t‖² of the T adapters, (T,) float32; 0 where an adapter has no output here."""
    errors = []
    a = float64(merged.a)
    for gram, update, moment, output in zip(grams, factors, metric.moments, metric.outputs, strict=True):
        result = gram.moment(a)
        square, cross = (
            inner(gram.between(result, result), merged, merged),
            inner(gram.between(result, moment), merged, update),
        )
        errors.append(max(square - 2 * cross + output, 0.0) / output if output > 0 else 0.0)
    return mx.array(errors)


def _balanced(weights: Sequence[float], outputs: Sequence[float], exponent: float) -> tuple[float, ...]:
    """The weights over powers of the outputs' squared norms, the largest of which is 1. Without output nothing is
    relative to it: such an adapter counts like the one with the largest, no more than any other.
    """
    largest = max(outputs)
    if not 0 < largest < float("inf"):
        return tuple(weights)
    sizes = [max(output / largest, 1 / LARGEST_RATIO) if output > 0 else 1.0 for output in outputs]
    return tuple(weight / size**exponent for weight, size in zip(weights, sizes, strict=True))


def stay_sketched(grams: Sequence[Gram]) -> bool:
    """Whether all are sketches, and their columns together fewer than the inputs."""
    columns = 0
    for gram in grams:
        if not isinstance(gram, SketchedGram):
            return False
        columns += gram.factor.shape[1]
    return columns < grams[0].width


def _sketched(
    grams: Sequence[Any], moments: Sequence[Moment], weights: Sequence[float], off_diagonal: float, ridge: float
) -> tuple[SketchedMetric | None, tuple[np.ndarray, ...]]:
    """Σ w_t Ḡ_t of sketches, and the w_t Ḡ_t a_t as P, in blocks, and H of :class:`SketchedMetric`."""
    shares = [weight * off_diagonal for weight in weights]
    diagonals = [
        weight * (off_diagonal * gram.rest + added(gram, off_diagonal, ridge))
        for gram, weight in zip(grams, weights, strict=True)
    ]
    metric = sketched_metric([gram.factor for gram in grams], shares, np.sum(diagonals, axis=0))
    if metric is None:
        return None, ()
    rows = np.cumsum([0, *(len(moment.image) for moment in moments)])
    columns = np.cumsum([0, *(moment.columns.shape[1] for moment in moments)])
    coordinates, rest = np.zeros((rows[-1], columns[-1])), np.empty((grams[0].width, columns[-1]))
    for t, (share, moment, diagonal) in enumerate(zip(shares, moments, diagonals, strict=True)):
        place = slice(columns[t], columns[t + 1])
        coordinates[rows[t] : rows[t + 1], place] = math.sqrt(share) * moment.image
        np.multiply(moment.columns, (diagonal * metric.scale)[:, None], out=rest[:, place])
    return metric, (coordinates, rest)


def _whole(
    grams: Sequence[Gram], moments: Sequence[Moment], weights: Sequence[float], off_diagonal: float, ridge: float
) -> tuple[WholeMetric | None, tuple[np.ndarray, ...]]:
    """Σ w_t Ḡ_t as a matrix, read one after the other, and the w_t Ḡ_t a_t.

    Sketches are multiplied out together, ``TOGETHER`` columns: their products alone take as long as the whole.
    """
    width = grams[0].width
    total, rest, columns = np.zeros((width, width)), np.zeros(width), []
    factors: list[np.ndarray] = []
    for gram, moment, weight in zip(grams, moments, weights, strict=True):
        share, diagonal = weight * off_diagonal, added(gram, off_diagonal, ridge)
        columns.append(weight * (off_diagonal * gram.product(moment) + diagonal[:, None] * moment.columns))
        rest += weight * diagonal
        if isinstance(gram, WholeGram):
            total += share * gram.matrix
            continue
        rest += share * gram.rest
        factors.append(math.sqrt(share) * gram.factor)
        if sum(factor.shape[1] for factor in factors) >= TOGETHER:
            total += _multiplied_out(factors)
            factors = []
    if factors:
        total += _multiplied_out(factors)
    total[np.diag_indices(width)] += rest
    return whole_metric(total), (np.concatenate(columns, axis=1),)


def _multiplied_out(factors: Sequence[np.ndarray]) -> np.ndarray:
    """Σ f fᵀ, (in, in)."""
    stacked = np.concatenate(factors, axis=1)
    product: np.ndarray = stacked @ stacked.T
    return product
