"""The metric in which a module's outputs are compared across a pool: M = Σ w_t Ḡ_t over its adapters' input moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.gram import Gram, added, float64, no_gram, total
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.linalg.metric import Metric, factorised, inner
from mlx_rsgwm.merging.parameters import Parameter

RAISES = 5  # of the ridge, tenfold each, before second moments are given up
# An adapter whose outputs here have a norm a hundred times below the largest counts as if it were a hundred times.
LARGEST_RATIO = 1e4

PARAMETERS: Mapping[str, Parameter] = {
    "balance": Parameter(
        "relative",
        "an adapter's error counts relative to its own outputs, or as it is",
        choices=("relative", "equal"),
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
        return reader[self._module] if self._module in reader else no_gram(self._width)


@dataclass(frozen=True)
class PoolMetric:
    """``metric`` M = Σ w_t Ḡ_t; ``seen`` [w_1 Ḡ_1 a_1 … w_T Ḡ_T a_T], (in, Σ r) float64; ``moments`` the T G_t a_t;
    ``outputs`` the T ‖X_t ΔW_t‖²_F / n; ``weights`` the w_t; ``ridge`` the one in Ḡ_t.
    """

    metric: Metric
    seen: np.ndarray
    moments: tuple[np.ndarray, ...]
    outputs: tuple[float, ...]
    weights: tuple[float, ...]
    ridge: float


def pool_metric(
    name: str,
    grams: Sequence[Gram],
    factors: Sequence[Factors],
    weights: Sequence[float],
    parameters: Mapping[str, Any],
) -> PoolMetric:
    """From T second moments G_t and updates a_t b_t of the module ``name``, and the user's weights.

    Ḡ_t is G_t with its entries off the diagonal times ``off_diagonal``, and ``ridge`` · tr(G_t) / in added to its
    diagonal. w_t is the user's weight, with ``balance`` relative over ‖X_t ΔW_t‖². The ridge is added to every G_t and
    not to their sum alone, so that equal updates stay as they are and directions without any input get the mean. Where
    the data is too little for a sound solution (fewer tokens than inputs) it is raised tenfold until it suffices.

    Raises:
        RsgwmError: the second moments are zero or not finite.
    """
    settled = {key: parameters.get(key, parameter.default) for key, parameter in PARAMETERS.items()}
    moments = tuple(gram.times(update.a) for gram, update in zip(grams, factors, strict=True))
    outputs = tuple(inner(update, moment, update) for update, moment in zip(factors, moments, strict=True))
    balanced = _balanced(weights, outputs) if settled["balance"] == "relative" else tuple(weights)
    ridge = settled["ridge"]
    for _ in range(RAISES):
        columns: list[np.ndarray] = []
        parts = _regularised(grams, factors, balanced, moments, settled["off_diagonal"], ridge, columns)
        if (metric := factorised(total(parts))) is not None:
            return PoolMetric(metric, np.concatenate(columns, axis=1), moments, outputs, balanced, ridge)
        ridge = max(10 * ridge, 1e-7)
    raise RsgwmError(
        f"{name}: the second moments of its inputs are singular or not finite; collect them on more rows "
        "(rsgwm directions collect ADAPTER --corpus ROWS --replace), or set off_diagonal below 1"
    )


def output_errors(grams: Sequence[Gram], factors: Sequence[Factors], merged: Factors, metric: PoolMetric) -> mx.array:
    """‖X_t (ΔW − ΔW_t)‖² / ‖X_t ΔW_t‖² of the T adapters, (T,) float32; 0 where an adapter has no output here."""
    errors = []
    a = float64(merged.a)
    outputs = float64(merged.b) @ float64(merged.b).T
    for gram, update, moment, output in zip(grams, factors, metric.moments, metric.outputs, strict=True):
        error = float(np.sum(gram.between(a, a) * outputs)) - 2 * inner(merged, moment, update) + output
        errors.append(max(error, 0.0) / output if output > 0 else 0.0)
    return mx.array(errors)


def _balanced(weights: Sequence[float], outputs: Sequence[float]) -> tuple[float, ...]:
    """The weights over the outputs' squared norms, the largest of which is 1. Without output nothing is relative to it:
    such an adapter counts like the one with the largest, no more than any other.
    """
    largest = max(outputs)
    if not 0 < largest < float("inf"):
        return tuple(weights)
    sizes = [max(output / largest, 1 / LARGEST_RATIO) if output > 0 else 1.0 for output in outputs]
    return tuple(weight / size for weight, size in zip(weights, sizes, strict=True))


def _regularised(
    grams: Sequence[Gram],
    factors: Sequence[Factors],
    weights: Sequence[float],
    moments: Sequence[np.ndarray],
    off_diagonal: float,
    ridge: float,
    columns: list[np.ndarray],
) -> Iterator[Gram]:
    """The w_t Ḡ_t in turn; w_t Ḡ_t a_t is put into ``columns``."""
    for gram, update, weight, moment in zip(grams, factors, weights, moments, strict=True):
        diagonal = added(gram, off_diagonal, ridge)
        columns.append(weight * (off_diagonal * moment + diagonal[:, None] * float64(update.a)))
        yield gram.regularised(weight, off_diagonal, ridge)
