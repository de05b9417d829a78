"""Spectra from factors against NumPy's SVD of the dense update, float64; ranks against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_rsgwm.linalg.spectrum import (
    Decompositions,
    effective_rank,
    energy_rank,
    gram_matrix,
    principal_cosines,
    random_overlap,
    stable_rank,
)


def factors(rows, rank, columns, seed=0, spread=1.0):
    """Random factors whose columns' sizes fall to ``spread`` of the first's."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(1.0, spread, rank)
    return rng.standard_normal((rows, rank)) * sizes, rng.standard_normal((rank, columns))


@pytest.mark.parametrize(
    ("rows", "rank", "columns", "spread"),
    [
        (40, 4, 30, 1.0),
        (900, 16, 600, 1e-2),
        (300, 16, 200, 1e-4),
        (300, 16, 200, 1e-9),
        (20, 16, 300, 1.0),
        (6, 10, 40, 1.0),
        (9, 12, 5, 1.0),
    ],
)
def test_the_decomposition_is_the_dense_svd(rows, rank, columns, spread):
    pairs = [factors(rows, rank, columns, 0, spread), factors(rows, 3, columns, 1)]
    together = Decompositions(pairs)
    dense = [np.linalg.svd(a @ b, full_matrices=False) for a, b in pairs]
    for update, (_, expected, _), (a, b) in zip(together.updates, dense, pairs, strict=True):
        assert np.allclose(update.sigma, expected[: len(update.sigma)], rtol=1e-9, atol=1e-13 * expected[0])
        assert update.shape == (*a.shape, b.shape[1])
        assert update.norm == pytest.approx(np.linalg.norm(a @ b))
    for side in together.products(0, 0):
        assert np.allclose(side, np.eye(len(side)), atol=1e-9)
    (left, _, right), (other_left, _, other_right) = dense
    sizes = [len(update.sigma) for update in together.updates]
    inputs, outputs = together.products(0, 1)
    # Signs of singular vectors are free, but for a pair of them together.
    assert np.allclose(abs(inputs), abs(left.T @ other_left)[: sizes[0], : sizes[1]], atol=1e-9)
    assert np.allclose(
        inputs * outputs, ((left.T @ other_left) * (right @ other_right.T))[: sizes[0], : sizes[1]], atol=1e-9
    )


@pytest.mark.parametrize("columns", [np.ones((50, 3)), np.zeros((50, 3)), np.eye(50)[:, [0, 1, 1]]])
def test_dependent_columns_are_decomposed_all_the_same(columns):
    rows = np.random.default_rng(0).standard_normal((3, 40))
    together = Decompositions([(columns, rows), (columns[:, ::-1], rows[::-1])])
    expected = np.linalg.svd(columns @ rows, compute_uv=False)[:3]
    for update in together.updates:
        assert np.allclose(update.sigma, expected, atol=1e-12 * max(expected[0], 1))
    kept = int((expected > 1e-9).sum())
    assert np.allclose(principal_cosines(together.products(0, 1)[1][:kept, :kept]), 1.0)


def test_products_are_those_of_all_columns_whatever_the_number_of_rows():
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((2500, rank)).astype(np.float32) for rank in (3, 16, 1)]
    stacked = np.concatenate(blocks, axis=1).astype(np.float64)
    assert np.allclose(gram_matrix(blocks), stacked.T @ stacked, rtol=1e-12)
    blocks[1][1700, 2] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        gram_matrix(blocks)


def test_ranks_of_known_spectra():
    flat, one, halved = np.ones(8), np.array([2.0, 0.0, 0.0]), np.array([4.0, 2.0, 1.0])
    assert (stable_rank(flat), effective_rank(flat), energy_rank(flat, 0.9)) == (8.0, pytest.approx(8.0), 8)
    assert (stable_rank(one), effective_rank(one), energy_rank(one, 0.99)) == (1.0, pytest.approx(1.0), 1)
    assert stable_rank(halved) == 21 / 16
    shares = halved / 7
    assert effective_rank(halved) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert [energy_rank(halved, share) for share in (0.5, 16 / 21, 0.9, 0.96, 1.0)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("nothing", [np.zeros(4), np.zeros(0)])
def test_an_update_that_is_zero_has_rank_nought(nothing):
    assert (stable_rank(nothing), effective_rank(nothing), energy_rank(nothing, 0.9)) == (0.0, 0.0, 0)


def test_no_size_of_float32_is_too_small_or_large_for_a_rank():
    for size in (1e-30, 1e30):
        sigma = size * np.array([4.0, 2.0, 1.0])
        assert stable_rank(sigma) == pytest.approx(21 / 16)
        assert energy_rank(sigma, 0.9) == 2


def test_principal_cosines_of_planes_at_a_known_angle():
    angle = 0.3
    first = np.eye(5)[:, :2]
    second = np.column_stack([np.eye(5)[:, 0], np.cos(angle) * np.eye(5)[:, 1] + np.sin(angle) * np.eye(5)[:, 2]])
    assert np.allclose(principal_cosines(first.T @ second), [1.0, np.cos(angle)])


def test_random_subspaces_overlap_by_chance_as_said():
    rng = np.random.default_rng(0)
    squares = [
        np.square(
            principal_cosines(
                np.linalg.qr(rng.standard_normal((60, 4)))[0].T @ np.linalg.qr(rng.standard_normal((60, 9)))[0]
            )
        ).mean()
        for _ in range(300)
    ]
    assert np.sqrt(np.mean(squares)) == pytest.approx(random_overlap(4, 9, 60), rel=0.02)
    assert random_overlap(4, 9, 6) == 1.0
