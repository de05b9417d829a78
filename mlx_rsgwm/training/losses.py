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
    states = hidden(batch.inputs)
    picked = states.reshape(-1, states.shape[-1])[batch.positions]
    return cross_entropy(head(picked).astype(mx.float32), batch.targets)


def batch_nats(hidden: Hidden, head: Head, batch: Batch) -> mx.array:
    """Sum of cross-entropies in nats over the batch's trained tokens, a float32 scalar."""
    return (token_nats(hidden, head, batch) * batch.weights).sum()


def batch_loss(hidden: Hidden, head: Head, batch: Batch) -> mx.array:
    """Mean cross-entropy in nats over the batch's trained tokens, a float32 scalar."""
    return batch_nats(hidden, head, batch) / batch.trained_tokens


def row_nats(model: Any, rows: Sequence[TokenRow], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the loss in nats and count of trained tokens of every row, (rows,) float64 and int64, dropout off."""
    model.eval()
    hidden, head = split_head(model)
    nats, counts = np.zeros(len(rows)), np.array([len(row.trained_positions()) for row in rows])
    for indices in plan_epoch(rows, batch_size, seed=0, epoch=0):
        losses = token_nats(hidden, head, make_batch([rows[index] for index in indices]))
        owners = np.repeat(indices, counts[indices])
        np.add.at(nats, owners, np.array(losses)[: len(owners)])
    return nats, counts


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
