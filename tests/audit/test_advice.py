"""The one line: its word, its reason, what to type next, and whom to leave out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_rsgwm.audit.advice import CARE, GO, STOP, advice_before_merge, advise
from mlx_rsgwm.audit.pool_audit import audit


@pytest.fixture
def opposed(make_adapter):
    """Three adapters, of which the last turns the first's updates round."""
    first = make_adapter(0)
    against = {name: -value if name.endswith("lora_b") else value for name, value in first.weights.items()}
    return [first, make_adapter(0, size=0.1), replace(first, weights=against)]


def test_without_directions_a_plan_is_advised_and_with_them_the_merge_itself(unlike):
    audited = audit(unlike[:2])
    assert not audited.directions
    advice = advise(audited)
    assert advice.word == CARE
    assert "--plan plan.yaml" in advice.command
    assert advise(replace(audited, directions=True)).command.startswith("rsgwm merge ")


def test_opposed_adapters_are_not_to_be_merged_and_one_is_left_out(opposed):
    advice = advise(audit(opposed))
    assert advice.word == STOP
    assert "the opposite way" in advice.reason
    assert advice.leave_out == 2
    apart = advise(audit(opposed[::2]))
    assert apart.leave_out is None
    assert apart.command.startswith("rsgwm chat --adapter ")
    assert "one at a time" in apart.command


def test_a_large_one_beside_small_ones_is_named(make_adapter):
    adapters = [make_adapter(0), make_adapter(1, init_seed=1), make_adapter(2, init_seed=2, size=9.0)]
    advice = advise(audit(adapters))
    assert advice.word == CARE
    assert "times as large as" in advice.reason
    assert advice.leave_out == 2


def test_weak_adapters_decide_before_any_overlap(unlike):
    audited = audit(unlike[:2])
    assert advise(audited, [0, 1]).word == STOP
    assert "use neither" in advise(audited, [0, 1]).reason
    assert advise(replace(audited, base="owner/base"), [0, 1]).command == "rsgwm chat --base owner/base"
    one = advise(audited, [1])
    assert (one.word, one.leave_out) == (CARE, 1)


def test_before_a_merge_much_or_broken_work_is_left_to_others(unlike, make_adapter, monkeypatch):
    assert advice_before_merge(unlike[:2]).startswith(CARE)
    assert advice_before_merge(unlike[:1]) == ""
    assert "rsgwm audit" in advice_before_merge([unlike[0]] * 9)
    apart = [make_adapter(0, keys=("self_attn.q_proj",)), make_adapter(0, keys=("self_attn.v_proj",))]
    assert advice_before_merge(apart) == ""  # the merge says what is wrong


def test_safe_adapters_are_merged_as_they_are(unlike):
    thresholds = replace(audit(unlike[:1]).thresholds, low=1.0, ratio=1e6)
    advice = advise(audit(unlike[:2], thresholds))
    assert advice.word == GO
    assert advice.command.startswith("rsgwm merge ")
