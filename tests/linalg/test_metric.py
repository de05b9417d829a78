"""Solving and truncating in the metric of second moments, against dense float64 NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.linalg.gram import SketchedGram
from mlx_rsgwm.linalg.lowrank import EXACT_SIDE, Factors, truncate
from mlx_rsgwm.linalg.metric import (
    SketchedMetric,
    inner,
    sketched_metric,
    solve_cholesky,
    truncate_dense_in,
    truncate_in,
    whole_metric,
)


def sketch(rng: np.random.Generator, width: int, rank: int, ridge: float = 1e-3) -> SketchedGram:
    """A sketch with a feature thousands of times the others, and directions of little more than ``ridge``."""
    factor = rng.standard_normal((width, rank)) * 0.5 ** np.arange(rank)
    factor[3] *= 1000
    return SketchedGram((factor), (ridge + rng.uniform(0, 1, width) ** 8), 0.1)


def whole(gram: SketchedGram) -> np.ndarray:
    return gram.dense()


def metric_of(gram: SketchedGram) -> SketchedMetric:
    metric = sketched_metric([gram.factor], [1.0], gram.rest)
    assert metric is not None
    return metric


def update(rng: np.random.Generator, rank: int, width: int = 40, outputs: int = 23) -> Factors:
    a, b = rng.standard_normal((width, rank)), rng.standard_normal((rank, outputs))
    return Factors(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)))


def product(factors: Factors) -> np.ndarray:
    return np.array(factors.a).astype(np.float64) @ np.array(factors.b).astype(np.float64)


def cost(metric: np.ndarray, difference: np.ndarray) -> float:
    return float(np.trace(difference.T @ metric @ difference))


def test_solving() -> None:
    """Of sketches the right-hand side is S⁻¹ (E P + H); both give the products aᵀMa, too."""
    rng = np.random.default_rng(0)
    grams = [sketch(rng, 40, 12), sketch(rng, 40, 5)]
    dense = 0.3 * whole(grams[0]) + 2.0 * whole(grams[1])
    diagonal = 0.3 * grams[0].rest + 2.0 * grams[1].rest
    metric = sketched_metric([gram.factor for gram in grams], [0.3, 2.0], diagonal)
    assert metric is not None
    parts = rng.standard_normal((17, 4)), rng.standard_normal((40, 4))
    right = np.concatenate([0.3**0.5 * grams[0].factor, 2.0**0.5 * grams[1].factor], axis=1) @ parts[0]
    right += np.sqrt(diagonal)[:, None] * parts[1]
    np.testing.assert_allclose(metric.right(*parts), right, rtol=1e-9, atol=1e-9)
    expected = np.linalg.solve(dense, right)
    same = whole_metric(dense)
    assert same is not None
    for solved, products in (metric.solve(*parts), same.solve(right)):
        np.testing.assert_allclose(solved, expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(products, expected.T @ right, rtol=1e-6)
    columns = rng.standard_normal((40, 3))
    for each in (metric, same):
        np.testing.assert_allclose(each.times(columns), dense @ columns, rtol=1e-9)
        np.testing.assert_allclose(each.square(columns), columns.T @ dense @ columns, rtol=1e-9)


@pytest.mark.parametrize("spoil", ["zero", "nan", "huge"])
def test_what_cannot_be_solved_with(spoil: str) -> None:
    gram = sketch(np.random.default_rng(1), 16, 4)
    rest = np.array(gram.rest)
    rest[5] = {"zero": 0.0, "nan": np.nan, "huge": 1.0}[spoil]
    assert (sketched_metric([gram.factor], [1.0], rest) is None) == (spoil != "huge")
    singular = np.outer(np.arange(16.0), np.arange(16.0)) + np.diag(np.full(16, rest[5]))
    assert (whole_metric(singular) is None) == (spoil != "huge")


def test_inner_products_are_those_of_the_outputs() -> None:
    rng = np.random.default_rng(4)
    gram, change, other = sketch(rng, 40, 6), update(rng, 3), update(rng, 5)
    expected = np.trace(product(other).T @ whole(gram) @ product(change))
    moments = {id(each): gram.moment(each.a) for each in (change, other)}

    def product_of(first: Factors, second: Factors) -> float:
        return inner(gram.between(moments[id(first)], moments[id(second)]), first, second)

    assert product_of(other, change) == pytest.approx(expected, rel=1e-9)
    assert product_of(change, change) == pytest.approx(cost(whole(gram), product(change)), rel=1e-9)


def best(metric: np.ndarray, matrix: np.ndarray, rank: int) -> np.ndarray:
    """L⁻ᵀ times the truncated SVD of Lᵀ ``matrix``."""
    lower = np.linalg.cholesky(metric)
    u, sigma, vt = np.linalg.svd(lower.T @ matrix)
    return np.linalg.solve(lower.T, (u[:, :rank] * sigma[:rank]) @ vt[:rank])


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_truncation_is_the_svd_in_the_metric(rank: int) -> None:
    rng = np.random.default_rng(5)
    gram, change = sketch(rng, 40, 8), update(rng, 10)
    dense, matrix = whole(gram), product(change)
    cut = truncate_in(metric_of(gram), change, rank)
    assert cut.factors.rank == rank
    expected = best(dense, matrix, rank)
    np.testing.assert_allclose(product(cut.factors), expected, atol=1e-4 * np.abs(expected).max())
    assert cut.lost is not None
    lost = cost(dense, matrix - expected)
    assert cut.lost.item() == pytest.approx(lost / cost(dense, matrix), rel=1e-4, abs=1e-7)
    assert cut.discarded.item() == pytest.approx(np.sum((matrix - expected) ** 2), rel=1e-4)


@pytest.mark.parametrize("outputs", [23, EXACT_SIDE + 4])
def test_dense_updates_are_truncated_alike(outputs: int) -> None:
    rng = np.random.default_rng(10)
    gram = sketch(rng, 40, 8)
    matrix = rng.standard_normal((40, outputs)) * 0.7 ** np.arange(outputs)
    cut = truncate_dense_in(metric_of(gram), mx.array(matrix.astype(np.float32)), 4, mx.random.key(1))
    expected = best(whole(gram), matrix, 4)
    np.testing.assert_allclose(product(cut.factors), expected, atol=1e-3 * np.abs(expected).max())
    assert cut.lost is not None
    lost = cost(whole(gram), matrix - expected) / cost(whole(gram), matrix)
    assert cut.lost.item() == pytest.approx(lost, rel=1e-3, abs=1e-7)
    assert cut.discarded.item() == pytest.approx(np.sum((matrix - expected) ** 2), rel=1e-3)
    assert cut.exact == (outputs == 23)


def test_no_other_update_of_the_rank_has_nearer_outputs() -> None:
    rng = np.random.default_rng(6)
    gram, change = sketch(rng, 40, 8), update(rng, 10)
    dense, matrix = whole(gram), product(change)
    cut = truncate_in(metric_of(gram), change, 4).factors
    least = cost(dense, matrix - product(cut))
    assert least < 0.9 * cost(dense, matrix - product(truncate(change, 4).factors))
    a, b = (np.array(each).astype(np.float64) for each in (cut.a, cut.b))
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(10):
            near = (a + size * rng.standard_normal(a.shape)) @ (b + size * rng.standard_normal(b.shape))
            assert cost(dense, matrix - near) >= least * (1 - 1e-5)


def test_in_the_identity_it_is_the_plain_truncation() -> None:
    change = update(np.random.default_rng(7), 10)
    identity = whole_metric(np.eye(40))
    assert identity is not None
    cut, plain = truncate_in(identity, change, 4), truncate(change, 4)
    np.testing.assert_allclose(product(cut.factors), product(plain.factors), atol=1e-4)
    assert cut.discarded.item() == pytest.approx(plain.discarded.item(), rel=1e-4)


def test_dependent_and_dead_columns() -> None:
    """Columns of a that are others', or zero, or without input, change nothing."""
    rng = np.random.default_rng(8)
    gram, change = sketch(rng, 40, 8), update(rng, 4)
    doubled = Factors(
        mx.concatenate([change.a, change.a, mx.zeros((40, 2))], axis=1),
        mx.concatenate([0.25 * change.b, 0.75 * change.b, mx.ones((2, 23))], axis=0),
    )
    cut = truncate_in(metric_of(gram), doubled, 4)
    np.testing.assert_allclose(product(cut.factors), product(change), atol=2e-4)
    assert cut.lost is not None
    assert cut.lost.item() < 1e-10


def test_values_that_are_not_finite_show() -> None:
    rng = np.random.default_rng(9)
    change = update(rng, 5)
    broken = Factors(mx.where(mx.arange(5) == 2, mx.nan, change.a), change.b)
    cut = truncate_in(metric_of(sketch(rng, 40, 8)), broken, 2)
    assert np.isnan(product(cut.factors)).any()


@pytest.mark.parametrize("size", [1, 255, 256, 700])
def test_solving_in_blocks(size: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((2 * size + 3, size))
    matrix, right = x.T @ x, rng.standard_normal((size, 3))
    solved = solve_cholesky(np.linalg.cholesky(matrix), right)
    expected = np.linalg.solve(matrix, right)
    assert np.linalg.norm(solved - expected) <= 1e-8 * np.linalg.norm(expected)
