"""RegMean against its formula in float64, as a least-squares solution, and on second moments hard to solve with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.gram import Gram, WholeGram, float64, from_sketch, no_gram, test_matrix
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.linalg.metric import SketchedMetric, WholeMetric
from mlx_rsgwm.merging.families.regmean import regmean as solved_regmean
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.pool_metric import LARGEST_RATIO, PARAMETERS, output_errors


def regmean(module: Layer) -> Factors:
    """The update that is stored, once its products aᵀMa are seen to be those of the metric."""
    solved = solved_regmean(module)
    expected = module.metric.metric.square(solved.a)
    assert np.abs(solved.products - expected).max() <= 1e-6 * np.abs(expected).max()
    return solved.factors()


EQUAL = {"balance": "equal", "off_diagonal": 1.0, "ridge": 1e-6}


def make(rng, inputs=24, outputs=17, ranks=(3, 5, 2), tokens=200, spread=None):
    """Factors, their float64 products, and inputs (tokens, in) of each adapter."""
    factors, products, data = [], [], []
    for rank in ranks:
        a = rng.standard_normal((inputs, rank)).astype(np.float32)
        b = rng.standard_normal((rank, outputs)).astype(np.float32)
        factors.append(Factors(mx.array(a), mx.array(b)))
        products.append(a.astype(np.float64) @ b.astype(np.float64))
        x = rng.standard_normal((tokens, inputs)) @ rng.standard_normal((inputs, inputs))
        data.append(x * (np.ones(inputs) if spread is None else spread))
    return factors, products, data


def gram_of(x: np.ndarray, rank: int = 0) -> Gram:
    """The second moment of rows, whole or as a sketch of ``rank`` columns."""
    moment = mx.array((x.T @ x / len(x)).astype(np.float32))
    if not rank:
        return WholeGram(float64(moment))
    test = test_matrix(x.shape[1], rank, 0)
    return from_sketch(moment @ test, mx.diagonal(moment), test)


def layer_of(factors, grams, weights=None, **parameters):
    return Layer(
        "layer",
        tuple(factors),
        (1.0,) * len(factors),
        tuple(weights or (1.0,) * len(factors)),
        mx.random.key(0),
        grams=tuple(grams),
        parameters={**EQUAL, **parameters},
    )


def module_of(factors, data, weights=None, rank=0, **parameters):
    return layer_of(factors, [gram_of(x, rank) for x in data], weights, **parameters)


def dense(gram: Gram) -> np.ndarray:
    return np.array(gram.dense())


def reference(products, grams, weights, off_diagonal, ridge):
    """fusion_bench's ``merging_with_regmean_weights``, with a ridge on every Gram matrix."""
    numerator, denominator = 0.0, 0.0
    for product, gram, weight in zip(products, grams, weights, strict=True):
        size = len(gram)
        mask = np.full((size, size), off_diagonal) + np.diag(np.full(size, 1 - off_diagonal))
        reduced = weight * (gram * mask + ridge * np.trace(gram) / size * np.eye(size))
        numerator = numerator + reduced @ product
        denominator = denominator + reduced
    return np.linalg.inv(denominator) @ numerator


def close(found, expected, tolerance):
    found = np.array(found).astype(np.float64)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("off_diagonal", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.0)])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2])
def test_formula(rank, off_diagonal, weights, ridge):
    factors, products, data = make(np.random.default_rng(1))
    module = module_of(factors, data, weights, rank, off_diagonal=off_diagonal, ridge=ridge)
    found = regmean(module)
    assert found.rank == 10
    close(found.dense(), reference(products, [dense(g) for g in module.grams], weights, off_diagonal, ridge), 1e-5)
    assert module.notes["ridge"].item() == pytest.approx(ridge)
    assert isinstance(module.metric.metric, SketchedMetric if rank else WholeMetric)


def test_unequal_ranks_and_a_missing_module_in_sketches():
    """Ranks 4 to 32; an adapter without the module has no input there and no say."""
    factors, products, data = make(np.random.default_rng(2), inputs=96, outputs=40, ranks=(4, 8, 16, 32))
    grams = [gram_of(x, 12) for x in data]
    absent = Factors(mx.zeros((96, 1)), mx.zeros((1, 40)))
    module = layer_of([*factors, absent], [*grams, no_gram(96)], balance="relative")
    expected = reference(products, [dense(gram) for gram in grams], module.metric.weights[:-1], 1.0, 1e-6)
    found = regmean(module)
    assert isinstance(module.metric.metric, SketchedMetric)
    close(found.dense(), expected, 1e-5)
    assert output_errors(module.grams, module.factors, found, module.metric)[-1].item() == 0


