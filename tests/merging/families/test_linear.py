"""Methods that combine whole updates, against their formulas on dense vectors in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions


def products(adapter):
    return {
        module: adapter.spec.scale * np.array(a).astype(np.float64) @ np.array(b).astype(np.float64)
        for module, a, b in adapter.factors()
    }


@pytest.fixture
def pool(make_adapter):
    return [make_adapter(seed) for seed in range(3)]


def merged_products(pool, method, weights=(), **parameters):
    rank = sum(adapter.spec.rank for adapter in pool)
    return products(merge(pool, MergeOptions(method, parameters=parameters, weights=weights, rank=rank)))


def check(found, expected):
    for module, value in expected.items():
        np.testing.assert_allclose(found[module], value, rtol=1e-4, atol=2e-5 * np.abs(value).max())


def test_linear_is_the_mean_of_the_products(pool):
    sources = [products(adapter) for adapter in pool]
    expected = {m: (sources[0][m] + 2 * sources[1][m] + 5 * sources[2][m]) / 8 for m in sources[0]}
    check(merged_products(pool, "linear", (1.0, 2.0, 5.0)), expected)


def test_linear_in_factor_space_is_the_mean_of_the_factors(pool):
    merged = merge(pool, MergeOptions("linear", parameters={"space": "factor"}, weights=(1.0, 2.0, 5.0)))
    for name, value in merged.weights.items():
        parts = [np.array(adapter.weights[name]).astype(np.float64) for adapter in pool]
        np.testing.assert_allclose(np.array(value), (parts[0] + 2 * parts[1] + 5 * parts[2]) / 8, rtol=1e-5, atol=1e-7)


def test_mean_factors_are_not_the_mean_product(make_adapter, pool):
    """What product space is for: with factors of their own, the factor mean of the products is another matrix."""
    generator = np.random.default_rng(0)
    for adapter in pool:
        for name in adapter.weights:
            adapter.weights[name] = mx.array(generator.standard_normal(adapter.weights[name].shape).astype(np.float32))
    sources = [products(adapter) for adapter in pool]
    for adapter in pool:
        adapter.init = pool[0].init
    found = merged_products(pool, "linear", space="factor")
    errors = [
        np.linalg.norm(found[m] - sum(s[m] for s in sources) / 3) / np.linalg.norm(sum(s[m] for s in sources) / 3)
        for m in sources[0]
    ]
    assert min(errors) > 0.5


@pytest.mark.parametrize("method", ["task_arithmetic", "cat"])
def test_sums(pool, method):
    sources = [products(adapter) for adapter in pool]
    expected = {m: 0.4 * (sources[0][m] - sources[1][m] + 0.5 * sources[2][m]) for m in sources[0]}
    check(merged_products(pool, method, (1.0, -1.0, 0.5), **{"lambda": 0.4}), expected)


def test_cat_keeps_every_rank(pool):
    assert merge(pool, MergeOptions("cat")).spec.rank == 3 * pool[0].spec.rank
    assert merge(pool, MergeOptions("cat")).manifest["merge"]["diagnosis"]["overall"]["discarded"] == 0


def test_norm_equalised_over_the_adapter(pool):
    pool[1].weights = {n: v * (5 if n.endswith("lora_b") else 1) for n, v in pool[1].weights.items()}
    sources = [products(adapter) for adapter in pool[:2]]
    norms = [np.sqrt(sum((value**2).sum() for value in source.values())) for source in sources]
    expected = {m: (norms[1] * sources[0][m] + norms[0] * sources[1][m]) / sum(norms) for m in sources[0]}
    check(merged_products(pool[:2], "norm_equalised"), expected)


def test_norm_equalised_by_the_geometric_mean(pool):
    sources = [products(adapter) for adapter in pool]
    expected = {}
    for m in sources[0]:
        norms = [np.linalg.norm(source[m]) for source in sources]
        target = np.prod(norms) ** (1 / 3)
        expected[m] = sum(source[m] * target / norm for source, norm in zip(sources, norms, strict=True)) / 3
    check(merged_products(pool, "norm_equalised", definition="geometric"), expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
def test_slerp(pool, weights):
    sources = [products(adapter) for adapter in pool[:2]]
    t, expected = weights[1] / sum(weights), {}
    for m in sources[0]:
        x, y = sources[0][m], sources[1][m]
        theta = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        expected[m] = (np.sin((1 - t) * theta) * x + np.sin(t * theta) * y) / np.sin(theta)
    check(merged_products(pool[:2], "slerp", weights), expected)


def test_slerp_of_parallel_updates_is_linear(pool):
    twice = type(pool[0])(pool[0].spec, {n: v * (2 if n.endswith("b") else 1) for n, v in pool[0].weights.items()})
    sources = products(pool[0])
    check(merged_products([pool[0], twice], "slerp"), {m: 1.5 * value for m, value in sources.items()})


def test_slerp_is_for_two(pool):
    with pytest.raises(RsgwmError, match="slerp merges exactly two adapters, found 3; use multislerp or karcher"):
        merge(pool, MergeOptions("slerp"))


def sphere_mean(vectors, weights, steps):
    """The Karcher mean on the sphere by ``steps`` steps from the weighted mean direction, on dense vectors."""
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True)]
    weights = np.array(weights) / sum(weights)
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        tangent = 0.0
        for w, u in zip(weights, units, strict=True):
            theta = np.arccos(np.clip((u * mean).sum(), -1, 1))
            if theta > 1e-9:
                tangent = tangent + w * theta / np.sin(theta) * (u - np.cos(theta) * mean)
        length = np.linalg.norm(tangent)
        if length < 1e-12:
            break
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
    return mean * sum(w * n for w, n in zip(weights, norms, strict=True))


@pytest.mark.parametrize(("method", "steps"), [("multislerp", 1), ("karcher", 200)])
def test_spherical_means(pool, method, steps):
    weights = (1.0, 2.0, 0.5)
    sources = [products(adapter) for adapter in pool]
    expected = {m: sphere_mean([s[m] for s in sources], weights, steps) for m in sources[0]}
    found = merged_products(pool, method, weights, **({"iterations": 100} if method == "karcher" else {}))
    for module, value in expected.items():
        assert np.linalg.norm(found[module] - value) < 1e-4 * np.linalg.norm(value)


def test_model_stock(pool):
    generator = np.random.default_rng(0)
    common = {name: generator.standard_normal(value.shape) for name, value in pool[0].weights.items()}
    for adapter in pool:
        for name, value in adapter.weights.items():
            own = 0.3 * generator.standard_normal(value.shape)
            adapter.weights[name] = mx.array((common[name] + own).astype(np.float32))
    sources = [products(adapter) for adapter in pool]
    expected = {}
    for m in sources[0]:
        pairs = [
            (sources[i][m] * sources[j][m]).sum() / np.linalg.norm(sources[i][m]) / np.linalg.norm(sources[j][m])
            for i in range(3)
            for j in range(i)
        ]
        cosine = np.mean(pairs)
        expected[m] = 3 * cosine / (1 + 2 * cosine) * sum(source[m] for source in sources) / 3
    check(merged_products(pool, "model_stock"), expected)
