"""Merges that look at the adapters' inputs: cut to their rank in the metric of outputs, noted, refused."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.linalg.gram import Gram, WholeGram, float64, from_sketch, no_gram, test_matrix
from mlx_rsgwm.merging import compressed
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions, Override
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.merging.pool_metric import ModuleGrams
from mlx_rsgwm.models.adapter import Adapter, LoraSpec

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
INPUTS, OUTPUTS, RANK = 40, 30, 4


def adapter(seed: int, size: float = 1.0, modules: tuple[str, ...] = NAMES) -> Adapter:
    rng = np.random.default_rng(seed)
    weights = {}
    for name in modules:
        weights[f"{name}.lora_a"] = mx.array(rng.standard_normal((INPUTS, RANK)).astype(np.float32))
        weights[f"{name}.lora_b"] = mx.array((size * rng.standard_normal((RANK, OUTPUTS))).astype(np.float32))
    return Adapter(LoraSpec(RANK, 2.0, 0.0, ("self_attn.q_proj",), 2), weights, manifest={"kind": "trained"})


def moments(pool: Pool) -> list[dict[str, np.ndarray]]:
    """XᵀX / n of each adapter's modules, of rapidly falling eigenvalues."""
    moments = []
    for index, source in enumerate(pool.sources):
        rng = np.random.default_rng(100 + index)
        rows = {
            name: rng.standard_normal((200, INPUTS)) @ np.diag(0.9 ** np.arange(INPUTS)) @ ROTATION for name in NAMES
        }
        moments.append({name: rows[name].T @ rows[name] / 200 for name in NAMES if name in source.shapes})
    return moments


ROTATION = np.linalg.qr(np.random.default_rng(7).standard_normal((INPUTS, INPUTS)))[0]


def as_gram(moment: np.ndarray, columns: int) -> Gram:
    whole = mx.array(moment.astype(np.float32))
    if not columns:
        return WholeGram(float64(whole))
    test = test_matrix(INPUTS, columns, 0)
    return from_sketch(whole @ test, mx.diagonal(whole), test)


@pytest.fixture(params=[0, 8], ids=["whole", "sketched"])
def inputs(request, monkeypatch):
    """Pools have second moments, whole or as sketches."""

    def grams(pool, role):
        assert role in ("draft", "all")
        known = moments(pool)
        for name in pool.modules:
            yield tuple(as_gram(own[name], request.param) if name in own else no_gram(INPUTS) for own in known)

    monkeypatch.setattr(Pool, "grams", grams)