def test_sketches_of_all_columns_are_the_whole_matrices():
    factors, _, data = make(np.random.default_rng(3), inputs=48, tokens=300)
    sketched, whole = (regmean(module_of(factors, data, rank=rank)).dense() for rank in (48, 0))
    close(sketched, np.array(whole).astype(np.float64), 1e-5)


def test_sketches_and_whole_matrices_together():
    factors, products, data = make(np.random.default_rng(9))
    grams = [gram_of(x, rank) for x, rank in zip(data, (6, 0, 4), strict=True)]
    module = layer_of(factors, grams, (2.0, 0.5, 1.0), off_diagonal=0.7, ridge=1e-2)
    expected = reference(products, [dense(gram) for gram in grams], (2.0, 0.5, 1.0), 0.7, 1e-2)
    close(regmean(module).dense(), expected, 1e-5)
    assert isinstance(module.metric.metric, WholeMetric)


def test_is_the_least_squares_solution():
    """ΔW minimises Σ_t ‖X_t ΔW − X_t ΔW_t‖² / n over all of (in, out)."""
    factors, products, data = make(np.random.default_rng(2))
    found = regmean(module_of(factors, data, ridge=0.0)).dense()
    stacked = np.concatenate(data)
    targets = np.concatenate([x @ product for x, product in zip(data, products, strict=True)])
    close(found, np.linalg.lstsq(stacked, targets, rcond=None)[0], 1e-4)


def test_balanced_adapters_count_by_their_relative_errors():
    """Σ_t ‖X_t (ΔW − ΔW_t)‖² / ‖X_t ΔW_t‖²: an update ten times as large has no more say."""
    factors, products, data = make(np.random.default_rng(4))
    factors[1], products[1] = Factors(10 * factors[1].a, factors[1].b), 10 * products[1]
    module = module_of(factors, data, (1.0, 3.0, 1.0), balance="relative", ridge=0.0)
    found = regmean(module)
    rows = [x / np.linalg.norm(x @ product) for x, product in zip(data, products, strict=True)]
    rows[1] = rows[1] * 3**0.5
    targets = np.concatenate([x @ product for x, product in zip(rows, products, strict=True)])
    close(found.dense(), np.linalg.lstsq(np.concatenate(rows), targets, rcond=None)[0], 1e-4)
    errors = output_errors(module.grams, module.factors, found, module.metric)
    for x, product, error in zip(data, products, errors.tolist(), strict=True):
        share = np.sum((x @ (np.array(found.dense()) - product)) ** 2) / np.sum((x @ product) ** 2)
        assert error == pytest.approx(share, rel=1e-4)


def test_half_balanced_adapters_lie_between():
    """w_t over ‖X_t ΔW_t‖, the largest of which is 1."""
    factors, products, data = make(np.random.default_rng(6))
    factors[1], products[1] = Factors(10 * factors[1].a, factors[1].b), 10 * products[1]
    weights = module_of(factors, data, (1.0, 3.0, 1.0), balance="root").metric.weights
    sizes = np.array([np.linalg.norm(x @ product) for x, product in zip(data, products, strict=True)])
    np.testing.assert_allclose(weights, np.array([1.0, 3.0, 1.0]) * sizes.max() / sizes, rtol=1e-4)


def test_the_default_leaves_the_weights_of_the_user_alone():
    factors, _, data = make(np.random.default_rng(6))
    defaults = {name: parameter.default for name, parameter in PARAMETERS.items()}
    assert module_of(factors, data, (1.0, 3.0, 2.0), **defaults).metric.weights == (1.0, 3.0, 2.0)


def test_balance_has_bounds():
    factors, _, data = make(np.random.default_rng(5))
    factors[0] = Factors(1e-4 * factors[0].a, factors[0].b)
    factors[1] = Factors(factors[1].a, mx.zeros_like(factors[1].b))
    first, none, largest = module_of(factors, data, balance="relative").metric.weights
    assert first == pytest.approx(LARGEST_RATIO)
    assert none == largest == 1.0


def test_other_numbers_of_tokens_weigh_the_same():
    factors, _, data = make(np.random.default_rng(3), ranks=(2, 2))
    doubled = [data[0], np.concatenate([data[1], data[1]])]
    one, other = (regmean(module_of(factors, each)).dense() for each in (data, doubled))
    close(one, np.array(other).astype(np.float64), 1e-6)


