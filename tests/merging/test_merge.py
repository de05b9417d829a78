"""The driver: what it refuses, what it measures, how it streams, overrides, mixed adapters."""

import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.core.safetensors_io import read_safetensors, write_safetensors
from mlx_rsgwm.linalg.lowrank import Factors
from mlx_rsgwm.merging import measure
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.methods import METHODS, find_method, resolved
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.models.adapter import Adapter


def product(adapter, module):
    """ΔW (in, out) in float64; zero where the adapter lacks the module is the caller's business."""
    a, b = (np.array(adapter.weights[f"{module}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    return adapter.spec.scale * a @ b


def strip(adapter, field):
    setattr(adapter, field, {})
    return adapter


def test_collapse_is_refused_with_the_reason(make_adapter):
    """With zero reference and a global quantile A can be masked away whole: the verifier would be the base model."""
    adapters = [make_adapter(seed) for seed in range(2)]
    for adapter in adapters:
        for name in adapter.importance:
            if name.endswith("lora_a"):
                adapter.importance[name] = adapter.importance[name] * 1e-6
    wide = {"scope": "global", "tau": 0.7}
    with pytest.raises(RsgwmError, match="the merge collapses in 4 of 4 modules"):
        merge(adapters, MergeOptions(role="verify", parameters={**wide, "reference": "zero"}))
    merge(adapters, MergeOptions(role="verify", parameters={**wide, "reference": "init"}))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 7, 3), (16, 16, 16, 16)])
def test_products_taken_beside_the_merge_are_those_of_dense_ones(ranks):
    rng = np.random.default_rng(0)
    sides = [(rng.standard_normal((300, rank)), rng.standard_normal((rank, 200))) for rank in (*ranks, 5)]
    dense = [a.astype(np.float32).astype(np.float64) @ b.astype(np.float32).astype(np.float64) for a, b in sides]
    *updates, merged = (Factors(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32))) for a, b in sides)
    mx.eval([(one.a, one.b) for one in (*updates, merged)])
    expected = {
        "square": (dense[-1] ** 2).sum(),
        "squares": [(one**2).sum() for one in dense[:-1]],
        "dots": [(one * dense[-1]).sum() for one in dense[:-1]],
        "mean_square": (sum(dense[:-1]) ** 2).sum() / len(ranks) ** 2,
    }
    lazy = {name: value.tolist() for name, value in measure.measure(updates, merged).items()}
    size = max(expected["squares"])
    for found in (measure.measure_in_numpy(updates, merged, ranks), lazy):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("stacked", [1, 8, 128])  # ranks in a stack: one adapter, some, all
@pytest.mark.parametrize("count", [3, 17])  # few, so that products of pairs are taken; many, so that sums are
def test_diagnosis_is_that_of_dense_products(make_adapter, monkeypatch, count, stacked):
    monkeypatch.setattr(measure, "STACKED_RANK", stacked)
    taken = []

    def watch(name):
        way = getattr(measure, name)
        monkeypatch.setattr(measure, name, lambda updates: taken.append(name) or way(updates))

    watch("_squares_by_pairs")
    watch("_squares_by_sum")
    adapters = [make_adapter(seed) for seed in range(count)]
    merged = merge(adapters, MergeOptions())
    module = merged.modules()[1]
    row = merged.manifest["merge"]["diagnosis"]["modules"][module]
    found = product(merged, module)
    sources = [product(adapter, module) for adapter in adapters]

    def cosine(x, y):
        return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)

    assert row["norm"] == pytest.approx(np.linalg.norm(found), rel=1e-4)
    assert row["source_norms"] == pytest.approx([np.linalg.norm(source) for source in sources], rel=1e-4)
    assert row["cosines"] == pytest.approx([cosine(found, source) for source in sources], abs=1e-4)
    assert row["cosine_to_mean_product"] == pytest.approx(cosine(found, sum(sources)), abs=1e-4)
    everything = np.concatenate([product(merged, name).ravel() for name in merged.modules()])
    overall = merged.manifest["merge"]["diagnosis"]["overall"]
    assert overall["norm"] == pytest.approx(np.linalg.norm(everything), rel=1e-4)
    apart = {"_squares_by_pairs" if count == 3 else "_squares_by_sum"}
    assert set(taken) == (apart if stacked < 128 else set())


@pytest.mark.parametrize("method", ["rsgwm", "fisher"])
def test_an_importance_is_dropped_when_the_next_is_read(make_adapter, monkeypatch, method):
    """Otherwise memory grows with the number of adapters."""
    alive: list[weakref.ref] = []
    most = 0
    original = Pool.importances

    def watched(pool, signal):
        for pairs in original(pool, signal):
            yield map(watch, pairs)

    def watch(pair):
        nonlocal most
        copies = tuple(s + 0 for s in pair)
        alive.extend(map(weakref.ref, copies))
        most = max(most, sum(one() is not None for one in alive))
        return copies

    adapters = [make_adapter(seed) for seed in range(8)]
    monkeypatch.setattr(Pool, "importances", watched)
    merge(adapters, MergeOptions(method))
    assert most <= 6  # of 16: the pair at hand, and those that loops still name


