"""RS-GWM against a NumPy float64 transcription of Algorithm 1, in factor space and in product space."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging.families.rsgwm import product_importance, survey_importance
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.methods import resolved
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.merging.steps.masks import Histogram, mean_entry, quantile, ranks


def double(array):
    return np.array(array).astype(np.float64)


def kept(s, threshold):
    # The thresholds are float32: an entry equal to the quantile is kept.
    return s >= threshold - 1e-7 * abs(threshold)


def scaled(s, everything, how, adapter):
    if how in ("mean", "norm"):
        mean = np.concatenate([value.ravel() for value in everything.values()]).mean()
        products = [adapter.spec.scale * double(a) @ double(b) for _, a, b in adapter.factors()]
        return s / mean / (1 if how == "mean" else np.sqrt(sum((product**2).sum() for product in products)))
    if how == "rank":
        return (np.argsort(np.argsort(s, axis=None)).reshape(s.shape) + 1) / s.size
    return s


def algorithm_one(adapters, options):
    """Algorithm 1 of the paper with our readings of what it leaves open, entry by entry in float64, on the factors."""
    read = resolved(options)
    names = list(adapters[0].weights)
    scopes = {
        "tensor": lambda name: [name],
        "factor": lambda name: [other for other in names if other.endswith(name[-6:])],
        "module": lambda name: [other for other in names if other[:-6] == name[:-6]],
        "global": lambda name: names,
    }
    origins = {
        name: double(adapters[0].init[name]) if read["reference"] == "init" and name in adapters[0].init else 0.0
        for name in names
    }
    numerator, denominator = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for adapter, w in zip(adapters, options.weights or (1.0,) * len(adapters), strict=True):
        s = {name: double(adapter.importance[f"{read['signal']}/{name}"]) for name in names}
        for name in names:
            scope = np.concatenate([s[other].ravel() for other in scopes[read["scope"]](name)])
            weight = w * scaled(s[name], s, read["normalise"], adapter) * kept(s[name], np.quantile(scope, read["tau"]))
            numerator[name] = numerator[name] + weight * (double(adapter.weights[name]) - origins[name])
            denominator[name] = denominator[name] + weight
    return {name: origins[name] + numerator[name] / (denominator[name] + read["epsilon"]) for name in names}


@pytest.mark.parametrize("role", ["draft", "verify"])
@pytest.mark.parametrize("signal", ["per_role", "shared"])
@pytest.mark.parametrize("scope", ["tensor", "factor", "module", "global"])
@pytest.mark.parametrize("origin", ["init", "zero"])
@pytest.mark.parametrize("normalise", ["mean", "norm", "none", "rank"])
def test_rsgwm_is_algorithm_one(make_adapter, role, signal, scope, origin, normalise):
    adapters = [make_adapter(seed, size=0.1 * (1 + seed)) for seed in range(3)]
    parameters = {"signal": signal, "scope": scope, "reference": origin, "normalise": normalise}
    options = MergeOptions("rsgwm", role=role, parameters=parameters, weights=(1.0, 2.0, 0.5))
    merged = merge(adapters, options)
    for name, expected in algorithm_one(adapters, options).items():
        np.testing.assert_allclose(np.array(merged.weights[name]), expected, rtol=1e-5, atol=1e-6)


def test_preset_is_the_algorithm_as_printed(make_adapter):
    adapters = [make_adapter(seed) for seed in range(4)]
    literal = MergeOptions("paper-literal", "verify")
    spelled = {"signal": "shared", "scope": "global", "reference": "zero", "normalise": "none"}
    merged = merge(adapters, literal)
    for name, expected in algorithm_one(adapters, MergeOptions("rsgwm", role="verify", parameters=spelled)).items():
        np.testing.assert_allclose(np.array(merged.weights[name]), expected, rtol=1e-5, atol=1e-6)


def product_algorithm(adapters, options):
    """The same on ΔW and its propagated importance, before the truncation to a rank."""
    read = resolved(options)
    numerator, denominator = {}, {}
    for adapter in adapters:
        s, delta = {}, {}
        for module, a, b in adapter.factors():
            a, b = double(a), double(b)
            s_a, s_b = (double(adapter.importance[f"{read['signal']}/{module}.lora_{leaf}"]) for leaf in "ab")
            s[module] = np.sqrt(s_a**2 @ b**2 + a**2 @ s_b**2)
            delta[module] = adapter.spec.scale * a @ b
        everything = np.concatenate([value.ravel() for value in s.values()])
        for module in s:
            scope = everything if read["scope"] == "global" else s[module]
            weight = scaled(s[module], s, read["normalise"], adapter) * kept(s[module], np.quantile(scope, read["tau"]))
            numerator[module] = numerator.get(module, 0.0) + weight * delta[module]
            denominator[module] = denominator.get(module, 0.0) + weight
    return {module: numerator[module] / (denominator[module] + read["epsilon"]) for module in numerator}


@pytest.mark.parametrize("normalise", ["mean", "norm", "none", "rank"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_product_space(make_adapter, normalise, scope):
    adapters = [make_adapter(seed, size=0.05 * (1 + seed)) for seed in range(3)]
    parameters = {"space": "product", "normalise": normalise, "scope": scope}
    full = max(min(a.shape[0], b.shape[1]) for _, a, b in adapters[0].factors())
    options = MergeOptions("rsgwm", parameters=parameters, rank=full)
    merged = merge(adapters, options)
    dense = product_algorithm(adapters, options)
    for module, a, b in merged.factors():
        found = merged.spec.scale * double(a) @ double(b)
        if scope == "tensor":
            np.testing.assert_allclose(found, dense[module], rtol=1e-3, atol=2e-5)
        else:  # the pooled quantile is within 2^-12: a handful of entries at the threshold may differ
            assert (np.abs(found - dense[module]) > 1e-4).mean() < 0.005
    assert merge(adapters, MergeOptions("rsgwm", parameters=parameters)).spec.rank == adapters[0].spec.rank


def test_product_space_needs_no_shared_initialisation_nor_equal_ranks(make_adapter):
    first, second = make_adapter(0), make_adapter(1, rank=3)
    second.init = {}
    merged = merge([first, second], MergeOptions("rsgwm", parameters={"space": "product"}))
    assert merged.spec.rank == max(first.spec.rank, 3)


def test_truncation_is_the_best_of_its_rank_and_says_what_it_lost(make_adapter):
    adapters = [make_adapter(seed) for seed in range(3)]
    options = MergeOptions("rsgwm", parameters={"space": "product"})
    merged = merge(adapters, options)
    for module, dense in product_algorithm(adapters, options).items():
        sigma = np.linalg.svd(dense, compute_uv=False)
        row = merged.manifest["merge"]["diagnosis"]["modules"][module]
        lost = (sigma[merged.spec.rank :] ** 2).sum() / (sigma**2).sum()
        assert row["discarded"] == pytest.approx(lost, rel=1e-3)


def test_shared_signal_nests_the_verifier_in_the_drafter(make_adapter):
    for s in make_adapter(1).importance_of("all").values():
        draft, verify = s >= quantile(s, 0.3), s >= quantile(s, 0.5)
        assert mx.all(verify <= draft).item()
        assert draft.mean().item() == pytest.approx(0.7, abs=0.02)


def test_a_role_of_ones_own(make_adapter):
    adapters = [make_adapter(seed) for seed in range(2)]
    for adapter in adapters:
        adapter.importance |= {f"critic/{name}": value * value for name, value in adapter.importance_of("all").items()}
    merged = merge(adapters, MergeOptions("rsgwm", role="critic", parameters={"tau": 0.4}))
    assert merged.manifest["merge"]["parameters"]["signal"] == "critic"
    other = merge(adapters, MergeOptions("rsgwm", role="critic", parameters={"tau": 0.4, "signal": "draft"}))
    name = next(iter(merged.weights))
    assert not mx.array_equal(merged.weights[name], other.weights[name]).item()
    with pytest.raises(RsgwmError, match="role 'critic' has no tau of its own"):
        merge(adapters, MergeOptions("rsgwm", role="critic"))


@pytest.mark.parametrize("tau", [0.1, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_quantile_is_numpys(tau, size):
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    assert quantile(mx.array(values), tau).item() == pytest.approx(np.quantile(values, tau), abs=1e-6)


VALUES = {
    "spread": lambda rng, size: rng.lognormal(sigma=3, size=size),
    "one bin": lambda rng, size: 1 + rng.integers(0, 50, size) * 2.0**-23,
    "mostly zero": lambda rng, size: rng.lognormal(size=size) * (rng.random(size) > 0.9),
    "zero": lambda rng, size: np.zeros(size),
    "denormal": lambda rng, size: rng.random(size) * 1e-39,
    "few": lambda rng, size: rng.integers(1, 4, size) / 7,
}


@pytest.mark.parametrize("tau", [0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("size", [1, 2, 3, 5000])
@pytest.mark.parametrize("kind", VALUES)
def test_a_streamed_quantile_is_that_of_everything(kind, size, tau):
    values = VALUES[kind](np.random.default_rng(3), size).astype(np.float32)
    parts = [mx.array(part) for part in np.array_split(values, 3) if part.size]
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    found = histogram.quantile(iter(parts), tau).item()
    assert found == quantile(mx.array(values), tau).item()
    assert found == pytest.approx(np.quantile(values.astype(np.float64), tau), rel=1e-6, abs=1e-44)


@pytest.mark.parametrize("scope", ["global", "factor"])
@pytest.mark.parametrize("tau", [0.3, 0.5, 0.9])
def test_in_product_space_a_pool_wide_quantile_is_exact(make_adapter, scope, tau):
    adapters = [make_adapter(seed) for seed in range(2)]
    options = MergeOptions("rsgwm", parameters={"space": "product", "scope": scope, "tau": tau})
    taken = survey_importance(Pool.open(adapters), resolved(options))
    for adapter, thresholds in zip(adapters, taken.thresholds, strict=True):
        importance, scale = adapter.importance_of("draft"), adapter.spec.scale
        everything = [
            product_importance(Factors(a, b * scale), (importance[f"{m}.lora_a"], importance[f"{m}.lora_b"]), scale)
            for m, a, b in adapter.factors()
        ]
        together = mx.concatenate([value.reshape(-1) for value in everything])
        assert thresholds["product"].item() == quantile(together, tau).item()


def test_normalisations_remove_a_tasks_scale(make_adapter):
    importance = make_adapter(1).importance_of("all")
    for value in importance.values():
        assert mx.array_equal(ranks(value * 1000), ranks(value)).item()
    louder = [value * 1000 for value in importance.values()]
    assert mean_entry(louder).item() == pytest.approx(1000 * mean_entry(importance.values()).item(), rel=1e-5)


def test_one_masked_adapter_merged_with_itself_is_itself_where_kept(make_adapter):
    adapter = make_adapter(1)
    merged = merge([adapter, adapter], MergeOptions("rsgwm", parameters={"tau": 0.01, "reference": "zero"}))
    for name, value in merged.weights.items():
        top = adapter.importance[f"draft/{name}"] >= quantile(adapter.importance[f"draft/{name}"], 0.01)
        assert mx.allclose(mx.where(top, value, adapter.weights[name]), adapter.weights[name], rtol=1e-5).item()


def test_diagnosis_tells_what_the_masks_kept(make_adapter):
    adapters = [make_adapter(seed) for seed in range(3)]
    overall = merge(adapters, MergeOptions()).manifest["merge"]["diagnosis"]["overall"]
    assert overall["kept_a"] == pytest.approx([0.7] * 3, abs=0.03)
    assert overall["kept_b"] == pytest.approx([0.7] * 3, abs=0.03)
    assert 0.2 < overall["overlap_a"] < 0.7
    for space, names in (("factor", ("overlap_a", "overlap_b")), ("product", ("overlap",))):
        together = merge([adapters[0]] * 2, MergeOptions("rsgwm", parameters={"space": space}))
        found = together.manifest["merge"]["diagnosis"]["overall"]
        assert [found[name] for name in names] == pytest.approx([1.0] * len(names))
