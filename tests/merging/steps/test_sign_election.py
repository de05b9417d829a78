"""Weighted sums and sign elections: who wins a draw, what weights and signs do."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.steps import sign_election
from mlx_rsgwm.merging.steps.sign_election import elected_sum, weighted_sum
from tests.merging.elementwise_references import random_deltas


def test_the_larger_magnitude_wins_whatever_its_sign():
    strong, weak = mx.array([[3.0, -3.0]]), mx.array([[-1.0, 1.0]])
    assert elected_sum([strong, weak], [1.0, 1.0]).tolist() == [[3.0, -3.0]]
    assert elected_sum([weak, strong], [1.0, 1.0]).tolist() == [[3.0, -3.0]]


def test_weights_vote():
    strong, weak = mx.array([[3.0]]), mx.array([[-1.0]])
    assert elected_sum([strong, weak], [1.0, 4.0]).item() == pytest.approx(-1.0)
    assert elected_sum([strong, weak], [1.0, 4.0], normalise="none").item() == pytest.approx(-4.0)
    assert elected_sum([strong, weak], [1.0, 4.0], ballots=[1.0, 1.0]).item() == pytest.approx(3.0)


def test_a_majority_wins_by_count_and_a_draw_goes_to_the_magnitude():
    deltas = [mx.array([[-5.0, -5.0]]), mx.array([[1.0, 2.0]]), mx.array([[1.0, 0.0]])]
    assert elected_sum(deltas, [1.0] * 3, "sum").tolist() == [[-5.0, -5.0]]
    assert elected_sum(deltas, [1.0] * 3, "count").tolist() == [[1.0, -5.0]]


def test_an_even_draw_elects_nobody():
    opposed = [mx.array([[2.0]]), mx.array([[-2.0]])]
    assert elected_sum(opposed, [1.0, 1.0], "sum").item() == 0
    assert elected_sum(opposed, [1.0, 1.0], "count").item() == 0


def test_a_negative_weight_turns_an_update_round():
    deltas = [mx.array([[3.0, 3.0]]), mx.array([[-1.0, 1.0]])]
    assert elected_sum(deltas, [1.0, -1.0]).tolist() == [[2.0, 3.0]]


def test_weights_that_sum_to_zero_have_no_mean():
    with pytest.raises(RsgwmError, match="weights sum to zero"):
        weighted_sum(random_deltas(2), [1.0, -1.0])
    assert weighted_sum([mx.array([3.0]), mx.array([1.0])], [1.0, -1.0], "none").item() == 2.0


entries = st.lists(st.floats(-4, 4, width=32).map(lambda x: round(x, 2)), min_size=4, max_size=4)


@given(values=st.lists(entries, min_size=2, max_size=5), election=st.sampled_from(sign_election.ELECTIONS))
@settings(max_examples=80, deadline=None)
def test_turning_every_sign_turns_the_result(values, election):
    updates = [mx.array([row]) for row in values]
    weights = [1.0 + 0.5 * index for index in range(len(values))]
    turned = elected_sum([-update for update in updates], weights, election)
    assert mx.array_equal(turned, -elected_sum(updates, weights, election))
