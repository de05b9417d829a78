"""Fisher-weighted merging against fusion_bench's formulas in float64, in factor and in product space."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.fisher import fisher, survey_fisher
from mlx_rsgwm.merging.layer import Layer
from mlx_rsgwm.merging.pool import Pool

PARAMETERS = {"space": "factor", "signal": "all", "normalise": "l2", "minimum": 1e-6, "floor": "absolute"}


def modules_of(pool, parameters, weights):
    """The modules as the driver hands them to the method."""
    found = survey_fisher(pool, parameters)
    for (name, factors), pairs in zip(pool.updates(), pool.importances(parameters["signal"]), strict=True):
        yield Layer(
            name,
            factors,
            tuple(source.spec.scale for source in pool.sources),
            weights,
            mx.random.key(0),
            pairs,
            survey=found,
            parameters=parameters,
        )


def theirs(values, fishers, coefficients, normalise, minimum):
    """fusion_bench ``merging_with_fisher_weights``: dicts of T-lists by parameter name, in float64."""
    norms = np.array([np.sqrt(sum((f[t] ** 2).sum() for f in fishers.values())) for t in range(len(coefficients))])
    inverse = 1 / (norms + minimum)
    scaled = np.array(coefficients) * (inverse / inverse.sum() if normalise else 1.0)
    merged = {}
    for name, stack in values.items():
        weights = [c * (f + minimum) for c, f in zip(scaled, fishers[name], strict=True)]
        merged[name] = sum(w * v for w, v in zip(weights, stack, strict=True)) / sum(weights)
    return merged


def wide(array):
    return np.array(array).astype(np.float64)


def everything(pool, space):
    """Values and Fisher weights by parameter, of A and of B with its scale in it, or of ΔW."""
    values, fishers = {}, {}
    for (name, factors), pairs in zip(pool.updates(), map(list, pool.importances("all")), strict=True):
        scales = [source.spec.scale for source in pool.sources]
        a, b = [wide(one.a) for one in factors], [wide(one.b) for one in factors]
        s_a, s_b = [wide(pair[0]) for pair in pairs], [wide(pair[1]) for pair in pairs]
        if space == "product":
            values[name] = [left @ right for left, right in zip(a, b, strict=True)]
            fishers[name] = [
                s_a[t] ** 2 @ (b[t] / scales[t]) ** 2 + a[t] ** 2 @ s_b[t] ** 2 for t in range(len(scales))
            ]
        else:
            values[f"{name}.a"], values[f"{name}.b"] = a, b
            fishers[f"{name}.a"] = [s**2 for s in s_a]
            fishers[f"{name}.b"] = [(s / scale) ** 2 for s, scale in zip(s_b, scales, strict=True)]
    return values, fishers


@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize("normalise", ["l2", "none"])
@pytest.mark.parametrize("minimum", [1e-6, 0.3])
def test_fusion_bench_formula(make_adapter, space, normalise, minimum):
    adapters = [make_adapter(1), make_adapter(2, scale=3.0), make_adapter(3)]
    pool = Pool.open(adapters)
    weights = (1.0, 0.5, 2.0)
    values, fishers = everything(pool, space)
    expected = theirs(values, fishers, weights, normalise == "l2", minimum)
    parameters = {**PARAMETERS, "space": space, "normalise": normalise, "minimum": minimum}
    for module in modules_of(pool, parameters, weights):
        found = fisher(module)
        if space == "product":
            np.testing.assert_allclose(wide(found), expected[module.name], rtol=1e-4, atol=1e-7)
        else:
            np.testing.assert_allclose(wide(found.a), expected[f"{module.name}.a"], rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(wide(found.b), expected[f"{module.name}.b"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_relative_floor_knows_no_units(make_adapter, space, size):
    """The importances' common factor does not matter, down to where their fourth powers leave float32's range."""
    adapters = [make_adapter(1), make_adapter(2)]
    parameters = {**PARAMETERS, "space": space, "floor": "relative", "minimum": 1e-2}

    def merged():
        return [wide(one.dense() if isinstance(one := fisher(m), Factors) else one) for m in plain()]

    def plain():
        return modules_of(Pool.open(adapters), parameters, (1.0, 1.0))

    before = merged()
    for adapter in adapters:
        adapter.importance = {name: s * size for name, s in adapter.importance.items()}
    for first, second in zip(before, merged(), strict=True):
        assert np.isfinite(second).all()
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-6)


def test_absolute_floor_drowns_small_importances(make_adapter):
    """Why the floor is relative by default: at an adapter's usual importance 1e-6 leaves little but the mean."""
    adapters = [make_adapter(1), make_adapter(2)]
    for adapter in adapters:
        adapter.importance = {name: s * 1.6e-4 for name, s in adapter.importance.items()}
    apart = {}
    for floor in ("absolute", "relative"):
        parameters = {**PARAMETERS, "floor": floor, "normalise": "none"}
        module = next(modules_of(Pool.open(adapters), parameters, (1.0, 1.0)))
        mean = wide(module.factors[0].a + module.factors[1].a) / 2
        apart[floor] = np.linalg.norm(wide(fisher(module).a) - mean)
    assert apart["absolute"] < 0.05 * apart["relative"]


def test_other_ranks_and_modules_in_product_space(make_adapter):
    one = make_adapter(1, rank=4)
    other = make_adapter(2, rank=2, keys=("self_attn.q_proj",))
    parameters = {**PARAMETERS, "space": "product", "floor": "relative"}
    found = {m.name: (m, fisher(m)) for m in modules_of(Pool.open([one, other]), parameters, (1.0, 1.0))}
    module, merged = found["model.layers.1.self_attn.v_proj"]  # which only the first adapts
    np.testing.assert_allclose(wide(merged), wide(module.factors[0].dense()), rtol=1e-3, atol=1e-7)


def test_refusals(make_adapter):
    bare = make_adapter(3)
    bare.importance = {}
    with pytest.raises(RsgwmError, match="needs importance for 'all'"):
        survey_fisher(Pool.open([make_adapter(1), bare]), PARAMETERS)
