"""Random updates, and slow NumPy float64 references of the elementwise steps: one entry at a time."""

import mlx.core as mx
import numpy as np

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.layer import DenseUpdates

ROWS, COLUMNS = 11, 7
KEY = mx.random.key(5)
WEIGHTS = (0.4, 1.0, 0.7)


def random_deltas(count=3, seed=0, shape=(ROWS, COLUMNS), size=1.0):
    rng = np.random.default_rng(seed)
    return [mx.array((rng.standard_normal(shape) * size).astype(np.float32)) for _ in range(count)]


def low_rank_deltas(seed=0, ranks=(2, 5, 3), shape=(ROWS, COLUMNS)):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: mx.array(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    return DenseUpdates([Factors(draw(shape[0], rank), draw(rank, shape[1])) for rank in ranks])


def wide(array):
    return np.array(array).astype(np.float64)


def reference_magnitude(delta, density):
    count = max(1, int(density * delta.size))
    mask = np.zeros(delta.size, dtype=bool)
    mask[np.argsort(-np.abs(delta).reshape(-1))[:count]] = True
    return mask.reshape(delta.shape)


def reference_breadcrumbs(delta, density, gamma):
    count, top = max(1, int(density * delta.size)), int(gamma * delta.size)
    ascending = list(np.argsort(np.abs(delta).reshape(-1)))
    while top and len(ascending) > count:
        ascending.pop()
        top -= 1
    mask = np.zeros(delta.size, dtype=bool)
    mask[ascending[-count:]] = True
    return mask.reshape(delta.shape)


def reference_probabilities(delta, density, epsilon):
    found = np.zeros(delta.shape)
    for column in range(delta.shape[1]):
        for row in range(delta.shape[0]):
            below = sum(abs(other) < abs(delta[row, column]) for other in delta[:, column])
            found[row, column] = density - epsilon + 2 * epsilon * below / (delta.shape[0] - 1)
    return found


def reference_sparsified(delta, mask, rescale, probability):
    kept = np.where(mask, delta, 0.0)
    if rescale == "density":
        return kept / probability
    if rescale == "l1" and np.abs(kept).sum():
        return kept * np.abs(delta).sum() / np.abs(kept).sum()
    return kept


def reference_consensus(updates, weights, election, normalise):
    merged = np.zeros(updates[0].shape)
    for place in np.ndindex(*merged.shape):
        shares = [weight * update[place] for weight, update in zip(weights, updates, strict=True)]
        chosen = list(range(len(shares)))
        if election != "none":
            count, total = sum(np.sign(shares)), sum(shares)
            winner = np.sign(count if election == "count" and count else total)
            chosen = [index for index in chosen if shares[index] and np.sign(shares[index]) == winner]
        divisor = 1.0
        if normalise == "weights" and chosen:
            divisor = sum(weights[index] if election == "none" else abs(weights[index]) for index in chosen)
        merged[place] = sum(shares[index] for index in chosen) / divisor
    return merged


def reference_sce(deltas, weights, select_topk):
    stacked = np.stack(deltas)
    variance = stacked.var(axis=0)
    if select_topk < 1:
        count = max(1, int((variance > 0).sum() * select_topk))
        stacked = stacked * (variance >= np.sort(variance.reshape(-1))[-count])
    energies = [weight * np.mean(delta**2) for weight, delta in zip(weights, stacked, strict=True)]
    merged = np.zeros(variance.shape)
    for place in np.ndindex(*merged.shape):
        values = [delta[place] for delta in stacked]
        winner = np.sign(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        agreeing = [index for index, value in enumerate(values) if value and np.sign(value) == winner]
        if agreeing:
            total = sum(energies[index] for index in agreeing)
            merged[place] = sum(energies[index] * values[index] for index in agreeing) / total
    return merged
