"""LoRA-LEGO (Zhao et al., 2025, arXiv 2409.16167): rank-one units of all adapters, clustered; a cluster is a new unit.

A unit is a column of A with its row of B. The product does not change when one is multiplied and the other divided by
the same number, so units are compared after both have been given the same length, and by default up to sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.layer import Layer

TINY = 1e-30


def lego(layer: Layer) -> Factors:
    """k rank-one units, each the centroid of a cluster of the pool's, as long as its members are on average.

    The paper's "dual reweighting" is not in print where we could read it; these are ours: a centroid is brought to
    the mean norm of its members, and the whole product is multiplied by √(R / k), k the number of clusters.

    Parameters: ``clusters`` (0: the largest rank in the pool); ``output``, what R is: sum (Σ r_t, so that unrelated
    adapters give the norm of their sum; all units in their own clusters give that sum), mean (the mean r_t: the norm of
    one adapter; equal adapters give themselves) or none (no factor); ``signs`` aligned | kept: whether a unit may
    be turned round, (a, b) to (−a, −b), when it is compared; ``restarts`` of k-means++ (8), the one with the least
    inertia wins; ``iterations`` of Lloyd's algorithm (30). ``weights`` multiply the updates. Ranks may differ.
    """
    parameters = layer.parameters
    units = balanced_units(layer.factors, layer.weights)
    squares = mx.square(units).sum(axis=1)
    ranks = mx.stack([(part > 0).sum() for part in _split(squares, layer.factors)]).astype(mx.float32)
    size = min(parameters["clusters"] or max(update.rank for update in layer.factors), len(squares))
    aligned = parameters["signs"] == "aligned"
    gram = units @ units.T
    members = cluster(gram, size, layer.key, parameters["restarts"], parameters["iterations"], aligned)
    counts = mx.abs(members).sum(axis=0)
    centroids = (members.T @ units) / mx.maximum(counts, 1)[:, None]
    lengths = mx.sqrt(mx.square(centroids).sum(axis=1))
    wanted = (mx.abs(members).T @ mx.sqrt(squares)) / mx.maximum(counts, 1)
    # Members that cancel leave a direction of rounding errors: such a unit is dropped.
    ratio = mx.where(lengths > 1e-5 * wanted, wanted / mx.maximum(lengths, TINY), 0.0)
    reference = ranks.sum()
    if parameters["output"] == "mean":
        reference = reference / mx.maximum((ranks > 0).sum(), 1)
    used = mx.maximum((counts > 0).sum(), 1)
    factor = mx.array(1.0) if parameters["output"] == "none" else mx.sqrt(reference / used)
    layer.notes["clusters"] = used
    inputs = layer.factors[0].a.shape[0]
    scaled = centroids * (ratio * mx.sqrt(factor))[:, None]
    return Factors(scaled[:, :inputs].T, scaled[:, inputs:])


def balanced_units(updates: Sequence[Factors], weights: Sequence[float]) -> mx.array:
    """(Σ r, in + out): the units [a_j; w b_j] with |a_j| = |w b_j|; a unit whose product is zero is zero."""
    rows = []
    for update, weight in zip(updates, weights, strict=True):
        a, b = update.a.T, update.b * weight
        lengths = [mx.sqrt(mx.square(part).sum(axis=1, keepdims=True)) for part in (a, b)]
        common = mx.sqrt(lengths[0]) * mx.sqrt(lengths[1])
        shares = [mx.where(common > 0, common / mx.maximum(length, TINY), 0.0) for length in lengths]
        rows.append(mx.concatenate([a * shares[0], b * shares[1]], axis=1))
    return mx.concatenate(rows, axis=0)


def cluster(gram: mx.array, size: int, key: mx.array, restarts: int, iterations: int, aligned: bool) -> mx.array:
    """k-means of n points given by their inner products (n, n): the members (n, size), entries 1, −1 (turned) or 0.

    k-means++ seeding (Arthur and Vassilvitskii, 2007), Lloyd's iterations, ``restarts`` of them side by side; points at
    the origin belong to no cluster. With ``aligned`` the distance to a centre c is the lesser of |u − c| and |u + c|.
    A cluster that runs empty stays empty.
    """
    squares = mx.diag(gram)
    alive = squares > 0
    centres = _seeds(gram, squares, alive, size, key, restarts, aligned)
    dots, lengths = gram[:, centres], squares[centres][None]  # (n, restarts, size)
    members = inertia = mx.array(0.0)
    for step in range(iterations + 1):
        distances = lengths - 2 * (mx.abs(dots) if aligned else dots)
        nearest = mx.argmin(distances, axis=2, keepdims=True)
        sign = mx.where(dots < 0, -1.0, 1.0) if aligned else mx.ones(dots.shape)
        members = mx.where(mx.arange(size) == nearest, sign, 0.0) * alive[:, None, None]
        inertia = (mx.min(distances, axis=2) * alive[:, None]).sum(axis=0)  # the points' own lengths are left out
        if step == iterations:
            break
        counts = mx.abs(members).sum(axis=0)
        sums = (gram @ members.reshape(len(squares), -1)).reshape(members.shape)
        dots = sums / mx.maximum(counts, 1)
        lengths = mx.where(counts > 0, (members * dots).sum(axis=0) / mx.maximum(counts, 1), mx.inf)[None]
    return members[:, mx.argmin(inertia)]


def _seeds(
    gram: mx.array, squares: mx.array, alive: mx.array, size: int, key: mx.array, restarts: int, aligned: bool
) -> mx.array:
    """Indices (restarts, size) of points, each drawn in proportion to its squared distance from those before it."""
    chance = mx.broadcast_to(alive.astype(mx.float32), (restarts, len(squares)))
    distances = mx.full(chance.shape, mx.inf)
    chosen = []
    for part in mx.random.split(key, size):
        drawn = mx.random.categorical(mx.log(chance), key=part)
        chosen.append(drawn)
        dots = gram[drawn]
        apart = squares[None] + squares[drawn][:, None] - 2 * (mx.abs(dots) if aligned else dots)
        distances = mx.minimum(distances, mx.maximum(apart, 0.0))
        chance = distances * alive
    return mx.stack(chosen, axis=1)


def _split(values: mx.array, updates: Sequence[Factors]) -> list[mx.array]:
    ends, total = [], 0
    for update in updates[:-1]:
        total += update.rank
        ends.append(total)
    parts: Any = mx.split(values, ends)
    return list(parts)
