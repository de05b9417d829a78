"""KnOTS against the SVD of the dense concatenation in float64, as fusion_bench and the authors have it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.knots import knots, shared_basis
from tests.merging.random_layers import layers_with, random_updates

PARAMETERS = {"merge": "ties", "density": 1.0, "part": "v", "threshold": 1e-4, "lambda": 1.0}


def updates(seed, inputs=20, outputs=15, ranks=(3, 2, 4), size=1.0):
    return random_updates(seed, inputs, outputs, ranks, (size,) * len(ranks))


module_of = layers_with(PARAMETERS)


def dense(factors):
    """ΔW_tᵀ (out, in) in float64, torch's orientation and the peers'."""
    return [(np.array(one.a).astype(np.float64) @ np.array(one.b).astype(np.float64)).T for one in factors]


def theirs(deltas, threshold):
    """fusion_bench ``subspace_alignment``."""
    u, s, vh = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    kept = s > threshold
    return u[:, kept], s[kept], np.split(vh[kept], len(deltas), axis=1)


def ties(vectors, weights, density):
    """Trim, elect by the weighted sum, weighted mean of what agrees."""
    trimmed = []
    for vector in vectors:
        count = max(1, int(density * vector.size))
        threshold = np.sort(np.abs(vector).ravel())[vector.size - count]
        trimmed.append(np.where(np.abs(vector) >= threshold, vector, 0))
    sign = np.sign(sum(w * v for w, v in zip(weights, trimmed, strict=True)))
    agree = [(np.sign(v) == sign) & (v != 0) for v in trimmed]
    total = sum(w * v * a for w, v, a in zip(weights, trimmed, agree, strict=True))
    counted = sum(w * a for w, a in zip(weights, agree, strict=True))
    return total / np.where(counted > 0, counted, 1)


def close(found, expected, tolerance=1e-4):
    found = np.array(found).astype(np.float64)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# More than 15 columns of B in all: then the outputs bound the number of directions.
@pytest.mark.parametrize("ranks", [(3, 2, 4), (1, 1), (8, 8, 8), (5,)])
def test_basis_is_that_of_the_dense_concatenation(ranks):
    factors = updates(1, ranks=ranks)
    found = shared_basis(factors, 1e-4)
    u, s, vh = theirs(dense(factors), 1e-4)
    assert found.values.size == len(s) == min(sum(ranks), 15)
    np.testing.assert_allclose(np.array(found.values), s, rtol=1e-4)
    signs = np.sign(np.sum(np.array(found.left) * u, axis=0))
    np.testing.assert_allclose(np.array(found.left) * signs, u, atol=1e-3)
    for right, expected in zip(found.rights, vh, strict=True):
        np.testing.assert_allclose(np.array(right.dense()) * signs, expected.T, atol=1e-3)
    everything = np.concatenate([np.array(right.dense()) for right in found.rights])
    np.testing.assert_allclose(everything.T @ everything, np.eye(len(s)), atol=1e-5)


@pytest.mark.parametrize("part", ["v", "sv"])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_ties_in_the_shared_basis(part, density, weights):
    factors = updates(2)
    u, s, vh = theirs(dense(factors), 1e-4)
    if part == "v":
        expected = u @ np.diag(s) @ ties(vh, weights, density)
    else:
        expected = u @ ties([np.diag(s) @ v for v in vh], weights, density)
    found = knots(module_of(factors, weights, part=part, density=density))
    assert found.rank == 9
    close(found.dense(), expected.T)


def test_authors_code_at_full_density():
    """Their masks: sign of the sum of S V_t, mean over the entries that agree, times the scaling coefficient."""
    factors = updates(3)
    u, s, vh = theirs(dense(factors), 1e-5)
    stacked = np.stack([np.diag(s) @ v for v in vh])
    sign = np.sign(stacked.sum(axis=0))
    agree = np.where(sign > 0, stacked > 0, stacked < 0)
    merged = (0.6 * stacked * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    module = module_of(factors, part="sv", threshold=1e-5, **{"lambda": 0.6})
    close(knots(module).dense(), (u @ merged).T)
    close(knots(module_of(factors, **{"lambda": 0.6})).dense(), (u @ merged).T)  # V alone has the same signs


@pytest.mark.parametrize("part", ["v", "sv"])
def test_linear_is_the_mean_of_the_updates(part):
    factors = updates(4)
    deltas = dense(factors)
    weights = (1.0, 3.0, 2.0)
    mean = sum(w * delta for w, delta in zip(weights, deltas, strict=True)) / 6
    close(knots(module_of(factors, weights, merge="linear", part=part)).dense(), mean.T)


def test_dare_draws_by_the_key():
    factors = updates(5)
    one, again = (knots(module_of(factors, merge="dare_ties", density=0.5)).dense() for _ in range(2))
    assert mx.array_equal(one, again).item()
    other = knots(module_of(factors, key=4, merge="dare_ties", density=0.5)).dense()
    assert not mx.array_equal(one, other).item()


def test_equal_updates_stay():
    factors = updates(6, ranks=(3,)) * 3
    found = knots(module_of(factors))
    assert found.rank == 3  # the other six singular values are zero
    close(found.dense(), dense(factors)[0].T)


def test_weak_directions_are_dropped():
    factors = updates(7, ranks=(2, 2))
    factors.append(Factors(factors[0].a[:, :1], mx.random.normal((1, 15)) * 1e-7))
    assert knots(module_of(factors)).rank == 4
    assert knots(module_of(factors, threshold=1e-8)).rank == 5


def test_all_below_the_threshold():
    with pytest.raises(RsgwmError, match=r"layer: no singular value of the updates is above knots' threshold 0\.001"):
        knots(module_of(updates(8, size=1e-7), threshold=1e-3))
    absent = [Factors(mx.zeros((20, 1)), mx.zeros((1, 15)))] * 2
    assert mx.max(mx.abs(knots(module_of(absent)).dense())).item() == 0
