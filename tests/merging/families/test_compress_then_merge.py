"""Compress-then-Merge against the dense alternation in float64 NumPy, and by what its bases maximise."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.compress_then_merge import compress_then_merge, core_space, shared_bases
from tests.merging.random_layers import layers_with, random_updates

PARAMETERS = {"components": 0, "beta": 0.25, "merge": "linear", "density": 1.0, "lambda": 1.0}


def updates(seed, inputs=24, outputs=19, ranks=(4, 3, 4), sizes=(1.0, 5.0, 0.2)):
    return random_updates(seed, inputs, outputs, ranks, sizes)


module_of = layers_with(PARAMETERS)


def dense(factors):
    return np.array(factors.a).astype(np.float64) @ np.array(factors.b).astype(np.float64)


def evened(products, beta):
    norms = [np.linalg.norm(product) for product in products]
    return [
        product / norm * (norm * beta + np.mean(norms) * (1 - beta))
        for product, norm in zip(products, norms, strict=True)
    ]


def alternation(products, rank, rounds=3000):
    """Tucker's two bases of the dense tensor (T, in, out), to the end."""
    tensor = np.stack(products)
    v = np.linalg.svd(np.concatenate(products, axis=0), full_matrices=False)[2][:rank].T
    for _ in range(rounds):
        u = np.linalg.svd(np.concatenate(list(tensor @ v), axis=1), full_matrices=False)[0][:, :rank]
        v = np.linalg.svd(np.concatenate([p.T @ u for p in products], axis=1), full_matrices=False)[0][:, :rank]
    return u, v


def energy(products, u, v):
    return sum(np.sum((u.T @ product @ v) ** 2) for product in products)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_bases_and_merge_are_the_dense_ones(beta):
    factors = updates(1)
    products = [dense(each) for each in factors]
    scaled = evened(products, beta)
    u, v = alternation(scaled, 4)
    merged = compress_then_merge(module_of(factors, beta=beta))
    assert merged.rank == 4
    own = np.array(merged.a).astype(np.float64)
    np.testing.assert_allclose(own.T @ own, np.eye(4), atol=1e-5)
    expected = u @ np.mean([u.T @ product @ v for product in products], axis=0) @ v.T
    assert np.linalg.norm(dense(merged) - expected) <= 0.02 * np.linalg.norm(expected)
    right = np.linalg.qr(np.array(merged.b).astype(np.float64).T)[0]
    assert energy(scaled, own, right) >= energy(scaled, u, v) * (1 - 1e-4)


def test_cores_lose_nothing():
    factors = updates(2, inputs=9, ranks=(4, 5, 4))  # more columns than inputs
    left, right, cores = core_space(factors)
    for each, core in zip(factors, cores, strict=True):
        whole = np.array(left) @ np.array(core) @ np.array(right).T
        np.testing.assert_allclose(whole, dense(each), atol=1e-5)


def test_no_bases_nearby_hold_more():
    rng = np.random.default_rng(3)
    _, _, cores = core_space(updates(3, sizes=(1.0, 1.0, 1.0)))
    products = [np.array(core) for core in cores]
    u, v = (np.array(each) for each in shared_bases(cores, 4))
    best = energy(products, u, v)
    for size in (1e-2, 1e-1, 1.0):
        for _ in range(20):
            near = [np.linalg.qr(each + size * rng.standard_normal(each.shape))[0] for each in (u, v)]
            assert energy(products, *near) <= best * (1 + 1e-4)


def test_adapters_of_one_space_keep_their_weighted_mean():
    """Where one pair of bases holds every adapter whole, nothing is lost by them."""
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((24, 4)), rng.standard_normal((4, 19))
    factors = [
        Factors(mx.array((a @ rng.standard_normal((4, 4))).astype(np.float32)), mx.array(b.astype(np.float32)))
        for _ in range(3)
    ]
    module = module_of(factors, (1.0, 2.0, 0.5))
    expected = np.average([dense(each) for each in factors], axis=0, weights=(1.0, 2.0, 0.5))
    np.testing.assert_allclose(dense(compress_then_merge(module)), expected, atol=1e-4)
    assert module.notes["coordinates_share"].item() == pytest.approx(1, abs=1e-5)


def test_signs_are_elected_among_coordinates():
    factors = updates(5)
    left, right, cores = core_space(factors)
    u, v = shared_bases([mx.array(each) for each in evened([np.array(core) for core in cores], 0.25)], 4)
    ends = np.array(left) @ np.array(u), np.array(right) @ np.array(v)
    coordinates = np.stack([ends[0].T @ dense(each) @ ends[1] for each in factors])
    agree = np.sign(coordinates) == np.sign(coordinates.sum(axis=0))
    elected = (coordinates * agree).sum(axis=0) / agree.sum(axis=0)
    merged = compress_then_merge(module_of(factors, merge="ties", **{"lambda": 0.5}))
    np.testing.assert_allclose(dense(merged), 0.5 * ends[0] @ elected @ ends[1].T, atol=1e-4)


def test_nothing_stays_nothing():
    nothing = [Factors(mx.ones((6, 2)), mx.zeros((2, 5)))] * 2
    assert not dense(compress_then_merge(module_of(nothing))).any()
