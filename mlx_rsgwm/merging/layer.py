"""What a merge method sees: one adapted module, with its update in every adapter of the pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import mlx.core as mx

from mlx_rsgwm.linalg.gram import Gram
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.pool_metric import PoolMetric, pool_metric


class DenseUpdates(Sequence[mx.array]):
    """The adapters' ΔW (in, out), each formed when asked for and not kept: a method that walks over them several times
    never holds more than it needs.
    """

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.factors = factors

    def __len__(self) -> int:
        return len(self.factors)

    @overload
    def __getitem__(self, index: int) -> mx.array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[mx.array]: ...
    def __getitem__(self, index: int | slice) -> mx.array | Sequence[mx.array]:
        if isinstance(index, slice):
            return DenseUpdates(self.factors[index])
        return self.factors[index].dense()

    def __iter__(self) -> Iterator[mx.array]:
        return (update.dense() for update in self.factors)


@dataclass(frozen=True)
class Layer:
    """One module of a pool of T adapters.

    ``factors``: T updates; ranks may differ, and an adapter without this module has a zero update of rank 1.
    ``scales``: the T scales that are multiplied into ``factors``' b. ``weights``: T coefficients as the user gave them
    (1.0 each by default). ``key``: a random key of this module's own (``mx.random.split`` it, one per adapter).
    ``importances``: T pairs (s_a, s_b) of importance arrays of ``factors``' shapes, to be walked over once and dropped
    pair by pair; or empty when the method asked for none. ``initial_a``: the shared lora_a at initialisation, or None.
    ``grams``: T second moments of the module's inputs, or empty. ``survey``: what the method's pass over the whole pool
    found, or None. ``notes``: where a method leaves what the diagnosis should say (scalars or short vectors,
    by name). ``objections``: where it leaves why it may have no answer here, and a bool scalar, true when it has none.
    ``method``: the name of the one that merges it.
    """

    name: str
    factors: tuple[Factors, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    key: mx.array
    importances: Iterable[tuple[mx.array, mx.array]] = ()
    initial_a: mx.array | None = None
    grams: Sequence[Gram] = ()
    survey: Any = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notes: dict[str, mx.array] = field(default_factory=dict)
    objections: dict[str, mx.array] = field(default_factory=dict)
    method: str = ""

    @cached_property
    def metric(self) -> PoolMetric:
        """The metric of the module's outputs. RsgwmError where ``grams`` give none."""
        return pool_metric(self.name, self.grams, self.factors, self.weights, self.parameters)

    @property
    def dense_updates(self) -> DenseUpdates:
        """The updates ΔW_t, each (in, out) float32, made when they are read."""
        return DenseUpdates(self.factors)
