"""Modules of a merge that are treated in another way: parameters, weights, methods and ranks of their own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions, Override


def product(adapter, module):
    a, b = (np.array(adapter.weights[f"{module}.{leaf}"]) for leaf in ("lora_a", "lora_b"))
    return adapter.spec.scale * a @ b


def test_an_override_changes_its_modules_only(make_adapter):
    adapters = [make_adapter(0), make_adapter(1)]
    plain = merge(adapters, MergeOptions("linear"))
    module, *others = plain.modules()
    override = Override(f"^{module}$".replace(".", r"\."), weights=(1.0, 0.0))
    changed = merge(adapters, MergeOptions("linear", overrides=(override,)))
    np.testing.assert_allclose(product(changed, module), product(adapters[0], module), rtol=1e-4, atol=1e-5)
    for other in others:
        assert mx.array_equal(changed.weights[f"{other}.lora_b"], plain.weights[f"{other}.lora_b"]).item()


def test_modules_have_methods_of_their_own(make_adapter):
    adapters = [make_adapter(0), make_adapter(1)]
    module, *others = merge(adapters, MergeOptions("linear")).modules()
    pattern = f"^{module}$".replace(".", r"\.")
    mixed = merge(adapters, MergeOptions("linear", overrides=(Override(pattern, {"density": 0.4}, (2, 1), "ties"),)))
    by_ties = merge(adapters, MergeOptions("ties", parameters={"density": 0.4}, weights=(2, 1)))
    by_mean = merge(adapters, MergeOptions("linear"))
    assert mx.array_equal(mixed.weights[f"{module}.lora_b"], by_ties.weights[f"{module}.lora_b"]).item()
    for other in others:
        assert mx.array_equal(mixed.weights[f"{other}.lora_b"], by_mean.weights[f"{other}.lora_b"]).item()
    (described,) = mixed.manifest["merge"]["overrides"]
    told = {"pattern": pattern, "method": "ties", "parameters": {"density": 0.4}, "weights": [2, 1]}
    assert described == told


def test_updates_are_brought_to_a_rank_before_they_are_merged(make_adapter):
    adapters = [make_adapter(0), make_adapter(1)]
    merged = merge(adapters, MergeOptions("linear", rank=8, overrides=(Override("", ranks=(1, 2)),)))
    for module in merged.modules():
        expected = np.zeros(product(merged, module).shape)
        for adapter, rank in zip(adapters, (1, 2), strict=True):
            u, sigma, vt = np.linalg.svd(product(adapter, module).astype(np.float64), full_matrices=False)
            expected += (u[:, :rank] * sigma[:rank]) @ vt[:rank] / 2
        np.testing.assert_allclose(product(merged, module), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (Override("q_proj", method="rsgwm"), "rsgwm looks at more than single modules"),
        (Override("q_proj", method="norm_equalised"), "norm_equalised looks at more than single modules"),
        (Override("q_proj", {"tau": 0.5}, method="ties"), "ties has no parameter 'tau'"),
        (Override("q_proj", weights=(1.0, -1.0), method="linear"), "weights must not sum to zero"),
        (Override("q_proj", ranks=(4,)), "1 ranks for 2 adapters"),
        (Override("nowhere"), "'nowhere' finds no module"),
        (Override("q_proj", {"space": "factor"}), "space cannot differ between modules"),
        (Override("q_proj", {"tua": 0.5}), "linear has no parameter 'tua'"),
        (Override("q_proj", {}, (1.0,)), "1 weights for 2 adapters"),
    ],
)
def test_bad_overrides(make_adapter, override, message):
    with pytest.raises(RsgwmError, match=message):
        merge([make_adapter(0), make_adapter(1)], MergeOptions("linear", overrides=(override,)))


def test_an_override_must_be_a_pattern():
    with pytest.raises(RsgwmError, match="must be at least 1"):
        Override("q_proj", ranks=(0, 2))
    with pytest.raises(RsgwmError, match="not a regular expression"):
        Override("(")
