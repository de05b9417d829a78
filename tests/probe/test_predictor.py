"""Predictors: they find what was planted, nothing in noise, keep tasks apart, hold their bounds, and refuse."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.probe import models
from mlx_rsgwm.probe import predictor as predictors
from mlx_rsgwm.probe.features import examples_of, set_features, sum_amplification
from mlx_rsgwm.probe.fingerprints import agreement, fingerprint
from mlx_rsgwm.probe.models import Linear, Trees, fit_fingerprint, fit_ridge, fit_trees
from mlx_rsgwm.probe.outcomes import BASE, SINGLE, OutcomeRow, Outcomes, Scores
from mlx_rsgwm.probe.predictor import Predictor, read_predictors
from mlx_rsgwm.probe.table import PairRow, Table
from mlx_rsgwm.probe.validation import (
    left_out_predictions,
    lower_margin,
    permutation_share,
    r_squared,
    spearman,
    validate,
)

NAMES = ("task_vector_cosine", "task_vector_norm_ratio", "task_vector_l2", "task_vector_dot", "sign_disagreement.mean",
         "left_subspace_overlap")  # fmt: skip


def fit_predictor(table, outcomes, method, kind="ridge", permutations=2):
    """The null is what takes long."""
    return predictors.fit_predictor(table, outcomes, method, kind, permutations=permutations, resamples=200)


def study(tasks=8, seed=0, noise=0.02, signal=1.0, sets=()):
    """A pool whose pairs' retention is .9 + .1 · a measure − .05 · another + noise, as table and outcomes."""
    rng = np.random.default_rng(seed)
    names = [f"pool/{place}" for place in range(tasks)]
    rows, merges = [], {}
    quality = {}
    for pair in combinations(names, 2):
        values = dict(zip(NAMES, rng.uniform(-1, 1, len(NAMES)).tolist(), strict=True))
        values["task_vector_l2"] = 2 + values["task_vector_l2"]
        rows.append(PairRow(pair, (pair[0][5:], pair[1][5:]), 4, values))
        drawn = 0.1 * values["sign_disagreement.mean"] - 0.05 * values["left_subspace_overlap"]
        quality[frozenset(pair)] = 0.9 + signal * drawn + noise * rng.standard_normal()
    for name in names:
        merges[frozenset((name,)), BASE] = OutcomeRow((name,), BASE, {name: Scores(20.0, 0, 10)})
        merges[frozenset((name,)), SINGLE] = OutcomeRow(
            (name,), SINGLE, {name: Scores(10.0, 0, 10, margins={"nll": 0.1})}
        )
    for members in [*combinations(names, 2), *(tuple(names[place] for place in each) for each in sets)]:
        kept = np.mean([quality[frozenset(pair)] for pair in combinations(members, 2)])
        scores = {name: Scores(10.0 * (1 - np.log(kept)), 0, 10) for name in members}
        merges[frozenset(members), "linear"] = OutcomeRow(members, "linear", scores)
    about = {"base": "b" * 64, "at": 1.0, "adapters": dict.fromkeys(names, ""), "data": None}
    return Table(about, tuple(rows)), Outcomes({"adapters": dict.fromkeys(names, ""),
                                                "tasks": {name: name[5:] for name in names}}, merges)  # fmt: skip


def test_examples_join_the_table_and_the_outcomes():
    table, outcomes = study(sets=[(0, 1, 2)])
    examples = examples_of(table, outcomes, "linear", "nll")
    assert (len(examples.y), examples.sets[0], examples.tasks[0]) == (29, ("pool/0", "pool/1"), frozenset("01"))
    row = table.by_pair()[frozenset(("pool/0", "pool/1"))]
    assert examples.x[0][examples.features.index("left_subspace_overlap")] == row.measures["left_subspace_overlap"]
    three = [table.by_pair()[frozenset(pair)] for pair in combinations(("pool/0", "pool/1", "pool/2"), 2)]
    values = [each.measures["task_vector_cosine"] for each in three]
    triple = dict(zip(examples.features, examples.x[-1], strict=True))
    assert triple["task_vector_cosine"] == pytest.approx(np.mean(values))
    assert triple["task_vector_cosine|least"] == min(values)
    assert triple["task_vector_cosine|most"] == max(values)
    assert triple["set_size"] == 3
    with pytest.raises(RsgwmError, match="no method 'ties'; they have linear"):
        examples_of(table, outcomes, "ties", "nll")
    with pytest.raises(RsgwmError, match="too few sets to fit to: 1 merged by linear, at least 8"):
        examples_of(table, outcomes, "linear", "nll", size=3)


def test_amplification_of_a_set_is_that_of_its_sum():
    rng = np.random.default_rng(0)
    updates = rng.standard_normal((4, 30))
    rows = [
        PairRow(("a", "b"), ("a", "b"), 1, {"task_vector_dot": a @ b, "task_vector_l2": np.linalg.norm(a - b)})
        for a, b in combinations(updates, 2)
    ]
    expected = np.linalg.norm(updates.sum(axis=0)) / np.sqrt(np.square(updates).sum())
    assert sum_amplification(rows, 4) == pytest.approx(expected)


