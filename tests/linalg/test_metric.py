"""Solving and truncating in the metric of second moments, against dense float64 NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.linalg.gram import Gram, SketchedGram, WholeGram, no_gram, total
from mlx_rsgwm.linalg.lowrank import EXACT_SIDE, Factors, truncate
from mlx_rsgwm.linalg.metric import factorised, inner, solve_cholesky, truncate_dense_in, truncate_in


def sketch(rng: np.random.Generator, width: int, rank: int, ridge: float = 1e-3) -> SketchedGram:
    """A sketch with a feature thousands of times the others, and directions of little more than ``ridge``."""
    factor = rng.standard_normal((width, rank)) * 0.5 ** np.arange(rank)
    factor[3] *= 1000
    return SketchedGram((factor), (ridge + rng.uniform(0, 1, width) ** 8), 0.1)


def whole(gram: Gram) -> np.ndarray:
    return np.array(gram.dense())


def update(rng: np.random.Generator, rank: int, width: int = 40, outputs: int = 23) -> Factors:
    a, b = rng.standard_normal((width, rank)), rng.standard_normal((rank, outputs))
    return Factors(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)))


def product(factors: Factors) -> np.ndarray:
    return np.array(factors.a).astype(np.float64) @ np.array(factors.b).astype(np.float64)


def cost(metric: np.ndarray, difference: np.ndarray) -> float:
    return float(np.trace(difference.T @ metric @ difference))


@pytest.mark.parametrize("kind", ["sketched", "whole"])
def test_solving(kind: str) -> None:
    rng = np.random.default_rng(0)
    gram: Gram = sketch(rng, 40, 12)
    dense = whole(gram)
    if kind == "whole":
        gram = WholeGram(dense)
    right = rng.standard_normal((40, 5))
    metric = factorised(gram)
    assert metric is not None
    solved = np.array(metric.solve(right))
    np.testing.assert_allclose(solved, np.linalg.solve(dense, right), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spoil", ["zero", "nan", "huge"])
def test_what_cannot_be_solved_with(spoil: str) -> None:
    gram = sketch(np.random.default_rng(1), 16, 4)
    rest = np.array(gram.rest)
    rest[5] = {"zero": 0.0, "nan": np.nan, "huge": 1.0}[spoil]
    sketched = SketchedGram(gram.factor, (rest), 0.0)
    assert (factorised(sketched) is None) == (spoil != "huge")
    singular = np.outer(np.arange(16.0), np.arange(16.0)) + np.diag(np.full(16, rest[5]))
    assert (factorised(WholeGram(singular)) is None) == (spoil != "huge")


def test_sums_stay_sketches_until_whole_is_smaller() -> None:
    rng = np.random.default_rng(2)
    grams: list[Gram] = [sketch(rng, 20, 8) for _ in range(4)]
    for count in (1, 2, 3, 4):
        summed = total(grams[:count])
        assert isinstance(summed, SketchedGram if count < 3 else WholeGram)
        np.testing.assert_allclose(whole(summed), sum(whole(gram) for gram in grams[:count]), rtol=1e-12)
    matrix = WholeGram(whole(grams[0]))
    for order in ([matrix, *grams[1:3]], [grams[1], matrix, grams[2]], [*grams[1:3], matrix], [matrix, no_gram(20)]):
        expected = sum(whole(gram) for gram in order)
        np.testing.assert_allclose(whole(total(order)), expected, rtol=1e-12)
        np.testing.assert_allclose(matrix.matrix, whole(grams[0]))


@pytest.mark.parametrize("off_diagonal", [1.0, 0.4, 0.0])
def test_regularised_as_written(off_diagonal: float) -> None:
    gram = sketch(np.random.default_rng(3), 20, 6)
    dense = whole(gram)
    mask = np.where(np.eye(20) > 0, 1.0, off_diagonal)
    expected = 0.3 * (dense * mask + 0.01 * np.trace(dense) / 20 * np.eye(20))
    for each in (gram, WholeGram(dense)):
        np.testing.assert_allclose(whole(each.regularised(0.3, off_diagonal, 0.01)), expected, rtol=1e-9)


def test_inner_products_are_those_of_the_outputs() -> None:
    rng = np.random.default_rng(4)
    gram, change, other = sketch(rng, 40, 6), update(rng, 3), update(rng, 5)
    expected = np.trace(product(other).T @ whole(gram) @ product(change))
    assert inner(other, gram.times(change.a), change) == pytest.approx(expected, rel=1e-9)
    assert inner(change, gram.times(change.a), change) == pytest.approx(cost(whole(gram), product(change)), rel=1e-9)


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
    cut = truncate_in(gram, change, rank)
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
    cut = truncate_dense_in(gram, mx.array(matrix.astype(np.float32)), 4, mx.random.key(1))
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
    cut = truncate_in(gram, change, 4).factors
    least = cost(dense, matrix - product(cut))
    assert least < 0.9 * cost(dense, matrix - product(truncate(change, 4).factors))
    a, b = (np.array(each).astype(np.float64) for each in (cut.a, cut.b))
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(10):
            near = (a + size * rng.standard_normal(a.shape)) @ (b + size * rng.standard_normal(b.shape))
            assert cost(dense, matrix - near) >= least * (1 - 1e-5)


def test_in_the_identity_it_is_the_plain_truncation() -> None:
    change = update(np.random.default_rng(7), 10)
    cut, plain = truncate_in(WholeGram(np.eye(40)), change, 4), truncate(change, 4)
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
    cut = truncate_in(gram, doubled, 4)
    np.testing.assert_allclose(product(cut.factors), product(change), atol=2e-4)
    assert cut.lost is not None
    assert cut.lost.item() < 1e-10


def test_values_that_are_not_finite_show() -> None:
    rng = np.random.default_rng(9)
    change = update(rng, 5)
    broken = Factors(mx.where(mx.arange(5) == 2, mx.nan, change.a), change.b)
    cut = truncate_in(sketch(rng, 40, 8), broken, 2)
    assert np.isnan(product(cut.factors)).any()


@pytest.mark.parametrize("size", [1, 255, 256, 700])
def test_solving_in_blocks(size: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((2 * size + 3, size))
    matrix, right = x.T @ x, rng.standard_normal((size, 3))
    solved = solve_cholesky(np.linalg.cholesky(matrix), right)
    expected = np.linalg.solve(matrix, right)
    assert np.linalg.norm(solved - expected) <= 1e-8 * np.linalg.norm(expected)
