"""Spectra from factors against NumPy's SVD of the dense update, float64; ranks against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_rsgwm.linalg.spectrum import (
    decompose,
    effective_rank,
    energy_rank,
    orthonormal,
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
        (300, 16, 200, 1e-3),
        (300, 16, 200, 1e-9),
        (20, 16, 300, 1.0),
        (6, 10, 40, 1.0),
        (9, 12, 5, 1.0),
    ],
)
def test_the_decomposition_is_the_dense_svd(rows, rank, columns, spread):
    a, b = factors(rows, rank, columns, spread=spread)
    update, expected = decompose(a, b), np.linalg.svd(a @ b, compute_uv=False)
    assert np.allclose(update.sigma, expected[: len(update.sigma)], rtol=1e-9, atol=1e-13 * expected[0])
    assert np.allclose((update.inputs * update.sigma) @ update.outputs.T, a @ b, rtol=0, atol=1e-12 * expected[0])
    for vectors in (update.inputs, update.outputs):
        assert np.allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-9)
    assert update.rank == rank
    assert update.norm == pytest.approx(np.linalg.norm(a @ b))


@pytest.mark.parametrize("columns", [np.ones((50, 3)), np.zeros((50, 3)), np.eye(50)[:, [0, 1, 1]]])
def test_dependent_columns_are_orthonormalised_all_the_same(columns):
    basis, upper = orthonormal(columns.astype(np.float64))
    assert np.allclose(basis @ upper, columns)
    assert np.allclose(basis.T @ basis, np.eye(3))


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