@pytest.mark.parametrize("method", ["rsgwm", "ties", "peft:linear"])
def test_without_a_diagnosis_the_merge_is_the_same_and_still_finite(make_adapter, tmp_path, method):
    adapters = [make_adapter(seed) for seed in range(2)]
    folders = [adapter.save(tmp_path / str(index)) for index, adapter in enumerate(adapters)]
    plain, told = (merge(folders, MergeOptions(method), diagnosed=diagnosed) for diagnosed in (False, True))
    assert all(mx.array_equal(value, plain.weights[name]).item() for name, value in told.weights.items())
    assert "diagnosis" not in plain.manifest["merge"]
    assert plain.save(tmp_path / "merged").is_dir()
    first = next(iter(adapters[0].weights))
    damaged = replace(
        adapters[0], path=None, weights={**adapters[0].weights, first: adapters[0].weights[first] * mx.inf}
    )
    with pytest.raises(RsgwmError, match="not finite"):
        merge([damaged, adapters[1]], MergeOptions(method), diagnosed=False)


def test_folders_and_adapters_in_memory_give_the_same(make_adapter, tmp_path):
    adapters = [make_adapter(seed) for seed in range(3)]
    held = merge(adapters, MergeOptions())
    folders = [adapter.save(tmp_path / str(index)) for index, adapter in enumerate(adapters)]
    streamed = merge(folders, MergeOptions())
    assert all(mx.array_equal(value, streamed.weights[name]).item() for name, value in held.weights.items())
    assert streamed.manifest["merge"]["sources"][2]["name"] == "2"


@pytest.mark.parametrize("damaged", ["weights", "importance"])
def test_values_in_folders_that_are_not_finite_are_named(make_adapter, tmp_path, damaged):
    folders = [make_adapter(seed).save(tmp_path / f"a{seed}") for seed in range(2)]
    path = folders[1] / {"weights": "adapters.safetensors", "importance": "importance.safetensors"}[damaged]
    arrays, metadata = read_safetensors(path)
    name = next(name for name in reversed(arrays) if "verify" in name or damaged == "weights")
    arrays[name] = mx.where(mx.arange(arrays[name].size).reshape(arrays[name].shape) == 3, mx.inf, arrays[name])
    write_safetensors(path, arrays, metadata)
    (folders[1] / "manifest.json").unlink()  # its hashes would tell first
    with pytest.raises(AdapterError, match=f"a1: .*{name.rpartition('/')[2]} has values that are not finite"):
        merge(folders, MergeOptions(role="verify"))
    if damaged == "importance":  # of another role: never read
        merge(folders, MergeOptions(role="draft"))


@pytest.mark.parametrize("method", ["rsgwm", "peft:svd", "ties", "knots"])
@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_a_changed_file_never_becomes_a_merge(make_adapter, tmp_path, method, value):
    """Files are hashed beside the work: what a changed one made is dropped, and a failure is told as what it is."""
    folders = [make_adapter(seed).save(tmp_path / f"a{seed}") for seed in range(2)]
    path = folders[1] / "adapters.safetensors"
    arrays, metadata = read_safetensors(path)
    name = next(iter(arrays))
    arrays[name] = mx.full(arrays[name].shape, value)
    write_safetensors(path, arrays, metadata)
    with pytest.raises(AdapterError, match=r"a1: adapters\.safetensors was changed or damaged"):
        merge(folders, MergeOptions(method))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "directions" not in method.needs])
@pytest.mark.parametrize("diagnosed", [True, False])
@pytest.mark.parametrize("entries", [1, 1000])
def test_weights_that_are_not_finite_are_named_whatever_the_method(make_adapter, tmp_path, method, diagnosed, entries):
    folders = [make_adapter(seed).save(tmp_path / f"a{seed}") for seed in range(2)]
    path = folders[0] / "adapters.safetensors"
    arrays, metadata = read_safetensors(path)
    name = next(iter(arrays))
    place = mx.arange(arrays[name].size).reshape(arrays[name].shape)
    arrays[name] = mx.where(place < entries, mx.nan, arrays[name])
    write_safetensors(path, arrays, metadata)
    (folders[0] / "manifest.json").unlink()
    with pytest.raises(AdapterError, match=f"a0: .*{name.rpartition('/')[2]} has values that are not finite"):
        merge(folders, MergeOptions(method), diagnosed=diagnosed)