def test_ridge_is_scikit_learns_on_standardised_features():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 5)) * [1, 10, 0.1, 3, 0] + 2
    y = x[:, 0] - 0.1 * x[:, 1] + 0.01 * rng.standard_normal(40)
    model = fit_ridge(x, y)
    scaled = (x[:, :4] - x[:, :4].mean(axis=0)) / x[:, :4].std(axis=0)
    assert np.allclose(model.predict(x), Ridge(0.1).fit(scaled, y).predict(scaled))
    assert model.beta[4] == 0
    again = Linear.from_dict(json.loads(json.dumps(model.to_dict())))
    assert np.array_equal(again.predict(x), model.predict(x))


def test_trees_kept_as_text_are_scikit_learns():
    from sklearn.ensemble import GradientBoostingRegressor

    rng = np.random.default_rng(0)
    x, fresh = rng.standard_normal((60, 4)), rng.standard_normal((30, 4))
    y = np.sign(x[:, 0]) + 0.1 * x[:, 1]
    model = fit_trees(x, y)
    peer = GradientBoostingRegressor(
        n_estimators=100, max_depth=2, learning_rate=0.05, subsample=0.5, min_samples_leaf=3, random_state=0
    ).fit(x.astype(np.float32), y)
    again = Trees.from_dict(json.loads(json.dumps(model.to_dict())))
    assert np.allclose(again.predict(fresh), peer.predict(fresh.astype(np.float32)))
    broken = model.to_dict()
    broken["nodes"][0][0][2] = 0.0  # a node that is its own child
    with pytest.raises(ValueError, match="out of order"):
        Trees.from_dict(broken)


def test_the_fingerprint_finds_what_was_planted():
    rng = np.random.default_rng(1)
    x = rng.uniform(-3, 3, (190, 28))
    y = x[:, 3] - 0.6 * x[:, 7] + 0.5 * rng.standard_normal(190)
    model = fit_fingerprint(x, y)
    top = np.argsort(-abs(model.beta))[:2]
    assert top.tolist() == [3, 7]
    assert (model.beta[3] > 0, model.beta[7] < 0) == (True, True)
    assert np.count_nonzero(model.beta) < 14  # L1 leaves few of the 26 others
    assert pearsonr(model.predict(x), y)[0] > 0.9
    plain = fit_fingerprint(x, y, 0.0)
    exact = np.linalg.lstsq(np.c_[x, np.ones(190)], y, rcond=None)[0]
    best = pearsonr(x @ exact[:-1], y)[0]  # least squares has the highest correlation of all
    assert pearsonr(plain.predict(x), y)[0] == pytest.approx(best, abs=2e-3)


