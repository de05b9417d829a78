"""Measures of pairs: against dense float64 references, and against values computed by hand."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, sqrt

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.linalg.spectrum import Decompositions
from mlx_rsgwm.probe import module_pair
from mlx_rsgwm.probe.measure import measure_pairs
from mlx_rsgwm.probe.measures import MEASURES, SIGNALS, WEIGHTS, columns
from mlx_rsgwm.probe.module_pair import measure_module, opposed_and_common, some_entries
from mlx_rsgwm.probe.pair_measures import pair_measures
from tests.probe import dense_references

KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def dense(adapter, module):
    a, b = (np.array(adapter.weights[f"{module}.{leaf}"], np.float64) for leaf in ("lora_a", "lora_b"))
    return a @ b * adapter.spec.scale


def measured(first, second):
    (row,) = next(measure_pairs([first, second])).values()
    return row


@pytest.mark.parametrize(
    ("ranks", "sizes", "scales"),
    [((4, 4), (0.1, 0.1), (2, 2)), ((4, 8), (0.1, 2.0), (2, 0.5)), ((16, 12), (1, 1), (1, 1))],
)
def test_every_measure_is_that_of_the_dense_updates(make_adapter, ranks, sizes, scales):
    first, second = (
        make_adapter(seed, rank=ranks[seed], keys=KEYS, size=sizes[seed], scale=scales[seed]) for seed in (0, 1)
    )
    row = measured(first, second)
    modules = first.modules()
    expected = dense_references.measures(
        [dense(first, name) for name in modules], [dense(second, name) for name in modules], [ranks] * len(modules)
    )
    assert row.modules == len(modules)
    for name, value in expected.items():
        assert row.measures[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_every_column_of_the_table_is_measured(make_adapter):
    row = measured(make_adapter(0), make_adapter(1))
    gradients = {"training_gradient_cosine"}  # only snapshots have one
    assert set(row.measures) == set(columns(WEIGHTS, SIGNALS)) - gradients
    assert all(measure.text and measure.source for measure in MEASURES.values())


def of_matrices(first, second):
    """One module with these updates, factored as themselves times the identity."""
    pair = [(np.array(each, float), np.eye(len(each[0]))) for each in (first, second)]
    module = measure_module("m", Decompositions(pair), (0, 1), tuple(some_entries(*each) for each in pair))
    return pair_measures([module])


def test_the_28_of_two_diagonal_matrices_by_hand():
    """diag(2, 1) and diag(2, −1): inner product 3, both of norm √5, distance 2; directions are the axes."""
    got = of_matrices([[2, 0], [0, 1]], [[2, 0], [0, -1]])
    # The Gram matrix of the two rows is [[5, 3], [3, 5]]: its eigenvalues are 8 and 2, so σ is √8 and √2, 2 to 1.
    entropy = -(2 / 3 * log(2 / 3) + 1 / 3 * log(1 / 3))
    by_hand = {
        "task_vector_cosine": 0.6,
        "task_vector_l2": 2.0,
        "task_vector_dot": 3.0,
        "task_vector_angle": 53.13010235415598,
        "task_vector_norm_ratio": 1.0,
        "stack_effective_rank": exp(entropy),
        "stack_effective_rank_score": 2 - exp(entropy),
        "stack_stable_rank": 9 / 5,
        "stack_spectral_gap": 0.5,
        "stack_singular_ratio": 0.5,
        "layer_effective_rank": exp(entropy),
        "layer_effective_rank_score": 2 - exp(entropy),
        "singular_value_overlap": 1.0,
        "left_subspace_overlap": sqrt(2) / 2,  # ‖I₂‖/k: the same two directions, over k
        "right_subspace_overlap_top": 1.0,  # over √k
        "right_subspace_overlap_bottom": 1.0,
        "interaction_top": 1.0,
        "interaction_bottom": 1.0,
        "sign_disagreement.mean": 1 / 3,  # min is 2 where signs agree, 1 where they do not
        "overamplification.mean": sqrt(1.6),  # diag(4, 0): 4/√10
        "overamplification_squared.mean": 1.6,
        "log_norm_ratio.max": 0.0,
    }
    assert {name: got[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-9)


def test_subspaces_of_unequal_rank_by_hand():
    """The last directions are the last within the rank: e₁ of a rank 1 update, not of its null space."""
    got = of_matrices([[3, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 2, 0], [0, 0, 1]])
    assert got["right_subspace_overlap_bottom"] == got["right_subspace_overlap_top"] == 0
    got = of_matrices([[3, 0, 0], [0, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 2, 0], [0, 0, 0]])
    assert got["right_subspace_overlap_top"] == pytest.approx(0)  # its first is e₂
    assert got["right_subspace_overlap_bottom"] == pytest.approx(1)  # its last e₁
    assert got["interaction_bottom"] == pytest.approx(1)
    # (3) against (2, 1): cosine of the shares, the shorter goes on with zeros.
    assert got["singular_value_overlap"] == pytest.approx(2 / sqrt(5))


def test_left_is_of_outputs_and_right_of_inputs():
    """x e₁ e₁ᵀ and e₁ e₂ᵀ share the input e₁ and no output."""
    got = of_matrices([[1, 0], [0, 0]], [[0, 1], [0, 0]])
    assert got["left_subspace_overlap"] == got["output_cos2.mean"] == pytest.approx(0)
    assert got["right_subspace_overlap_top"] == got["input_cos2.mean"] == pytest.approx(1)


def test_opposed_entries_by_hand():
    assert opposed_and_common(np.array([1.0, -2.0, 3.0, 0.0]), np.array([2.0, 1.0, 1.0, 5.0])) == (1.0, 3.0)


def test_entries_of_large_updates_are_the_same_ones(monkeypatch):
    monkeypatch.setattr(module_pair, "ENTRIES", 400)
    rows, columns = np.arange(50.0)[:, None], np.arange(1.0, 81.0)[None]
    few = some_entries(rows, columns)
    assert few.shape == (16, 26)
    assert np.array_equal(few, some_entries(rows, columns))
    assert np.array_equal(2 * few, some_entries(2 * rows, columns))
    assert set(few.ravel()) <= set((rows @ columns).ravel())


def test_fisher_overlap_is_the_cosine_of_importance(make_adapter):
    first, second = make_adapter(0), make_adapter(1)
    flat = [np.concatenate([np.array(each.importance[f"all/{name}"]).ravel() for name in first.weights])
            for each in (first, second)]  # fmt: skip
    fisher = [each.astype(np.float64) ** 2 for each in flat]
    expected = np.sqrt(fisher[0] * fisher[1]).sum() / np.sqrt(fisher[0].sum() * fisher[1].sum())
    assert measured(first, second).measures["fisher_overlap"] == pytest.approx(expected)


@pytest.mark.parametrize("other", [{"init_seed": 3}, {"rank": 8}])
def test_importance_of_other_factors_is_not_compared(make_adapter, other):
    assert "fisher_overlap" not in measured(make_adapter(0), make_adapter(1, **other)).measures


def test_modules_that_one_does_not_change_are_left_out(make_adapter):
    first, second = make_adapter(0, keys=KEYS), make_adapter(1, keys=KEYS[:2])
    zeroed = {
        name: mx.zeros(value.shape) if name.endswith("v_proj.lora_b") else value
        for name, value in second.weights.items()
    }
    row = measured(first, replace(second, weights=zeroed))
    queries = [name for name in first.modules() if name.endswith("q_proj")]
    expected = dense_references.measures(
        [dense(first, name) for name in queries], [dense(second, name) for name in queries], [(4, 4)] * len(queries)
    )
    assert row.modules == len(queries)
    assert row.measures["task_vector_cosine"] == pytest.approx(expected["task_vector_cosine"], rel=1e-5)
    assert row.measures["layer_effective_rank"] == pytest.approx(expected["layer_effective_rank"], rel=1e-5)


def test_an_adapter_beside_itself_and_its_opposite(make_adapter):
    first = make_adapter(0)
    opposite = {n: -v if n.endswith("lora_b") else v for n, v in first.weights.items()}
    same = measured(first, replace(first, label="twin")).measures
    other = measured(first, replace(first, weights=opposite, label="opposite")).measures
    assert (same["task_vector_cosine"], other["task_vector_cosine"]) == pytest.approx((1, -1))
    assert same["stack_effective_rank"] == pytest.approx(1, abs=1e-3)
    assert (same["sign_disagreement.max"], other["sign_disagreement.min"]) == pytest.approx((0, 1), abs=1e-6)
    assert (same["overamplification.mean"], other["overamplification.mean"]) == pytest.approx((sqrt(2), 0), abs=1e-3)
    assert (same["audit_redundant"], other["audit_conflicting"]) == (1, 1)