def test_merged_folder_is_an_mlx_lm_adapter(make_adapter, tiny_base, tmp_path):
    from mlx_lm.tuner.utils import load_adapters

    from mlx_rsgwm.models.base import load_base

    merge([make_adapter(0), make_adapter(1)], MergeOptions()).save(tmp_path / "m")
    again = Adapter.load(tmp_path / "m")
    assert again.manifest["kind"] == "merged"
    assert len(again.manifest["merge"]["sources"]) == 2
    load_adapters(load_base(str(tiny_base), dtype="float32").model, str(tmp_path / "m"))


def test_mixed_ranks_scales_and_modules_merge_in_product_space(make_adapter):
    first = make_adapter(0)
    second = make_adapter(1, rank=3, scale=0.5, keys=("self_attn.q_proj",))
    merged = merge([first, second], MergeOptions("linear", weights=(1.0, 3.0), rank=first.spec.rank + 3))
    only_first = set(first.modules()) - set(second.modules())
    assert only_first
    for module in merged.modules():
        expected = 0.25 * product(first, module)
        if module not in only_first:
            expected = expected + 0.75 * product(second, module)
        np.testing.assert_allclose(product(merged, module), expected, rtol=1e-4, atol=1e-5)
    assert any("differ in modules" in warning for warning in merged.manifest["merge"]["warnings"])


@pytest.mark.parametrize("method", ["linear", "ties", "rsgwm"])
def test_a_rank_that_the_updates_do_not_have_is_told(make_adapter, method):
    adapters = [make_adapter(0), make_adapter(1)]
    usual = merge(adapters, MergeOptions(method))
    large = merge(adapters, MergeOptions(method, rank=500))
    (told,) = set(large.manifest["merge"]["warnings"]) - set(usual.manifest["merge"]["warnings"])
    assert told.startswith("rank 500 adds nothing: no update here has more than rank ")
    enough = int(told.split("--rank ")[1].split()[0])
    assert adapters[0].spec.rank <= enough < 500
    same = merge(adapters, MergeOptions(method, rank=enough))
    for module in same.modules():
        np.testing.assert_allclose(product(same, module), product(large, module), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(large.weights[f"{module}.lora_a"][:, enough:], 0)
    below = merge(adapters, MergeOptions(method, rank=adapters[0].spec.rank)).manifest["merge"]["warnings"]
    assert not any(warning.startswith("rank") for warning in below)


def test_a_rank_that_some_updates_do_not_have_is_told(make_adapter):
    first, second = make_adapter(0), make_adapter(1, rank=3, keys=("self_attn.q_proj",))
    merged = merge([first, second], MergeOptions("linear", rank=first.spec.rank + 3))
    (told,) = (warning for warning in merged.manifest["merge"]["warnings"] if warning.startswith("rank"))
    only_first = [module for module in merged.modules() if module not in second.modules()]
    assert told.startswith(f"rank {first.spec.rank + 3} is more than {len(only_first)} of {len(merged.modules())} ")
    assert f": {first.spec.rank + 1})" in told or f": {first.spec.rank})" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:1], "needs at least two adapters"),
        (lambda a: [a[0], strip(a[1], "importance")], "needs importance for 'draft': .* has none; collect it"),
        (lambda a: [a[0], strip(a[1], "init")], "space=product.*does not share its lora_a initialisation"),
        (lambda a: [a[0], zeroed(a[1])], "changes nothing"),
    ],
)
def test_pools_that_cannot_be_merged(make_adapter, change, message):
    with pytest.raises(RsgwmError, match=message):
        merge(change([make_adapter(0), make_adapter(1)]), MergeOptions("rsgwm"))


def zeroed(adapter):
    adapter.weights = {name: value * 0 if name.endswith("lora_b") else value for name, value in adapter.weights.items()}
    return adapter


def test_every_reason_at_once(make_adapter):
    first = make_adapter(0)
    other = make_adapter(1, rank=3, keys=("self_attn.q_proj",))
    first.manifest = {"base": {"fingerprint": "e"}}
    other.manifest = {"base": {"fingerprint": "f"}}
    with pytest.raises(RsgwmError, match="another base"):
        merge([first, other], MergeOptions())
    other.manifest = {}
    with pytest.raises(RsgwmError) as caught:
        merge([first, other], MergeOptions("rsgwm"))
    for part in ("differ in modules", "does not share"):
        assert part in str(caught.value)