def test_the_gradient_of_the_fingerprints_loss():
    """Against finite differences: one step of Adam goes the way of the sign of the gradient."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal(30)
    beta = models._correlating(x, y, 0.0)

    def loss(given):
        return -pearsonr(x @ given, y)[0]

    slope = [(loss(beta + d) - loss(beta - d)) / 2e-5 for d in 1e-5 * np.eye(4)]
    assert np.abs(slope).max() < 0.05 / np.linalg.norm(beta)


def test_a_left_out_task_is_in_no_set_that_is_fitted_to():
    table, outcomes = study(tasks=5)
    examples = examples_of(table, outcomes, "linear", "nll")
    seen = []

    def fit(x, y):
        seen.append(set(map(tuple, x)))
        return fit_ridge(x, y)

    left_out_predictions(examples, fit)
    assert len(seen) == 5
    for task, rows in zip("01234", seen, strict=True):
        without = {tuple(row) for row, tasks in zip(examples.x, examples.tasks, strict=True) if task not in tasks}
        assert rows == without


def test_predictions_find_a_signal_and_its_absence():
    table, outcomes = study(tasks=9)
    fitted = fit_predictor(table, outcomes, "linear", permutations=60)
    checked = fitted.validation
    assert checked.spearman.value > 0.85
    assert checked.spearman.low > 0.6
    assert checked.above_best.low > 0
    assert checked.null < 0.02
    assert checked.auc.value > 0.8
    nothing = validate(examples_of(*study(tasks=9, signal=0.0), "linear", "nll"), fit_ridge, permutations=30)
    assert nothing.null > 0.1
    assert nothing.spearman.low < 0.2
    assert nothing.r_squared.value < 0.15


def test_figures_are_those_of_scipy():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal(20), rng.standard_normal(20)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y)[0])
    assert r_squared(y.mean() * np.ones(20), y) == pytest.approx(0)
    assert np.isnan(spearman(np.ones(20), y))
    assert np.isnan(r_squared(x[:3], np.full(3, 0.1)))  # whose mean is not .1


def test_permutation_of_adapters_needs_more_than_one_lucky_pair():
    examples = examples_of(*study(tasks=6), "linear", "nll")
    assert permutation_share(examples, fit_ridge, 2.0, 0, 20) == pytest.approx(1 / 21)
    assert permutation_share(examples, fit_ridge, -2.0, 0, 20) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_of_new_sets(seed):
    table, outcomes = study(tasks=9, seed=seed, noise=0.05)
    fitted = fit_predictor(table, outcomes, "linear").predictor
    fresh_table, fresh = study(tasks=9, seed=seed + 50, noise=0.05)
    covered = []
    for merged in fresh.retentions():
        forecast = Predictor(**{**vars(fitted), "ranges": fitted.ranges + np.array([-9, 9])}).forecast(
            fresh_table, merged.members
        )
        covered.append(merged.mean >= forecast.low)
    assert 0.65 <= np.mean(covered) < 1


def test_the_conformal_quantile_by_hand():
    predicted, measured = np.zeros(9), -np.arange(1.0, 10.0)  # each is 1, 2, … 9 too high
    assert lower_margin(predicted, measured, 0.8) == 8
    assert lower_margin(predicted[:3], measured[:3], 0.8) == float("inf")


def test_a_predictor_is_read_back_and_refuses_what_it_does_not_know(tmp_path):
    table, outcomes = study(sets=[(0, 1, 2), (3, 4, 5)])
    for kind in ("ridge", "trees", "blend", "fingerprint"):
        predictor = fit_predictor(table, outcomes, "linear", kind).predictor
        path = tmp_path / f"linear.{kind}.predictor.json"
        predictor.save(path)
        again = Predictor.load(path)
        members = ("pool/0", "pool/3")
        assert again.forecast(table, members) == predictor.forecast(table, members)
        assert again.about["left_out"]["sets"] == (28 if kind == "fingerprint" else 30)
    assert len(read_predictors(tmp_path)) == 4
    with pytest.raises(RsgwmError, match="fitted on another base"):
        again.forecast(Table({**table.about, "base": "c" * 64}, table.rows), members)
    with pytest.raises(RsgwmError, match=r"fitted at 1 of training, the table is at 0\.05"):
        again.forecast(Table({**table.about, "at": 0.05}, table.rows), members)
    with pytest.raises(RsgwmError, match="no row of pool/0 and other"):
        again.forecast(table, ("pool/0", "other"))
    without = tuple(
        PairRow(row.adapters, row.tasks, 1, {"task_vector_dot": 1.0, "task_vector_l2": 1.0}) for row in table.rows
    )
    with pytest.raises(RsgwmError, match="fitted on other measures: the table has no task_vector"):
        again.forecast(Table(table.about, without), members)
    far = tuple(PairRow(row.adapters, row.tasks, 1, {**row.measures, "task_vector_cosine": 9.0}) for row in table.rows)
    with pytest.raises(RsgwmError, match="far outside what the predictor was fitted to: task_vector_cosine is 9"):
        again.forecast(Table(table.about, far), members)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "x"},
        {"model": "forest"},
        {"features": ["a"]},
        {"ranges": [[0]]},
        {"about": {}},
        {"margin": float("nan")},
        {"ranges": [[1, 0]]},
        {"fitted": {"centre": [0], "spread": [0], "beta": [0], "intercept": 1}},
        {"fitted": 7},
    ],
)
def test_a_damaged_predictor_is_one_line(tmp_path, change):
    path = tmp_path / "a.predictor.json"
    fit_predictor(*study(), "linear").predictor.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RsgwmError, match="predictor"):
        Predictor.load(path)
    with pytest.raises(RsgwmError, match="holds no predictor"):
        read_predictors(tmp_path / "nothing")


def test_too_few_tasks_are_refused():
    table, outcomes = study(tasks=5)
    examples = examples_of(table, outcomes, "linear", "nll")
    same = type(examples)(examples.features, examples.x, examples.y, examples.sets, (frozenset("a"),) * 10)
    with pytest.raises(RsgwmError, match="too few sets to leave a task out: 10 sets of 1 tasks leave 0 without a"):
        left_out_predictions(same, fit_ridge)


def test_overlap_and_sign_agreement_by_hand():
    prints = {
        "linear": {"a": 3.0, "b": -2.0, "c": 1.0, "d": 0.5, "e": 0.4, "f": 0.1},
        "ties": {"a": 2.0, "b": 2.0, "x": 1.0, "y": 0.5, "z": 0.4},
    }
    common = agreement(prints)
    assert (common.overlap, common.signs, common.pairs) == (2 / 5, 1 / 2, 1)
    assert agreement({"linear": prints["linear"], "ties": {}}) is None


def test_a_fingerprint_is_of_the_28_and_of_pairs():
    predictor = fit_predictor(*study(sets=[(0, 1, 2)]), "linear", "fingerprint").predictor
    assert "sign_disagreement.mean" not in predictor.features
    assert next(iter(fingerprint(predictor))) == "left_subspace_overlap"
    assert fingerprint(predictor)["left_subspace_overlap"] < 0


def test_features_of_a_pair_do_not_depend_on_its_order():
    table, _ = study()
    both = [set_features(members, table.by_pair(), NAMES) for members in (("pool/0", "pool/4"), ("pool/4", "pool/0"))]
    assert both[0] == both[1]
