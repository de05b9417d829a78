"""RS-GWM and linear against a NumPy float64 transcription, and what a merge refuses."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.adapter import Adapter
from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.merging.masks import normalised, quantile
from mlx_rsgwm.merging.merge import METHODS, merge
from mlx_rsgwm.merging.options import MergeOptions


def reference(adapters, options):
    """Algorithm 1 of the paper with the readings of SPEC 6, entry by entry in float64."""
    signal = options.role if options.signal == "per_role" else "all"
    names = list(adapters[0].weights)
    numerator = dict.fromkeys(names, 0.0)
    denominator = dict.fromkeys(names, 0.0)
    for adapter in adapters:
        s = {name: np.array(adapter.importance[f"{signal}/{name}"]).astype(np.float64) for name in names}
        everything = np.concatenate([value.ravel() for value in s.values()])
        for name in names:
            threshold = np.quantile(everything if options.scope == "global" else s[name], options.quantile)
            # float32 thresholds: an entry equal to the quantile is kept
            mask = s[name] >= threshold - 1e-7 * abs(threshold)
            weight = s[name]
            if options.normalise == "mean":
                weight = weight / everything.mean()
            elif options.normalise == "rank":
                weight = (np.argsort(np.argsort(s[name], axis=None)).reshape(s[name].shape) + 1) / s[name].size
            origin = np.array(adapter.init[name]) if options.reference == "init" and name in adapter.init else 0.0
            delta = np.array(adapter.weights[name]).astype(np.float64) - origin
            numerator[name] = numerator[name] + weight * mask * delta
            denominator[name] = denominator[name] + weight * mask
    merged = {}
    for name in names:
        origin = np.array(adapters[0].init[name]) if options.reference == "init" and name in adapters[0].init else 0.0
        merged[name] = origin + numerator[name] / (denominator[name] + options.epsilon)
    return merged


@pytest.mark.parametrize("role", ["draft", "verify"])
@pytest.mark.parametrize("signal", ["per_role", "shared"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("origin", ["init", "zero"])
@pytest.mark.parametrize("normalise", ["mean", "none", "rank"])
def test_rsgwm_is_algorithm_one(make_adapter, role, signal, scope, origin, normalise):
    adapters = [make_adapter(seed) for seed in range(3)]
    options = MergeOptions(role=role, signal=signal, scope=scope, reference=origin, normalise=normalise)
    merged = merge(adapters, options)
    for name, expected in reference(adapters, options).items():
        np.testing.assert_allclose(np.array(merged.weights[name]), expected, rtol=1e-5, atol=1e-6)


def test_linear_is_the_weighted_mean(make_adapter):
    adapters = [make_adapter(seed) for seed in range(3)]
    merged = merge(adapters, MergeOptions(method="linear", weights=(1.0, 2.0, 5.0)))
    for name, value in merged.weights.items():
        expected = sum(
            np.array(a.weights[name]).astype(np.float64) * w for a, w in zip(adapters, (1, 2, 5), strict=True)
        )
        np.testing.assert_allclose(np.array(value), expected / 8, rtol=1e-5, atol=1e-7)


def test_shared_signal_nests_the_verifier_in_the_drafter(make_adapter):
    from mlx_rsgwm.merging.masks import quantile_masks

    importance = make_adapter(1).importance_of("all")
    draft, verify = quantile_masks(importance, 0.3, "tensor"), quantile_masks(importance, 0.5, "tensor")
    for name, mask in verify.items():
        assert mx.all(mask <= draft[name]).item()
        assert draft[name].mean().item() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("tau", [0.1, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_quantile_is_numpys(tau, size):
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    assert quantile(mx.array(values), tau).item() == pytest.approx(np.quantile(values, tau), abs=1e-6)


def test_normalisation_removes_a_tasks_scale(make_adapter):
    importance = make_adapter(1).importance_of("all")
    louder = {name: value * 1000 for name, value in importance.items()}
    for how in ("mean", "rank"):
        for name, value in normalised(importance, how).items():
            assert mx.allclose(normalised(louder, how)[name], value, rtol=1e-5).item()


def test_one_masked_adapter_merged_with_itself_is_itself_where_kept(make_adapter):
    adapter = make_adapter(1)
    merged = merge([adapter, adapter], MergeOptions(tau=0.01, reference="zero"))
    for name, value in merged.weights.items():
        kept = adapter.importance[f"draft/{name}"] >= quantile(adapter.importance[f"draft/{name}"], 0.01)
        assert mx.allclose(mx.where(kept, value, adapter.weights[name]), adapter.weights[name], rtol=1e-5).item()


def test_collapse_is_refused_with_the_reason(make_adapter):
    """With zero reference and a global quantile A can be masked away whole: the verifier would be the base model."""
    adapters = [make_adapter(seed) for seed in range(2)]
    for adapter in adapters:
        for name in adapter.importance:
            if name.endswith("lora_a"):
                adapter.importance[name] = adapter.importance[name] * 1e-6
    with pytest.raises(RsgwmError, match="the merge collapses in 4 of 4 modules"):
        merge(adapters, MergeOptions(role="verify", scope="global", reference="zero", tau=0.7))
    merge(adapters, MergeOptions(role="verify", scope="global", reference="init", tau=0.7))


def test_diagnosis_is_that_of_dense_products(make_adapter):
    adapters = [make_adapter(seed) for seed in range(3)]
    merged = merge(adapters, MergeOptions())
    module = merged.modules()[1]

    def dense(adapter):
        a, b = (np.array(adapter.weights[f"{module}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
        return adapter.spec.scale * a @ b

    row = merged.manifest["merge"]["diagnosis"]["modules"][module]
    product = dense(merged)
    assert row["norm"] == pytest.approx(np.linalg.norm(product), rel=1e-4)
    for adapter, norm, cosine in zip(adapters, row["source_norms"], row["cosines"], strict=True):
        source = dense(adapter)
        assert norm == pytest.approx(np.linalg.norm(source), rel=1e-4)
        expected = (product * source).sum() / np.linalg.norm(product) / np.linalg.norm(source)
        assert cosine == pytest.approx(expected, abs=1e-4)


def test_merged_folder_is_an_mlx_lm_adapter(make_adapter, tiny_base, tmp_path):
    from mlx_lm.tuner.utils import load_adapters

    from mlx_rsgwm.base import load_base

    merge([make_adapter(0), make_adapter(1)], MergeOptions()).save(tmp_path / "m")
    again = Adapter.load(tmp_path / "m")
    assert again.manifest["kind"] == "merged"
    assert len(again.manifest["merge"]["sources"]) == 2
    load_adapters(load_base(str(tiny_base), dtype="float32").model, str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:1], "needs at least two adapters"),
        (lambda a: [a[0], strip(a[1], "importance")], "has no importance for 'draft'"),
        (lambda a: [a[0], strip(a[1], "init")], "does not share its lora_a initialisation"),
    ],
)
def test_pools_that_cannot_be_merged(make_adapter, change, message):
    with pytest.raises(RsgwmError, match=message):
        merge(change([make_adapter(0), make_adapter(1)]), MergeOptions())


def strip(adapter, field):
    setattr(adapter, field, {})
    return adapter


def test_every_reason_at_once(make_adapter):
    other = make_adapter(1, rank=3, scale=1.0, keys=("self_attn.q_proj",))
    other.manifest = {"base": {"fingerprint": "f"}, "template": {"hash": "h"}}
    with pytest.raises(RsgwmError) as caught:
        merge([make_adapter(0), other], MergeOptions())
    for part in ("another base", "has scale 1.0", "differ in modules"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": 0.0}, r"tau must be in \(0, 1\), found 0.0"),
        ({"tau": 1.0}, "tau"),
        ({"role": "judge"}, "role must be one of draft, verify"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"weights": (1.0, -1.0)}, "sum to zero"),
        ({"weights": (1.0, float("nan"))}, "finite"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(RsgwmError, match=message):
        MergeOptions(**values)


def test_unknown_method_and_wrong_number_of_weights(make_adapter):
    with pytest.raises(RsgwmError, match=f"there are {', '.join(METHODS)}"):
        merge([make_adapter(0), make_adapter(1)], MergeOptions(method="magic"))
    with pytest.raises(RsgwmError, match="3 weights for 2 adapters"):
        merge([make_adapter(0), make_adapter(1)], MergeOptions(weights=(1.0, 1.0, 1.0)))