def test_modules_of_other_shapes_are_named(make_adapter):
    other = make_adapter(1)
    name = next(iter(other.weights)).removesuffix(".lora_a")
    other.importance, other.init = {}, {}
    other.weights[f"{name}.lora_a"] = mx.ones((7, other.spec.rank))
    with pytest.raises(RsgwmError, match=f"{name} maps 7 to"):
        merge([make_adapter(0), other], MergeOptions("linear"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parameters": {"tau": 0.0}}, r"tau must be in \(0, 1\), found 0.0"),
        ({"parameters": {"tau": 1.0}}, "tau"),
        ({"parameters": {"tau": "x"}}, "tau must be a number"),
        ({"parameters": {"scope": "galaxy"}}, "scope must be one of tensor, factor, module, global"),
        ({"parameters": {"epsilon": 0.0, "reference": 3}}, "epsilon.*reference|reference.*epsilon"),
        ({"method": "magic"}, "unknown method 'magic'; there are rsgwm"),
        ({"method": "slrp"}, "did you mean 'slerp'"),
        ({"method": "lego", "parameters": {"clusters": 4.5}}, "clusters must be a whole number, found 4.5"),
        ({"method": "lego", "parameters": {"clusters": float("inf")}}, "clusters must be a whole number, found inf"),
        ({"method": "lego", "parameters": {"clusters": 2**64 - 1}}, r"clusters must be in \[0, 1e\+09\]"),
        ({"method": "ties", "parameters": {"lambda": 2**64 - 1}}, r"lambda must be in .*1e\+09\]"),
        ({"method": "ties", "parameters": {"lambda": float("inf")}}, r"lambda must be in .*1e\+09\]"),
        ({"method": "ties", "parameters": {"space": "factor", "normalise": "none"}}, "use product"),
        ({"method": "linear", "parameters": {"tau": 0.5}}, "linear has no parameter 'tau'; it takes space, truncate"),
    ],
)
def test_bad_parameters(values, message):
    with pytest.raises(RsgwmError, match=message):
        resolved(MergeOptions(**{"method": "rsgwm", **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"role": "Judge!"}, "role must be"),
        ({"weights": (1.0, float("nan"))}, "finite"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(RsgwmError, match=message):
        MergeOptions(**values)


def test_weights(make_adapter):
    adapters = [make_adapter(0), make_adapter(1)]
    with pytest.raises(RsgwmError, match="3 weights for 2 adapters"):
        merge(adapters, MergeOptions(weights=(1.0, 1.0, 1.0)))
    with pytest.raises(RsgwmError, match="must not sum to zero"):
        merge(adapters, MergeOptions("linear", weights=(1.0, -1.0)))
    difference = merge(adapters, MergeOptions("task_arithmetic", weights=(1.0, -1.0), rank=8))
    module = difference.modules()[0]
    expected = product(adapters[0], module) - product(adapters[1], module)
    np.testing.assert_allclose(product(difference, module), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "directions" not in method.needs])
def test_every_method_merges_two_and_is_repeatable(make_adapter, name):
    adapters = [make_adapter(0), make_adapter(1)]
    options = MergeOptions(name, seed=5)
    once, twice = merge(adapters, options), merge(adapters, options)
    assert all(mx.array_equal(value, twice.weights[key]).item() for key, value in once.weights.items())
    assert find_method(name).summary
    assert find_method(name).source


def test_an_adapter_that_is_given_twice_is_told(make_adapter, tmp_path):
    folder = make_adapter(1).save(tmp_path / "one")
    (tmp_path / "link").symlink_to(folder)
    other = make_adapter(2).save(tmp_path / "two")
    told = Pool.open([folder, tmp_path / "link", other]).warnings
    assert told == (f"given more than once, and counted as often: {folder.resolve()}",)
    assert Pool.open([folder, other]).warnings == ()


@pytest.mark.parametrize(("method", "stream"), [("rsgwm", "importances"), ("regmean", "grams")])
def test_a_stream_that_ends_early_never_makes_a_smaller_adapter(make_adapter, monkeypatch, method, stream):
    """What comes beside the updates comes for every module: a short one would leave the last modules unadapted."""
    adapters = [make_adapter(seed) for seed in range(2)]
    for adapter in adapters:
        adapter.directions = {f"draft/{name}.gram": mx.eye(a.shape[0]) for name, a, _ in adapter.factors()}
        adapter.directions_metadata = {"k": "0", "seed": "0", "tokens/draft": "50"}
    merge(adapters, MergeOptions(method=method, role="draft"))
    every = getattr(Pool, stream)
    monkeypatch.setattr(Pool, stream, lambda pool, of: list(every(pool, of))[:-1])
    with pytest.raises(ValueError, match="shorter"):
        merge(adapters, MergeOptions(method=method, role="draft"))


def test_importance_that_was_lost_is_not_to_be_collected(make_adapter, tmp_path):
    """What collects it would refuse the folder: the file is to be had back."""
    folders = [make_adapter(seed).save(tmp_path / str(seed)) for seed in range(2)]
    (folders[1] / "importance.safetensors").unlink()
    with pytest.raises(RsgwmError, match=r"1: importance\.safetensors is in the manifest but not in the folder"):
        merge(folders, MergeOptions("rsgwm"))
