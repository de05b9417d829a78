"""Decisions: the cost rule by hand, groups that go together, the rule without predictors, and what is carried out."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from math import log
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.probe.apply import apply
from mlx_rsgwm.probe.decide import (
    MERGE,
    PLAN,
    PRUNE,
    REWEIGHT,
    ROUTE,
    Choice,
    Decision,
    choose,
    decide,
    feasible,
    only_method,
    rule,
    shortfall,
)
from mlx_rsgwm.probe.models import Linear
from mlx_rsgwm.probe.predictor import Predictor
from mlx_rsgwm.probe.table import PairRow, Table


def table(retention, names="abcd"):
    """A table whose one feature is what the pair keeps."""
    rows = tuple(
        PairRow(pair, pair, 1, {"kept": retention(*pair), "task_vector_dot": 0.0, "task_vector_l2": 1.0})
        for pair in combinations(names, 2)
    )
    return Table({"adapters": dict.fromkeys(names, ""), "at": 1.0, "base": None}, rows)


def predictor(method="linear", shift=0.0, residuals=(0.0,), kind="ridge"):
    """Forecasts the feature and a shift."""
    model = Linear(np.zeros(1), np.ones(1), np.ones(1), shift)
    sets = [[["x", "y"], 1.0, 1.0 + residual] for residual in residuals]
    about = {"base": None, "at": 1.0, "utility": "nll", "target": "mean", "left_out": {}, "left_out_sets": sets}
    return Predictor(kind, method, ("kept",), model, 0.1, np.array([[-9.0, 9.0]]), about)


def test_the_expected_shortfall_by_hand():
    assert shortfall(0.90, np.zeros(1)) == pytest.approx(0.05)
    assert shortfall(0.90, np.array([-0.1, 0.1])) == pytest.approx(0.15 / 2)
    assert shortfall(1.2, np.array([-0.1, 0.1])) == 0


@pytest.mark.parametrize(
    ("kept", "action", "method"),
    [
        (0.96, MERGE, "linear"),  # above .95 nothing is lost by the plain merge
        (0.945, MERGE, "linear"),  # .005 lost, less than reweighting costs
        (0.93, REWEIGHT, "norm_equalised"),  # .02 against .01 + 0
        (0.85, PRUNE, "ties"),  # .10, .01 + .08, .02 + 0
        (0.60, ROUTE, ""),  # .35, .01 + .33, .02 + .25, .10
    ],
)
def test_the_action_of_least_cost_is_taken(kept, action, method):
    fitted = [predictor(), predictor("norm_equalised", 0.02), predictor("ties", 0.10)]
    chosen = choose(table(lambda *_: kept, "ab"), ("a", "b"), fitted)
    assert (chosen.action, chosen.method) == (action, method)
    costs = {
        MERGE: max(0, 0.95 - kept),
        REWEIGHT: 0.01 + max(0, 0.93 - kept),
        PRUNE: 0.02 + max(0, 0.85 - kept),
        ROUTE: 0.10,
    }
    assert {**chosen.others, action: chosen.cost} == pytest.approx(costs)
    if action != ROUTE:
        assert chosen.bound == pytest.approx(chosen.retention - 0.1)


def test_the_better_of_two_methods_stands_for_an_action():
    fitted = [predictor("linear", -0.2), predictor("rsgwm")]
    assert choose(table(lambda *_: 0.96, "ab"), ("a", "b"), fitted).method == "rsgwm"


def test_uncertainty_costs():
    sure, unsure = predictor(), predictor("rsgwm", 0.0, (-0.3, 0.3))
    assert choose(table(lambda *_: 0.96, "ab"), ("a", "b"), [unsure, sure]).method == "linear"


def test_adapters_that_go_together_are_grouped():
    """a, b and c, d merge well, the rest does not."""
    friends = ({"a", "b"}, {"c", "d"})
    pool = table(lambda i, j: 0.97 if {i, j} in friends else 0.3)
    decision = decide(pool, [predictor()])
    assert sorted(sorted(each.members) for each in decision.groups) == [["a", "b"], ["c", "d"]]
    assert [each.action for each in decision.pairs] == [MERGE, ROUTE, ROUTE, ROUTE, ROUTE, MERGE]
    everything = decide(table(lambda *_: 0.97), [predictor()])
    assert [each.members for each in everything.groups] == [tuple("abcd")]
    nothing = decide(table(lambda *_: 0.3), [predictor()])
    assert [each.members for each in nothing.groups] == [("a",), ("b",), ("c",), ("d",)]
    assert {each.action for each in nothing.groups} == {ROUTE}


def test_a_group_more_is_worth_what_routing_costs():
    """Two pairs lose nothing; all four together lose .04 each, .16, and spare two groups that are routed between."""
    friends = ({"a", "b"}, {"c", "d"})
    near, far = (table(lambda i, j, kept=kept: 0.97 if {i, j} in friends else kept) for kept in (0.88, 0.84))
    assert [each.members for each in decide(near, [predictor()]).groups] == [tuple("abcd")]  # 4 · .04 of .91
    assert len(decide(far, [predictor()]).groups) == 2  # 4 · .067 of .883


def test_adapters_that_merge_well_stay_together_whatever_their_number():
    # Joining two of three costs .06 each and spares one of three groups, .10; all three together spare them all.
    assert [each.members for each in decide(table(lambda *_: 0.89, "abc"), [predictor()]).groups] == [tuple("abc")]


def test_a_union_that_predictors_do_not_know_is_not_joined():
    small = replace(predictor(), features=("kept", "set_size"), ranges=np.array([[-9.0, 9.0], [2.0, 2.5]]),
                    model=Linear(np.zeros(2), np.ones(2), np.array([1.0, 0.0]), 0.0))  # fmt: skip
    decision = decide(table(lambda *_: 0.97), [small])  # set_size reaches 3 with the slack
    assert decision.predicted
    assert sorted(len(each.members) for each in decision.groups) in ([1, 3], [2, 2])


def test_what_cannot_be_merged_or_decided_on_is_refused():
    pool = table(lambda *_: 0.97, "ab")
    same = Table({**pool.about, "adapters": {"a": "x", "b": "x"}}, pool.rows)
    with pytest.raises(RsgwmError, match="a and b are the same adapter"):
        decide(same, [predictor()])
    with pytest.raises(RsgwmError, match=r"the table has no log_norm_ratio\.mean, which the rule goes by"):
        decide(pool)
    bare, whole = (SimpleNamespace(importance=has, directions=has) for has in ({}, {"a": 1}))
    fitted = [predictor("linear"), predictor("rsgwm"), predictor("regmean")]
    assert [each.method for each in feasible(fitted, [whole, bare])] == ["linear"]
    assert feasible(fitted, [whole, whole]) == fitted
    by_metric = [predictor("linear"), predictor("linear:truncate=metric")]  # which goes by directions
    assert feasible(by_metric, [bare]) == by_metric[:1]
    with pytest.raises(RsgwmError, match="no directions and importance, which every method with a predictor needs"):
        feasible(fitted[1:], [bare])
    with pytest.raises(RsgwmError, match="unknown method 'gone'"):
        feasible([predictor("gone")], [whole])
    endless = replace(predictor(), model=Linear(np.zeros(1), np.ones(1), np.full(1, 1e308), 1e308))
    with pytest.raises(RsgwmError, match="forecasts no number for a and b"):
        decide(table(lambda *_: 9.0, "ab"), [endless])
    huge = PairRow(("a", "b"), ("a", "b"), 1, {**measures().measures, "log_norm_ratio.mean": 1e6})
    assert rule(huge)[0] == REWEIGHT


def test_a_table_is_that_of_the_adapters():
    pool = Table({**table(lambda *_: 0.97).about, "adapters": dict(zip("abcd", "1234", strict=True))},
                 table(lambda *_: 0.97).rows)  # fmt: skip
    some = pool.chosen({"a": "1", "c": "3"}, 1.0)
    assert ([row.adapters for row in some.rows], [*some.about["adapters"]]) == ([("a", "c")], ["a", "c"])
    with pytest.raises(RsgwmError, match="measured without c as it is now"):
        pool.chosen({"a": "1", "c": "4"}, 1.0)
    with pytest.raises(RsgwmError, match="measured without e as it is now"):
        pool.chosen({"a": "1", "e": "5"}, 1.0)
    with pytest.raises(RsgwmError, match=r"at 1 of training, the adapters are at 0\.05"):
        pool.chosen({"a": "1"}, 0.05)


def test_one_stranger_is_left_out():
    pool = table(lambda i, j: 0.3 if "d" in (i, j) else 0.97)
    assert sorted(each.members for each in decide(pool, [predictor()]).groups) == [("a", "b", "c"), ("d",)]


def measures(ratio=1.0, opposed=0.1, amplified=1.0):
    return PairRow(
        ("a", "b"), ("a", "b"), 1,
        {"log_norm_ratio.mean": log(ratio), "sign_disagreement.mean": opposed, "overamplification.mean": amplified},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "action"),
    [
        (measures(), MERGE),
        (measures(ratio=3.1, opposed=0.5), REWEIGHT),
        (measures(ratio=2.9), MERGE),
        (measures(opposed=0.41), PRUNE),
        (measures(amplified=1.31), PRUNE),
    ],
)
def test_the_rule_without_predictors(row, action):
    assert rule(row)[0] == action
    about = {"adapters": {"a": "", "b": ""}, "at": 1.0, "base": None}
    decision = decide(Table(about, (row,)))
    assert (decision.predicted, decision.pairs[0].action, decision.pairs[0].retention) == (False, action, None)


def test_predictors_of_different_things_are_not_mixed():
    other = replace(predictor("ties"), about={**predictor().about, "utility": "tokens"})
    with pytest.raises(RsgwmError, match="forecast different things"):
        only_method([predictor(), other], "ridge")
    with pytest.raises(RsgwmError, match="no predictor is a trees; there are ridge"):
        only_method([predictor()], "trees")
    with pytest.raises(RsgwmError, match="another base"):
        decide(Table({**table(lambda *_: 1.0).about, "base": "x"}, table(lambda *_: 1.0).rows),
               [replace(predictor(), about={**predictor().about, "base": "y"})])  # fmt: skip


def test_groups_are_merged_and_the_rest_stays(make_adapter, tmp_path):
    adapters = {name: load_adapter(make_adapter(seed).save(tmp_path / name)) for seed, name in enumerate("abcde")}
    groups = (
        Choice(("a", "b"), PRUNE, "ties:density=0.5"),
        Choice(("c", "d"), REWEIGHT, PLAN),
        Choice(("e",), ROUTE),
    )
    places = apply(Decision(groups, (), True), adapters, tmp_path / "out")
    assert places == [str(tmp_path / "out/group-1"), str(tmp_path / "out/group-2"), "e"]
    expected = merge([adapters["a"], adapters["b"]], MergeOptions("ties", "draft", {"density": 0.5}))
    merged = load_adapter(places[0])
    assert all(np.allclose(np.array(merged.weights[n]), np.array(expected.weights[n])) for n in expected.weights)
    assert "plan" in load_adapter(places[1]).manifest["merge"]
    told = json.loads((tmp_path / "out" / "decision.json").read_text())
    assert [each["adapter"] for each in told["groups"]] == ["group-1", "group-2", "e"]


def test_a_merge_that_fails_leaves_nothing(make_adapter, tmp_path):
    adapters = {name: load_adapter(make_adapter(seed).save(tmp_path / name)) for seed, name in enumerate("ab")}
    with pytest.raises(RsgwmError, match="nosuch"):
        apply(Decision((Choice(("a", "b"), MERGE, "nosuch"),), (), True), adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()