@pytest.mark.parametrize("source", ["directions", "span"])
@pytest.mark.parametrize("rank", [0, 4])
def test_equal_updates_stay_even_without_inputs(source, rank):
    rng = np.random.default_rng(4)
    factors, products, data = make(rng, ranks=(3,), tokens=5)
    data += [rng.standard_normal((4, 24))]
    found = regmean(module_of(factors * 2, data, rank=rank, source=source))
    close(found.dense(), products[0], 1e-4)


def test_directions_without_inputs_get_the_mean():
    rng = np.random.default_rng(5)
    factors, products, _ = make(rng, ranks=(3, 3))
    seen = np.zeros((2, 50, 24))
    seen[:, :, :12] = rng.standard_normal((2, 50, 12))
    found = np.array(regmean(module_of(factors, list(seen))).dense())
    traces = np.array([np.sum(x**2) / len(x) for x in seen])
    mean = (traces[0] * products[0] + traces[1] * products[1]) / traces.sum()
    np.testing.assert_allclose(found[12:], mean[12:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 12])
def test_in_the_span_it_is_the_best_combination_of_the_a(rank):
    """min over c of Σ_t w_t ‖X_t ([a_1 … a_T] c − ΔW_t)‖², ridge and all."""
    factors, products, data = make(np.random.default_rng(6), inputs=40)
    module = module_of(factors, data, rank=rank, source="span", ridge=1e-3)
    a = np.concatenate([np.array(update.a) for update in factors], axis=1).astype(np.float64)
    rows, targets = [], []
    for gram, product in zip(module.grams, products, strict=True):
        moment = dense(gram) + 1e-3 * np.trace(dense(gram)) / 40 * np.eye(40)
        root = np.linalg.cholesky(moment).T
        rows.append(root @ a)
        targets.append(root @ product)
    best = a @ np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]
    close(regmean(module).dense(), best, 1e-5)


@pytest.mark.parametrize("rank", [0, 24])
def test_huge_features_do_not_drown_the_others(rank):
    """Hidden states have features thousands of times the rest; the answers on the data must still be the best ones, or
    those of 24 of 96 columns near them: of what the best merge wins over the mean they lose a quarter at most.
    """
    rng = np.random.default_rng(6)
    inputs = 96
    spread = np.exp(rng.normal(0, 1, inputs))
    spread[[3, 50]] = 3000.0
    factors, products, data = make(rng, inputs=inputs, ranks=(4, 4), tokens=2000, spread=spread)
    module = module_of(factors, data, rank=rank)
    expected = reference(products, [dense(gram) for gram in module.grams], (1.0, 1.0), 1.0, 1e-6)
    found = np.array(regmean(module).dense()).astype(np.float64)
    close(found, expected, 1e-4)
    quiet = np.delete(np.arange(inputs), [3, 50])
    close(found[quiet], expected[quiet], 1e-4)

    def lost(update):
        return sum(np.sum(np.square(x @ (update - product))) for x, product in zip(data, products, strict=True))

    best = lost(reference(products, [x.T @ x / len(x) for x in data], (1.0, 1.0), 1.0, 1e-6))
    assert lost(found) < best + 0.25 * (lost(np.mean(products, axis=0)) - best)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_fewer_tokens_than_inputs(ridge):
    """The matrix is singular: what comes out still answers the data, and does not blow up elsewhere."""
    factors, products, data = make(np.random.default_rng(7), inputs=200, ranks=(4, 4), tokens=40)
    module = module_of(factors, data, ridge=ridge)
    found = np.array(regmean(module).dense()).astype(np.float64)
    assert module.notes["ridge"].item() >= 1e-7
    for x, product in zip(data, products, strict=True):
        close(x @ found, x @ product, 0.02)
    assert np.linalg.norm(found) < 3 * max(np.linalg.norm(product) for product in products)


@pytest.mark.parametrize("rank", [0, 6])
def test_refusals(rank):
    factors, _, data = make(np.random.default_rng(8))
    nothing = [np.zeros_like(x) for x in data]
    broken = [gram_of(data[0], rank), WholeGram(gram_of(data[1]).dense() * float("nan")), gram_of(data[2], rank)]
    for grams in ([gram_of(x, rank) for x in nothing], broken):
        with pytest.raises(RsgwmError, match="layer: the directions of its inputs are singular or not finite"):
            regmean(layer_of(factors, grams))
