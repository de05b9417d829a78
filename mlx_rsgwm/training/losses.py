"""The loss of a batch: cross-entropy in nats at trained positions only, logits nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.data.batching import Batch, TokenRow, make_batch, plan_epoch
from mlx_rsgwm.models.linux_cpu import cross_entropy
from mlx_rsgwm.models.split import Head, Hidden, split_head


def token_nats(hidden: Hidden, head: Head, batch: Batch) -> mx.array:
    """Cross-entropies in nats, (targets,) float32, row by row; those that only round the count up come last."""
    return cross_entropy(_logits(hidden, head, batch), batch.targets)


def _logits(hidden: Hidden, head: Head, batch: Batch) -> mx.array:
    """(targets, vocabulary) float32, at the trained positions alone."""
    states = hidden(batch.inputs)
    return head(states.reshape(-1, states.shape[-1])[batch.positions]).astype(mx.float32)


def batch_nats(hidden: Hidden, head: Head, batch: Batch) -> mx.array:
    """Sum of cross-entropies in nats over the batch's trained tokens, a float32 scalar."""
    return (token_nats(hidden, head, batch) * batch.weights).sum()


def batch_loss(hidden: Hidden, head: Head, batch: Batch) -> mx.array:
    """Mean cross-entropy in nats over the batch's trained tokens, a float32 scalar."""
    return batch_nats(hidden, head, batch) / batch.trained_tokens


def row_nats(model: Any, rows: Sequence[TokenRow], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the loss in nats and count of trained tokens of every row, (rows,) float64 and int64, dropout off."""
    nats, _, counts = row_scores(model, rows, batch_size)
    return nats, counts


def row_scores(model: Any, rows: Sequence[TokenRow], batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`row_nats`, and between them how many of the trained tokens are the likeliest, (rows,) int64 each."""
    model.eval()
    hidden, head = split_head(model)
    counts = np.array([len(row.trained_positions()) for row in rows])
    nats, right = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    for indices in plan_epoch(rows, batch_size, seed=0, epoch=0):
        batch = make_batch([rows[index] for index in indices])
        logits = _logits(hidden, head, batch)
        losses, likeliest = cross_entropy(logits, batch.targets), mx.argmax(logits, axis=-1) == batch.targets
        owners = np.repeat(indices, counts[indices])
        np.add.at(nats, owners, np.array(losses)[: len(owners)])
        np.add.at(right, owners, np.array(likeliest)[: len(owners)])
    return nats, right, counts


def held_out_nats(model: Any, rows: Sequence[TokenRow], batch_size: int) -> dict[str, tuple[float, int]]:
    """Sum of the loss in nats and count of trained tokens for each role, dropout off."""
    model.eval()
    hidden, head = split_head(model)
    sums: dict[str, tuple[float, int]] = {}
    for indices in plan_epoch(rows, batch_size, seed=0, epoch=0):
        batch = make_batch([rows[index] for index in indices])
        batch_sum: Any = batch_nats(hidden, head, batch).item()
        nats, count = sums.get(batch.role, (0.0, 0))
        sums[batch.role] = (nats + batch_sum, count + batch.trained_tokens)
    return sums


def held_out_loss(model: Any, rows: Sequence[TokenRow], batch_size: int) -> dict[str, float]:
    """Mean loss in nats per trained token for each role, dropout off."""
    return {role: nats / count for role, (nats, count) in held_out_nats(model, rows, batch_size).items()}
