"""Sketched second moments against float64 NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.linalg.gram import SketchedGram, WholeGram, from_sketch, test_matrix


def inputs(width: int, rows: int = 400, decay: float = 0.7, seed: int = 0) -> np.ndarray:
    """Rows whose second moment has geometrically falling eigenvalues, and a feature that outgrows the others."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((width, width)))
    x = (rng.standard_normal((rows, width)) * decay ** np.arange(width)) @ rotation.T
    x[:, 3] += 20
    return x


def sketched(x: np.ndarray, rank: int, seed: int = 1) -> tuple[np.ndarray, SketchedGram]:
    """The Gram matrix of ``x`` in float64, and its sketch from float32 sums."""
    whole = x.T @ x / len(x)
    test = test_matrix(x.shape[1], rank, seed)
    rows = mx.array(x.astype(np.float32))
    sketch = rows.T @ (rows @ test) / len(x)
    return whole, from_sketch(sketch, mx.square(rows).mean(axis=0), test)


def dense(gram: SketchedGram) -> np.ndarray:
    return gram.product(gram.moment(np.eye(gram.width)))


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_a_sketch_stays_within_the_bound_it_states(rank: int) -> None:
    whole, gram = sketched(inputs(96), rank)
    left_out = whole - np.array(gram.factor) @ np.array(gram.factor).T
    trace = np.trace(whole)
    assert np.linalg.eigvalsh(left_out).min() > -1e-6 * trace
    assert np.linalg.norm(left_out, 2) <= (gram.missed + 1e-6) * trace
    assert np.linalg.norm(left_out, "nuc") == pytest.approx(gram.missed * trace, abs=2e-5 * trace)
    assert gram.missed < 0.05


def test_more_columns_miss_less() -> None:
    missed = [sketched(inputs(96), rank)[1].missed for rank in (4, 8, 16, 32, 64)]
    assert missed == sorted(missed, reverse=True)
    assert missed[0] > 10 * missed[-1]


def test_the_diagonal_is_the_whole_matrix_s() -> None:
    whole, gram = sketched(inputs(96), 8)
    np.testing.assert_allclose(np.array(gram.diagonal), np.diag(whole), rtol=1e-5)
    np.testing.assert_allclose(np.diag(dense(gram)), np.diag(whole), rtol=1e-5)


def test_every_input_direction_of_a_low_rank_moment_is_kept_exactly() -> None:
    x = inputs(96)[:6]  # six rows: a moment of rank six, which eight columns hold
    whole, gram = sketched(x, 8)
    np.testing.assert_allclose(dense(gram), whole, atol=2e-5 * np.trace(whole))
    assert gram.missed < 1e-5


def test_products_are_those_of_the_dense_matrix() -> None:
    _, gram = sketched(inputs(64), 16)
    matrix = gram.dense()
    np.testing.assert_allclose(matrix, dense(gram), rtol=1e-9, atol=1e-12)
    left, right = (np.random.default_rng(2).standard_normal((64, count)) for count in (3, 5))
    for each in (gram, WholeGram(matrix)):
        moments = each.moment(left), each.moment(mx.array(right.astype(np.float32)))
        np.testing.assert_allclose(each.between(*moments), left.T @ matrix @ right, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(each.product(moments[0]), matrix @ left, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(each.diagonal, np.diag(matrix))


def test_sketches_of_parts_add_up_to_that_of_all_rows() -> None:
    parts = [inputs(64, seed=0), inputs(64, 200, seed=5)]
    test, rows = test_matrix(64, 16, 3), [mx.array(x.astype(np.float32)) for x in parts]
    count = sum(len(x) for x in parts)
    summed = sum(x.T @ (x @ test) for x in rows) / count, sum(mx.square(x).sum(axis=0) for x in rows) / count
    whole, gram = sketched(np.concatenate(parts), 16, seed=3)
    added = from_sketch(*summed, test)
    np.testing.assert_allclose(dense(added), dense(gram), atol=1e-5 * np.trace(whole))
    assert added.missed == pytest.approx(gram.missed, abs=1e-5)


def test_a_test_matrix_is_orthonormal_and_follows_its_seed_and_shape() -> None:
    test = np.array(test_matrix(64, 16, 3))
    np.testing.assert_allclose(test.T @ test, np.eye(16), atol=1e-6)
    assert not np.array_equal(test, np.array(test_matrix(64, 16, 4)))
    np.testing.assert_allclose(np.array(test_matrix(64, 8, 3)), test[:, :8], atol=1e-6)


def test_no_input_at_all_gives_zero() -> None:
    test = test_matrix(16, 4, 0)
    gram = from_sketch(mx.zeros((16, 4)), mx.zeros((16,)), test)
    assert not dense(gram).any()
    assert gram.missed == 0
