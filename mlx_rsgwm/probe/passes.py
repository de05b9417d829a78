"""What one adapter does on rows of data: gradients with respect to the weights it changes, and states between blocks.

A gradient G (in, out) of a weight is as large as the weight. What is kept of it is S_inᵀ G S_out, p × p, with the same
random S for all adapters: inner products of gradients, and of gradients with updates, are those of the sketches but for
a relative error that falls with p; of sides up to p they are exact. No G is formed: a zero matrix C between the
projections, y + (x S_in) C S_outᵀ, has that gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_rsgwm.data.batching import TokenRow, make_batch, plan_epoch
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.hooks import block_names, outputs_changed
from mlx_rsgwm.models.linux_cpu import lazily
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.losses import batch_nats

SKETCH = 128
SIDES = ("in", "out")
ROWS_AT_A_TIME = 8


@dataclass(frozen=True)
class Place:
    """A weight (in, out) that gradients are taken of, by its module's name; ``embedding``: of the tokens' rows."""

    name: str
    shape: tuple[int, int]
    embedding: bool = False


def adapted_places(adapters: Sequence[Adapter]) -> list[Place]:
    """The weights that any of the adapters changes."""
    shapes = {name: (a.shape[0], b.shape[1]) for adapter in adapters for name, a, b in adapter.factors()}
    return [Place(name, shape) for name, shape in shapes.items()]


def embedding_place(model: Any) -> Place:
    """The embedding of tokens, in or without a slot: the first of the model's embeddings."""
    for name, module in model.named_modules()[::-1]:
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            first = Place(name, _embedding_shape(module), True)
    return first


def _embedding_shape(module: Any) -> tuple[int, int]:
    entries, dims = module.weight.shape
    return (entries, dims) if isinstance(module, nn.Embedding) else (entries, module(mx.array([0])).shape[-1])


@lru_cache(maxsize=32)
def projection(side: str, length: int, width: int = SKETCH, seed: int = 42) -> np.ndarray:
    """S (length, min(length, width)) float32 with E[S Sᵀ] = I: the identity where it is square, else orthonormal
    columns times √(length / width)."""
    if length <= width:
        return np.eye(length, dtype=np.float32)
    rng = np.random.default_rng((seed, SIDES.index(side), length))
    columns, _ = np.linalg.qr(rng.standard_normal((length, width)))
    scaled: np.ndarray = (columns * np.sqrt(length / width)).astype(np.float32)
    return scaled


def projected_update(a: np.ndarray, b: np.ndarray, width: int = SKETCH) -> np.ndarray:
    """S_inᵀ (a b) S_out, at most (width, width) float64, of a (in, r) and b (r, out)."""
    left, right = projection("in", a.shape[0], width), projection("out", b.shape[1], width)
    update: np.ndarray = (left.T.astype(np.float64) @ a) @ (b @ right.astype(np.float64))
    return update


def gradient_sketches(
    slots: AdapterSlots, rows: Sequence[TokenRow], places: Sequence[Place], width: int = SKETCH
) -> dict[str, np.ndarray]:
    """By the places' names the sketches, float32, of the gradient of the mean loss of the rows' trained tokens, with
    the adapter in use of ``slots``."""
    model: Any = slots.model
    model.eval()
    sides = {
        place.name: tuple(mx.array(projection(side, n, width)) for side, n in zip(SIDES, place.shape, strict=True))
        for place in places
    }
    embeddings = {place.name for place in places if place.embedding}
    cores: dict[str, mx.array] = {}

    def change(name: str, x: mx.array, y: mx.array) -> mx.array:
        left, right = sides[name]
        into = left[x] if name in embeddings else x.astype(mx.float32) @ left
        return y + ((into @ cores[name]) @ right.T).astype(y.dtype)

    hidden, head = split_head(model)

    def loss_of(given: dict[str, mx.array], batch: Any) -> mx.array:
        cores.update(given)
        return batch_nats(hidden, head, batch)

    zeros = {name: mx.zeros((left.shape[1], right.shape[1])) for name, (left, right) in sides.items()}
    sums, total = zeros, 0
    with outputs_changed(model, sides, change):
        for indices in plan_epoch(rows, ROWS_AT_A_TIME, seed=0, epoch=0):
            batch = make_batch([rows[index] for index in indices])
            with lazily():
                _, gradients = mx.value_and_grad(loss_of)(zeros, batch)
            sums = {name: sums[name] + value for name, value in gradients.items()}
            total += batch.trained_tokens
            mx.eval(sums)
    return {name: np.array(value / total) for name, value in sums.items()}


def block_states(slots: AdapterSlots, rows: Sequence[TokenRow]) -> np.ndarray:
    """(blocks, rows, dims) float32: the mean over each row's tokens of the state that every block gives, with the
    adapter in use of ``slots``."""
    model: Any = slots.model
    model.eval()
    hidden, _ = split_head(model)
    names = block_names(model)
    seen: dict[str, mx.array] = {}

    def look(name: str, x: mx.array, y: Any) -> Any:
        seen[name] = y[0] if isinstance(y, tuple) else y
        return y

    states: list[np.ndarray | None] = [None] * len(rows)
    with outputs_changed(model, names, look):
        for indices in plan_epoch(rows, ROWS_AT_A_TIME, seed=0, epoch=0):
            chosen = [rows[index] for index in indices]
            inputs = make_batch(chosen).inputs
            lengths = np.array([len(row.tokens) - 1 for row in chosen])
            mask = mx.array((np.arange(inputs.shape[1]) < lengths[:, None]) / lengths[:, None])[..., None]
            mx.eval(hidden(inputs), seen)
            means = np.stack([np.array((seen[name].astype(mx.float32) * mask).sum(axis=1)) for name in names])
            for place, index in enumerate(indices):
                states[index] = means[:, place]
    return np.stack([state for state in states if state is not None], axis=1)


@dataclass(frozen=True)
class Passes:
    """What one adapter did. ``on_task``: sketches of the gradient on rows of its own task, that of the embedding under
    ``embedding``; ``shared``: on the rows that all adapters see; ``states``: (blocks, rows, dims) there; ``update``:
    the adapter itself, projected."""

    on_task: Mapping[str, np.ndarray]
    embedding: np.ndarray
    shared: Mapping[str, np.ndarray]
    states: np.ndarray
    update: Mapping[str, np.ndarray]


def passes_of(
    slots: AdapterSlots,
    slot: str,
    task_rows: Sequence[TokenRow],
    shared: Sequence[TokenRow],
    places: Sequence[Place],
    width: int = SKETCH,
) -> Passes:
    """Both gradients and the states of the adapter in a slot."""
    adapter = slots.adapter(slot)
    embedding = embedding_place(slots.model)
    with ExitStack() as stack:
        stack.enter_context(slots.using(slot))
        gradients = gradient_sketches(slots, task_rows, [*places, embedding], width)
        on_shared = gradient_sketches(slots, shared, places, width)
        states = block_states(slots, shared)
    update = {
        name: projected_update(_float64(a), _float64(b), width) * adapter.spec.scale for name, a, b in adapter.factors()
    }
    return Passes(gradients, gradients.pop(embedding.name), on_shared, states, update)


def _float64(factor: mx.array) -> np.ndarray:
    return np.array(factor.astype(mx.float32), np.float64)
