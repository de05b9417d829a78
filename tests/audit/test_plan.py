"""Plans: what is recommended for each verdict, the file there and back, and a merge that does as it says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import yaml

from mlx_rsgwm.audit.carry_out import merge_by_plan
from mlx_rsgwm.audit.pair_audit import ModulePair, PairAudit
from mlx_rsgwm.audit.plan import ModulePlan, Plan, PlannedAdapter, plan_of, read_plan
from mlx_rsgwm.audit.pool_audit import PoolAudit, audit
from mlx_rsgwm.audit.verdicts import PRESETS, verdict_of
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions


def pair(overlap, agreement=0.0, norms=(1.0, 1.0), ranks=(8, 8), energy_ranks=(4, 4)):
    """One module of two adapters with these measures, judged."""
    ratio = max(norms) / min(norms)
    verdict = verdict_of(overlap, agreement, {"frobenius_ratio": ratio, "magnitude_ratio": ratio}, PRESETS["post"])
    cosines = (overlap,) * 4
    return ModulePair(
        "m", ranks, energy_ranks, norms, norms, (2.0, 2.0), cosines, 0.5, agreement, agreement, 0.0, 0.1, verdict
    )


def planned(measured, compat=False):
    audited = audit_like([measured])
    return plan_of(audited, compat).modules["m"]


def audit_like(pairs, count=2):
    adapters = tuple(SimpleNamespace(label=f"a{n}", fingerprint=str(n), rank=8) for n in range(count))
    positions = [(0, 1), (0, 2), (1, 2)]
    made = tuple(PairAudit(*place, (each,)) for place, each in zip(positions, pairs, strict=False))
    return PoolAudit(adapters, made, PRESETS["post"])


@pytest.mark.parametrize(
    ("measured", "method", "density", "compat_method", "compat_density"),
    [
        (pair(0.1), "linear", None, "linear", None),
        (pair(0.8, 0.9), "ties", 1 - (0.1 + 0.4 * 0.3 / 0.5), "ties", 1.0),
        (pair(0.51, 0.9), "ties", 1 - (0.1 + 0.4 * 0.01 / 0.5), "ties", 1.0),
        (pair(0.8, -0.9), "dare_ties", 1 - (0.15 + 0.35), "ties", 0.8),
    ],
)
def test_each_verdict_has_its_method(measured, method, density, compat_method, compat_density):
    for compat, expected in ((False, (method, density)), (True, (compat_method, compat_density))):
        module = planned(measured, compat)
        assert module.method == expected[0]
        assert module.density == (None if expected[1] is None else pytest.approx(expected[1]))
        assert module.weights == (0.5, 0.5)


def test_unequal_norms_are_balanced_as_published():
    module = planned(pair(0.1, norms=(20.0, 1.0)))
    assert module.method == "linear"
    assert module.weights == pytest.approx((1 / 21, 20 / 21), abs=1e-6)


def test_an_adapter_that_uses_little_of_its_rank_is_compressed_first():
    assert planned(pair(0.8, 0.9, ranks=(64, 8), energy_ranks=(10, 4))).ranks == (11, 8)
    assert planned(pair(0.8, 0.9, ranks=(64, 64), energy_ranks=(2, 40))).ranks == (4, 8)
    assert planned(pair(0.4, 0.9, ranks=(64, 64), energy_ranks=(2, 2))).ranks == ()


def test_of_three_the_worst_pair_of_a_module_decides():
    module = plan_of(audit_like([pair(0.1), pair(0.8, 0.9), pair(0.8, -0.9)], 3)).modules["m"]
    assert module.method == "dare_ties"
    assert module.reason.startswith("a1 and a2: conflicting")
    assert module.weights == pytest.approx((1 / 3,) * 3)
    balanced = plan_of(audit_like([pair(0.1, norms=(1, 10)), pair(0.1, norms=(1, 2)), pair(0.1, norms=(10, 2))], 3))
    assert balanced.modules["m"].weights == pytest.approx(np.array([1, 1 / 10, 1 / 2]) / 1.6, abs=1e-6)


def test_a_plan_is_read_as_it_was_written(unlike, tmp_path):
    plan = plan_of(audit([adapter.save(tmp_path / f"a{index}") for index, adapter in enumerate(unlike[:3])]))
    plan.save(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan
    text = (tmp_path / "plan.yaml").read_text(encoding="utf-8")
    assert text.startswith("# A merge plan")


def test_a_fingerprint_that_begins_like_a_number_stays_a_text(tmp_path):
    plan = Plan((PlannedAdapter("a", "45e05d0a"), PlannedAdapter("b", "1e5f")), {"m": ModulePlan("linear", (0.5, 0.5))})
    plan.save(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan


def test_a_merge_by_plan_is_the_merge_that_it_says(unlike, tmp_path):
    folders = [adapter.save(tmp_path / f"a{index}") for index, adapter in enumerate(unlike[:2])]
    plan = plan_of(audit(folders))
    first = next(iter(plan.modules))
    changed = replace(plan, modules={**plan.modules, first: ModulePlan("ties", (2.0, 1.0), 0.5, (), "by hand")})
    merged = merge_by_plan(changed, options=MergeOptions(role="verify", rank=8))
    by_ties = merge(folders, MergeOptions("ties", parameters={"density": 0.5}, weights=(2.0, 1.0), rank=8))
    assert mx.array_equal(merged.weights[f"{first}.lora_b"], by_ties.weights[f"{first}.lora_b"]).item()
    for name, module in list(plan.modules.items())[1:]:
        balanced = merge(folders, MergeOptions("linear", weights=module.weights, rank=8))
        assert mx.allclose(merged.weights[f"{name}.lora_b"], balanced.weights[f"{name}.lora_b"], rtol=1e-5).item()
    told = merged.manifest["merge"]
    assert told["plan"][first] == "by hand"
    assert told["role"] == "verify"
    assert 0 < told["outcome"]["truncated"]["q_min"] <= 1


def test_adapters_are_known_by_what_they_hold_and_not_by_their_order(unlike, tmp_path):
    folders = [adapter.save(tmp_path / f"a{index}") for index, adapter in enumerate(unlike[:2])]
    plan = plan_of(audit(folders))
    moved = [folders[1].rename(tmp_path / "elsewhere"), folders[0]]
    for name, array in merge_by_plan(plan, moved).weights.items():
        assert mx.array_equal(array, merge_by_plan(plan, [moved[1], moved[0]]).weights[name]).item()
    with pytest.raises(RsgwmError, match=r"a1"):
        merge_by_plan(plan)


def test_other_adapters_than_the_plans_are_refused_by_name(unlike, tmp_path):
    folders = [adapter.save(tmp_path / f"a{index}") for index, adapter in enumerate(unlike[:3])]
    plan = plan_of(audit(folders[:2]))
    with pytest.raises(RsgwmError, match=r"a1 of the plan is not among.*a2 is not in the plan"):
        merge_by_plan(plan, [folders[0], folders[2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": {}}, "names no module"),
        ({"modules": None}, "modules"),
        ({"kind": "recipe"}, "kind is merge-plan"),
        ({"adapters": [{"adapter": "a"}]}, "at least two adapters"),
        ({"modules": {"m": {"method": "linear", "weights": [1.0]}}}, "m has 1 weights for 2 adapters"),
        ({"modules": {"m": {"method": "linear", "weights": [1, 1], "ranks": [2]}}}, "m has 1 ranks for 2 adapters"),
        ({"modules": {"m": {"method": "linear", "weights": [1, 1], "densty": 0.5}}}, "densty"),
        ({"modules": {"m": {"method": "linear", "weights": "heavy"}}}, "weights"),
        ({"module": {}}, "module"),
    ],
)
def test_a_damaged_plan_is_refused_by_what_is_wrong(tmp_path, change, message):
    plan = Plan((PlannedAdapter("a", "1"), PlannedAdapter("b", "2")), {"m": ModulePlan("linear", (0.5, 0.5))})
    plan.save(tmp_path / "plan.yaml")
    values = yaml.safe_load((tmp_path / "plan.yaml").read_text(encoding="utf-8")) | change
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(RsgwmError, match=message) as raised:
        read_plan(tmp_path / "plan.yaml")
    assert "plan.yaml" in str(raised.value)


def test_a_plan_with_an_unknown_method_or_module_is_refused(unlike, tmp_path):
    folders = [adapter.save(tmp_path / f"a{index}") for index, adapter in enumerate(unlike[:2])]
    plan = plan_of(audit(folders))
    for modules, message in (
        ({"model.nowhere": ModulePlan("linear", (0.5, 0.5))}, "finds no module"),
        ({next(iter(plan.modules)): ModulePlan("tise", (0.5, 0.5))}, "did you mean 'ties'"),
    ):
        with pytest.raises(RsgwmError, match=message):
            merge_by_plan(replace(plan, modules=modules))
