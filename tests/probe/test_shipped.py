"""The predictors that come with the package: where they come from, where they speak, and where the rule does."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_rsgwm.probe.features import set_features
from mlx_rsgwm.probe.predictor import Predictor
from mlx_rsgwm.probe.shipped import FOLDER, decide_by_default, shipped_predictors
from mlx_rsgwm.probe.table import PairRow, Table

FILES = sorted(FOLDER.glob("at-*/*.json"))
NAMES = ("a", "b", "c")
ACTION_COSTS = {"linear": 0, "rsgwm": 0, "regmean": 0, "norm_equalised": 0.01, "ties": 0.02, "dare_ties": 0.02}


def middle(at, **more):
    """A table of three adapters, each of whose measures lies in the middle of what the predictors were fitted to."""
    predictor = Predictor.load(next(file for file in FILES if file.parent.name == f"at-{at:g}"))
    measures = {"task_vector_dot": 0.0, "task_vector_l2": 1.0}
    for feature, (low, high) in zip(predictor.features, predictor.ranges, strict=True):
        measures.setdefault(feature.partition("|")[0], (low + high) / 2)
    rows = tuple(PairRow(pair, pair, 1, measures) for pair in combinations(NAMES, 2))
    about = {"adapters": dict.fromkeys(NAMES, ""), "at": at, "base": predictor.about["base"], **more}
    return Table(about, rows), predictor


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_each_says_what_it_was_fitted_to(file):
    about = Predictor.load(file).about
    assert (len(about["tasks"]), about["sets"] >= 2 * 66) == (12, True)
    assert file.parent.name == f"at-{about['at']:g}"
    assert about["base"]
    assert {"spearman", "permutation_p", "baselines", "above_best_baseline"} <= set(about["left_out"])
    assert all(name.partition("/")[0] in "01" for members, *_ in about["left_out_sets"] for name in members)
    assert "fisher_overlap" not in file.read_text(encoding="utf-8")  # which adapters of others have not


def test_every_method_has_one_at_either_share():
    by_share = {folder: {file.name for file in FILES if file.parent == folder} for folder in {f.parent for f in FILES}}
    first, second = by_share.values()
    assert first == second
    assert len(first) == 6


@pytest.mark.parametrize("at", [0.05, 1.0])
def test_they_decide_where_they_were_fitted(at):
    table, _ = middle(at)
    assert len(shipped_predictors(table)) == 6
    decision = decide_by_default(table)
    assert (decision.predicted, decision.reason) == (True, "")
    known = set_features(("a", "b"), table.by_pair(), table.columns)
    costs = {"": 0.10}  # routing
    for each in shipped_predictors(table):
        x = np.array([known[name] for name in each.features])
        by_hand = ((x - each.model.centre) / each.model.spread) @ each.model.beta + each.model.intercept
        assert each.forecast(table, ("a", "b")).value == pytest.approx(by_hand)
        costs[each.method] = ACTION_COSTS[each.method] + np.maximum(0.95 - by_hand - each.residuals, 0).mean()
    assert decision.pairs[0].method == min(costs, key=costs.get)
    assert decision.pairs[0].cost == pytest.approx(min(costs.values()))


def test_methods_that_need_what_is_not_there_are_left_out():
    table, _ = middle(1.0)

    def methods(importance, directions, table=table):
        adapters = [SimpleNamespace(importance={"a": 1}, directions={"a": 1}),
                    SimpleNamespace(importance=importance, directions=directions)]  # fmt: skip
        return {each.method for each in shipped_predictors(table, adapters)}

    everything = {"linear", "ties", "dare_ties", "norm_equalised", "rsgwm", "regmean"}
    assert methods({"a": 1}, {"a": 1}) == everything
    assert methods({}, {"a": 1}) == everything - {"rsgwm"}
    assert methods({"a": 1}, {}) == everything - {"regmean"}
    assert methods({}, {}, middle(0.05)[0]) == everything - {"rsgwm", "regmean"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": "another"}, "fitted on another base"),
        ({"base": None}, "do not say which weights"),
        ({"at": 0.5}, "fitted at 0.05 and 1 of training, not at 0.5"),
    ],
)
def test_elsewhere_the_rule_decides_and_says_why(change, reason):
    table, _ = middle(1.0)
    measures = {**table.rows[0].measures, "log_norm_ratio.mean": 0.0, "sign_disagreement.mean": 0.1,
                "overamplification.mean": 1.0}  # fmt: skip
    rows = tuple(PairRow(row.adapters, row.tasks, 1, measures) for row in table.rows)
    decision = decide_by_default(Table({**table.about, **change}, rows))
    assert not decision.predicted
    assert reason in decision.reason


def test_far_outside_its_measures_the_rule_decides():
    table, predictor = middle(1.0)
    name = next(name for name in predictor.features if "|" not in name)
    low, high = predictor.ranges[predictor.features.index(name)]
    measures = {"log_norm_ratio.mean": 0.0, "sign_disagreement.mean": 0.1, "overamplification.mean": 1.0}
    measures = {**table.rows[0].measures, **measures, name: high + 5 * (high - low)}
    decision = decide_by_default(
        Table(table.about, tuple(PairRow(r.adapters, r.tasks, 1, measures) for r in table.rows))
    )
    assert not decision.predicted
    assert "far outside what the predictor was fitted to" in decision.reason
