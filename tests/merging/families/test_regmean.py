"""RegMean against its formula in float64, as a least-squares solution, and on matrices that are hard to solve with."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.regmean import regmean, solve_cholesky
from mlx_rsgwm.merging.layer import Layer

PARAMETERS = {"off_diagonal": 1.0, "ridge": 1e-6}


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


def module_of(factors, data, weights=None, **parameters):
    grams = tuple(mx.array((x.T @ x / len(x)).astype(np.float32)) for x in data)
    return Layer(
        "layer",
        tuple(factors),
        (1.0,) * len(factors),
        tuple(weights or (1.0,) * len(factors)),
        mx.random.key(0),
        grams=grams,
        parameters={**PARAMETERS, **parameters},
    )


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


@pytest.mark.parametrize("off_diagonal", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.0)])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2])
def test_formula(off_diagonal, weights, ridge):
    factors, products, data = make(np.random.default_rng(1))
    module = module_of(factors, data, weights, off_diagonal=off_diagonal, ridge=ridge)
    grams = [np.array(gram).astype(np.float64) for gram in module.grams]
    found = regmean(module)
    assert found.rank == 10
    close(found.dense(), reference(products, grams, weights, off_diagonal, ridge), 1e-5)
    assert module.notes["ridge"].item() == pytest.approx(ridge)


def test_is_the_least_squares_solution():
    """ΔW minimises Σ_t ‖X_t ΔW − X_t ΔW_t‖² / n over all of (in, out)."""
    factors, products, data = make(np.random.default_rng(2))
    found = regmean(module_of(factors, data, ridge=0.0)).dense()
    stacked = np.concatenate(data)
    targets = np.concatenate([x @ product for x, product in zip(data, products, strict=True)])
    close(found, np.linalg.lstsq(stacked, targets, rcond=None)[0], 1e-4)


def test_other_numbers_of_tokens_weigh_the_same():
    factors, _, data = make(np.random.default_rng(3), ranks=(2, 2))
    doubled = [data[0], np.concatenate([data[1], data[1]])]
    one, other = (regmean(module_of(factors, each)).dense() for each in (data, doubled))
    close(one, np.array(other).astype(np.float64), 1e-6)


def test_equal_updates_stay_even_without_inputs():
    rng = np.random.default_rng(4)
    factors, products, data = make(rng, ranks=(3,), tokens=5)
    data += [rng.standard_normal((4, 24))]
    found = regmean(module_of(factors * 2, data))
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


def test_huge_features_do_not_drown_the_others():
    """Hidden states have features thousands of times the rest; the answers on the data must still be the best ones."""
    rng = np.random.default_rng(6)
    inputs = 96
    spread = np.exp(rng.normal(0, 1, inputs))
    spread[[3, 50]] = 3000.0
    factors, products, data = make(rng, inputs=inputs, ranks=(4, 4), tokens=2000, spread=spread)
    module = module_of(factors, data)
    grams = [np.array(gram).astype(np.float64) for gram in module.grams]
    expected = reference(products, grams, (1.0, 1.0), 1.0, 1e-6)
    found = np.array(regmean(module).dense()).astype(np.float64)
    close(found, expected, 1e-4)
    quiet = np.delete(np.arange(inputs), [3, 50])
    close(found[quiet], expected[quiet], 1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_fewer_tokens_than_inputs(ridge):
    """The matrix is singular: what comes out still answers the data, and does not blow up elsewhere."""
    factors, products, data = make(np.random.default_rng(7), inputs=200, ranks=(4, 4), tokens=40)
    module = module_of(factors, data, ridge=ridge)
    found = np.array(regmean(module).dense()).astype(np.float64)
    for x, product in zip(data, products, strict=True):
        close(x @ found, x @ product, 0.02)
    assert np.linalg.norm(found) < 3 * max(np.linalg.norm(product) for product in products)


def test_refusals():
    factors, _, data = make(np.random.default_rng(8))
    nothing = [np.zeros_like(x) for x in data]
    broken = [data[0], data[1], np.full_like(data[2], np.nan)]
    for each in (nothing, broken):
        with pytest.raises(RsgwmError, match="layer: RegMean's Gram matrices are singular or not finite"):
            regmean(module_of(factors, each))


def test_an_adapter_without_the_module_has_no_say():
    factors, _, data = make(np.random.default_rng(9), ranks=(3, 2))
    absent = Factors(mx.zeros((24, 1)), mx.zeros((1, 17)))
    three = regmean(module_of([*factors, absent], [*data, np.zeros((5, 24))])).dense()
    close(three, np.array(regmean(module_of(factors, data)).dense()).astype(np.float64), 1e-6)


@pytest.mark.parametrize("size", [1, 255, 256, 700])
def test_solving_in_blocks(size):
    rng = np.random.default_rng(size)
    x = rng.standard_normal((2 * size + 3, size))
    matrix, right = x.T @ x, rng.standard_normal((size, 3))
    with mx.stream(mx.cpu):
        lower = mx.array(np.linalg.cholesky(matrix)).astype(mx.float64)
        found = solve_cholesky(lower, mx.array(right).astype(mx.float64))
        close(found, np.linalg.solve(matrix, right), 1e-5)
