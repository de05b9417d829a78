"""Replays of sampled and mixed drafts at equal tokens, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_rsgwm.bench.mixed_drafts import check_alike, drafted, equal_tokens
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.inference.draft import GREEDY, SAMPLED
from mlx_rsgwm.inference.policy import decide


def item(name, scores, kinds=None, tokens=10):
    drafts = tuple(
        DraftRecord(f"{name} {place}", "1", score > 0.5, {"mean_logprob": score}, tokens, kind=kind)
        for place, (score, kind) in enumerate(zip(scores, kinds or [SAMPLED] * len(scores), strict=True))
    )
    made = decide(scores, 0.8)
    return ItemRecord(name, "sums", "q", "1", drafts, "mean_logprob", 0.8, made.accepted, made.attempts, made.chosen)


def test_the_fewest_drafts_that_cost_as_much():
    records = [item("a", [0.9, 0.1, 0.1, 0.1]), item("b", [0.1, 0.2, 0.3, 0.9])]  # 10 tokens, and up to 40
    assert [equal_tokens(records, tokens, "none")[0] for tokens in (10, 14, 15, 21, 25, 99)] == [1, 2, 2, 4, 4, 4]
    assert drafted(equal_tokens(records, 21, "none")[1]) == 25
    assert [record.attempts for record in equal_tokens(records, 15, "none")[1]] == [1, 2]


def test_runs_begin_alike_or_are_refused():
    sampled = [item("a", [0.1, 0.2, 0.3])]
    mixed = [item("a", [0.1, 0.2, 0.9], [SAMPLED, SAMPLED, GREEDY])]
    assert check_alike(sampled, mixed) == 2
    with pytest.raises(RsgwmError, match="a: the runs differ in their sampled drafts"):
        check_alike([replace(sampled[0], drafts=sampled[0].drafts[::-1])], mixed)
    with pytest.raises(RsgwmError, match="other questions or seeds"):
        check_alike([item("b", [0.1])], mixed)
