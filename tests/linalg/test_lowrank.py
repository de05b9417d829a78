"""Low-rank algebra against NumPy float64 on the dense products."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.linalg.lowrank import Factors, cross, inner_products, stack, truncate, truncate_dense
from mlx_rsgwm.merging.layer import DenseUpdates


def make(seed, rows=40, columns=28, rank=4):
    generator = np.random.default_rng(seed)
    return Factors(
        *(mx.array(generator.standard_normal(s).astype(np.float32)) for s in ((rows, rank), (rank, columns)))
    )


def dense(update):
    return np.array(update.a).astype(np.float64) @ np.array(update.b).astype(np.float64)


def best(matrix, rank):
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank], (sigma[rank:] ** 2).sum()


def test_inner_products():
    updates = [make(0), make(1, rank=2), make(2, rank=7)]
    expected = [[(dense(x) * dense(y)).sum() for y in updates] for x in updates]
    np.testing.assert_allclose(np.array(inner_products(updates)), expected, rtol=1e-4, atol=1e-2)
    assert cross(updates[0], updates[2]).item() == pytest.approx(expected[0][2], rel=1e-3)


def test_a_stack_is_the_sum():
    updates = [make(0), make(1, rank=2)]
    found = stack(updates, [0.3, -2.0])
    assert found.rank == 6
    np.testing.assert_allclose(dense(found), 0.3 * dense(updates[0]) - 2 * dense(updates[1]), atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 28), (28, 40), (9, 30)])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_truncation_is_the_best_there_is(shape, rank):
    update = stack([make(seed, *shape) for seed in range(3)])
    found = truncate(update, rank)
    expected, lost = best(dense(update), rank)
    np.testing.assert_allclose(dense(found.factors), expected, atol=1e-3)
    assert found.factors.rank <= rank
    left = (dense(found.factors) ** 2).sum()
    assert left + found.discarded.item() == pytest.approx((dense(update) ** 2).sum(), rel=1e-4)
    assert found.discarded.item() == pytest.approx(lost, rel=1e-3, abs=1e-2)


def test_more_stacked_ranks_than_dimensions():
    update = stack([make(seed, 12, 10, 8) for seed in range(4)])
    found = truncate(update, 3)
    np.testing.assert_allclose(dense(found.factors), best(dense(update), 3)[0], atol=2e-3)


def test_an_update_of_low_rank_is_left_alone():
    update = make(0)
    assert truncate(update, 4).factors is update
    assert truncate(update, 9).discarded.item() == 0


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_dense_truncation_is_exact_when_small(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = truncate_dense(mx.array(matrix), 6, mx.random.key(0))
    expected, lost = best(matrix.astype(np.float64), 6)
    assert found.exact
    np.testing.assert_allclose(dense(found.factors), expected, atol=1e-3)
    assert found.discarded.item() == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_a_sketch_loses_hardly_more_than_the_best_and_says_how_much(decay):
    generator = np.random.default_rng(1)
    u, v = (np.linalg.qr(generator.standard_normal((size, 300)))[0] for size in (400, 320))
    matrix = (u * np.arange(1, 301) ** -decay) @ v.T
    found = truncate_dense(mx.array(matrix.astype(np.float32)), 16, mx.random.key(2), exact=False)
    _, lost = best(matrix, 16)
    really = ((dense(found.factors) - matrix) ** 2).sum()
    assert not found.exact
    assert found.discarded.item() == pytest.approx(really, rel=1e-3)
    assert lost * 0.999 < really < lost * 1.02


def test_dense_updates_are_formed_anew():
    factors = [make(0), make(1)]
    updates = DenseUpdates(factors)
    assert len(updates) == 2
    assert updates[0] is not updates[0]
    assert mx.array_equal(updates[1:][0], factors[1].dense()).item()
    assert len(list(updates)) == 2