def product(merged: Adapter, name: str) -> np.ndarray:
    a, b = (np.array(merged.weights[f"{name}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    return merged.spec.scale * a @ b


def energy(moment: np.ndarray, update: np.ndarray) -> float:
    return float(np.trace(update.T @ moment @ update))


def errors(merged: Adapter, adapters: list[Adapter]) -> np.ndarray:
    """‖X_t (ΔW − ΔW_t)‖² / ‖X_t ΔW_t‖² by module and adapter, on the whole matrices."""
    known = moments(Pool.open(adapters))
    return np.array(
        [
            [
                energy(g[name], product(merged, name) - product(own, name)) / energy(g[name], product(own, name))
                for own, g in zip(adapters, known, strict=True)
            ]
            for name in NAMES
        ]
    )


@pytest.mark.parametrize("method", ["regmean", "linear", "ties", "dare_ties"])
def test_outputs_are_nearer_when_the_rank_is_cut_in_their_metric(inputs, method):
    adapters = [adapter(seed) for seed in range(3)]
    target = merge(adapters, MergeOptions(method, rank=3 * RANK if method in ("regmean", "linear") else OUTPUTS))
    cuts = {
        how: merge(adapters, MergeOptions(method, parameters={"truncate": how}, rank=3)) for how in ("metric", "plain")
    }
    known = moments(Pool.open(adapters))

    def away(merged: Adapter) -> float:
        return sum(
            energy(g[name], product(merged, name) - product(target, name)) / energy(g[name], product(own, name))
            for name in NAMES
            for own, g in zip(adapters, known, strict=True)
        )

    assert away(cuts["metric"]) < 0.9 * away(cuts["plain"])


def test_the_diagnosis_has_the_output_errors(inputs, request):
    adapters = [adapter(0), adapter(1, 8.0), adapter(2, 0.5)]
    merged = merge(adapters, MergeOptions("regmean", parameters={"balance": "relative"}, rank=5))
    rows = merged.manifest["merge"]["diagnosis"]["modules"]
    found = np.array([rows[name]["output_errors"] for name in NAMES])
    np.testing.assert_allclose(found, errors(merged, adapters), atol=0.06 if "sketched" in request.node.name else 1e-4)
    assert all(0 < rows[name]["output_discarded"] < 1 for name in NAMES)
    overall = merged.manifest["merge"]["diagnosis"]["overall"]
    np.testing.assert_allclose(overall["output_errors"], found.mean(axis=0), rtol=1e-5)


def test_balanced_adapters_of_unequal_norms_keep_more_of_the_small_one(inputs):
    adapters = [adapter(0), adapter(1, 8.0)]
    small = {
        how: errors(merge(adapters, MergeOptions("regmean", parameters={"balance": how})), adapters)[:, 0].mean()
        for how in ("relative", "equal")
    }
    assert small["relative"] < 0.6 * small["equal"]


def test_an_adapter_that_is_given_up_is_named(inputs):
    adapters = [replace(adapter(0), path=None), adapter(1, 8.0)]

    def told(how: str) -> list[str]:
        merged = merge(adapters, MergeOptions("regmean", parameters={"balance": how}))
        return [line for line in merged.manifest["merge"]["warnings"] if "little is left of the outputs" in line]

    assert len(told("equal")) == 1
    assert adapters[0].name in told("equal")[0]
    assert not told("relative")


def test_modules_computed_in_threads_are_the_same(inputs, monkeypatch):
    adapters = [adapter(0), adapter(1, 8.0), adapter(2)]
    threaded = merge(adapters, MergeOptions("regmean", rank=5))
    monkeypatch.setattr(compressed, "THREADED_ENTRIES", 0)
    alone = merge(adapters, MergeOptions("regmean", rank=5))
    for name, value in threaded.weights.items():
        np.testing.assert_array_equal(np.array(value), np.array(alone.weights[name]))
    assert threaded.manifest["merge"]["diagnosis"] == alone.manifest["merge"]["diagnosis"]


def test_an_adapter_without_the_module_leaves_it_to_the_others(inputs):
    adapters = [adapter(0), adapter(1, modules=NAMES[1:])]
    merged = merge(adapters, MergeOptions("regmean", rank=2 * RANK))
    np.testing.assert_allclose(product(merged, NAMES[0]), product(adapters[0], NAMES[0]), atol=1e-3)
    assert merged.manifest["merge"]["diagnosis"]["modules"][NAMES[0]]["output_errors"] == pytest.approx(
        [0, 0], abs=1e-6
    )


@pytest.mark.parametrize("method", ["regmean", "linear", "task_arithmetic"])
def test_negative_weights_are_no_weights_of_errors(inputs, method):
    options = MergeOptions(method, parameters={"truncate": "metric"}, weights=(1.0, -0.5))
    with pytest.raises(RsgwmError, match=f"{method} averages: weights must not be negative, found -0.5"):
        merge([adapter(0), adapter(1)], options)


def test_modules_are_not_cut_in_different_ways(inputs):
    options = MergeOptions("linear", overrides=(Override("0", {"truncate": "metric"}),))
    with pytest.raises(RsgwmError, match="truncate cannot differ between modules"):
        merge([adapter(0), adapter(1)], options)


@pytest.mark.parametrize("role", ["draft", "all"])
def test_a_mixture_of_roles_is_told(inputs, role):
    merged = merge([adapter(0), adapter(1)], MergeOptions("regmean", role=role))
    told = [line for line in merged.manifest["merge"]["warnings"] if "directions of its own" in line]
    expected = "role all has no directions of its own: those of all roles count, by their tokens"
    assert told == ([expected] if role == "all" else [])


def test_directions_of_some_modules_only():
    def with_directions(seed: int, names: tuple[str, ...]) -> Adapter:
        about = {"k": "0", "seed": "0", "tokens/draft": "50"}
        return replace(
            adapter(seed),
            directions={f"draft/{name}.gram": mx.eye(INPUTS) for name in names},
            directions_metadata=about,
        )

    adapters = [with_directions(0, NAMES), with_directions(1, NAMES[:1])]
    with pytest.raises(RsgwmError, match=r"needs directions of every module: .* has none of model\.layers\.1"):
        merge(adapters, MergeOptions("regmean"))
    mean = merge(
        [with_directions(0, NAMES), with_directions(1, NAMES)],
        MergeOptions("regmean", parameters={"balance": "equal"}, rank=2 * RANK),
    )
    for name in NAMES:
        np.testing.assert_allclose(
            product(mean, name), (product(adapter(0), name) + product(adapter(1), name)) / 2, atol=1e-4
        )


def test_directions_of_another_width_are_refused():
    grams = ModuleGrams([{"m": no_gram(8)}, {"m": no_gram(9)}], "m", 8)
    assert grams[0].width == 8
    with pytest.raises(RsgwmError, match="directions of m are of 9 inputs, and it has 8; collect them anew"):
        grams[1]
