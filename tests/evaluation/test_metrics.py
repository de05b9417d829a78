"""Table rows, identities, ceilings and replay on records small enough to count by hand."""

import json
from dataclasses import replace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation import metrics
from mlx_rsgwm.evaluation.metrics import ItemRecord
from mlx_rsgwm.evaluation.records import DraftRecord


def draft(value, correct, score, finished=True, latency=None):
    return DraftRecord(
        f"#### {value}", value, correct, {"yesno": score, "mean_logprob": score / 2}, 5, finished, latency
    )


def record(name, drafts, threshold=0.7, k=3, task="add", latency=None):
    """The record a lazy loop leaves, by an independent loop."""
    attempts = next((i + 1 for i, d in enumerate(drafts[:k]) if d.scores["yesno"] >= threshold), k)
    scores = [d.scores["yesno"] for d in drafts[:attempts]]
    accepted = scores[-1] >= threshold
    chosen = attempts - 1 if accepted else scores.index(max(scores))
    return ItemRecord(name, task, "q", "1", tuple(drafts), "yesno", threshold, accepted, attempts, chosen, latency)


RIGHT, WRONG, SILENT = ("1", True), ("2", False), (None, False)


@pytest.fixture
def records():
    return [
        record("a", [draft(*RIGHT, 0.9, latency=10.0), draft(*WRONG, 0.1), draft(*RIGHT, 0.8)], latency=100.0),
        record("b", [draft(*WRONG, 0.8, latency=20.0), draft(*RIGHT, 0.9), draft(*RIGHT, 0.2)], latency=200.0),
        record("c", [draft(*WRONG, 0.1, latency=30.0), draft(*RIGHT, 0.7), draft(*WRONG, 0.2)], latency=300.0),
        record(
            "d", [draft(*SILENT, 0.3, False, 40.0), draft(*WRONG, 0.2), draft(*WRONG, 0.1)], task="cmp", latency=400.0
        ),
        record(
            "e",
            [draft(*SILENT, 0.9, latency=50.0), draft(*RIGHT, 0.95), draft(*SILENT, 0.1)],
            task="cmp",
            latency=500.0,
        ),
        record(
            "f", [draft(*WRONG, 0.5, latency=60.0), draft(*RIGHT, 0.6), draft(*WRONG, 0.4)], task="cmp", latency=600.0
        ),
    ]


def test_draft_verify_rows(records):
    found = metrics.table(records, "draft_verify", max_attempts=3)
    # returned: a right, b wrong, c right, d silent, e silent, f right (fallback); accepted: a b c e
    assert found.accuracy.value == pytest.approx(3 / 6)
    assert found.wrong_rate.value == pytest.approx(1 / 6)
    assert found.no_answer_rate.value == pytest.approx(1 / 6)
    assert found.cut_off_rate.value == pytest.approx(1 / 6)
    assert found.accept_rate.value == pytest.approx(4 / 6)
    assert found.accepted_and_correct.value == pytest.approx(2 / 6)
    assert (found.false_accept_rate.value, found.false_accept_rate.n) == (0.5, 4)
    assert found.accepted_wrong_rate.value == 0.25
    assert found.average_attempts == pytest.approx((1 + 1 + 2 + 3 + 1 + 3) / 6)
    assert found.average_latency_ms == pytest.approx(350)
    assert found.items_per_minute == pytest.approx(60000 / 350)
    assert metrics.table(records, "draft_verify", wall_seconds=3.0).items_per_minute == pytest.approx(120)


def test_drafter_rows(records):
    found = metrics.table(records, "drafter")
    assert found.accuracy.value == pytest.approx(1 / 6)
    assert found.no_answer_rate.value == pytest.approx(1 / 6)
    assert found.cut_off_rate.value == pytest.approx(1 / 6)
    assert found.average_latency_ms == pytest.approx(35)
    assert (found.accept_rate, found.false_accept_rate, found.average_attempts) == (None, None, None)
    assert set(found.to_dict()["accuracy"]) == {"value", "low", "high", "n"}
    json.dumps(found.to_dict(), allow_nan=False)


def test_nothing_accepted_and_nothing_timed():
    rows = [record("a", [draft(*WRONG, 0.1), draft(*WRONG, 0.2), draft(*RIGHT, 0.3)])]
    found = metrics.table(rows, "draft_verify", max_attempts=3)
    assert (found.accept_rate.value, found.false_accept_rate, found.accepted_wrong_rate) == (0, None, None)
    assert (found.average_latency_ms, found.items_per_minute) == (None, None)
    assert found.accuracy.value == 1
    with pytest.raises(RsgwmError, match="no item records"):
        metrics.table([], "drafter")
    with pytest.raises(RsgwmError, match="unknown mode"):
        metrics.table(rows, "both")


@pytest.mark.parametrize(
    ("accept", "both", "reported", "true"), [(0.82, 0.70, 0.0244, 0.1463), (0.87, 0.82, 0.0115, 0.0575)]
)
def test_published_false_accept_rates_break_the_identity(accept, both, reported, true):
    problems = metrics.identity_problems(0.84, 0.10, 0.06, accept, both, reported, 1.61, 3)
    assert len(problems) == 1
    assert f"{true:.4f}" in problems[0]
    assert not metrics.identity_problems(0.84, 0.10, 0.06, accept, both, 1 - both / accept, 1.61, 3)


def test_identities_name_the_values(records):
    assert "is not 1" in metrics.identity_problems(0.5, 0.5, 0.1)[0]
    assert "exceeds" in metrics.identity_problems(0.5, 0.5, 0, 0.6, 0.55, 1 - 0.55 / 0.6)[0]
    assert "outside" in metrics.identity_problems(0.5, 0.5, 0, average_attempts=3.5, max_attempts=3)[0]
    sound = metrics.table(records, "draft_verify")
    with pytest.raises(AssertionError, match="contradict"):
        metrics.check_identities(replace(sound, accuracy=sound.accept_rate))
    with pytest.raises(AssertionError, match="outside 1–1"):
        metrics.table(records, "draft_verify", max_attempts=1)


def test_ceilings(records):
    assert metrics.any_of_k(records, 3).value == pytest.approx(5 / 6)
    assert metrics.any_of_k(records, 1).value == pytest.approx(1 / 6)
    # majorities: a right (2 of 3), b right, c wrong, d wrong, e right (refusals do not vote), f wrong
    assert metrics.majority_of_k(records, 3).value == pytest.approx(3 / 6)
    short = [*records[:-1], replace(records[0], drafts=records[0].drafts[:1])]
    assert metrics.any_of_k(short, 3) is None
    assert metrics.majority_of_k(short, 3) is None
    assert metrics.gap_closed(0.625, 0.5, 0.75) == 0.5
    assert metrics.gap_closed(0.5, 0.5, 0.5) is None
    assert metrics.gap_closed(0.5, 0.5, None) is None
    ties = [draft("3", False, 0.1), draft("1.0", True, 0.1), draft("1", True, 0.1), draft("3", False, 0.1)]
    assert metrics.majority_index(ties) == 0
    assert metrics.majority_index(ties[1:]) == 0


def test_families_and_auroc(records):
    rates = metrics.by_task(records, "draft_verify")
    assert {task: (rate.value, rate.n) for task, rate in rates.items()} == {"add": (2 / 3, 3), "cmp": (1 / 3, 3)}
    found = metrics.verifier_auroc(records)
    assert set(found) == {"yesno", "mean_logprob"}
    drafts = [draft for record in records for draft in record.drafts]
    right = [draft.scores["yesno"] for draft in drafts if draft.correct]
    wrong = [draft.scores["yesno"] for draft in drafts if not draft.correct]
    wins = sum((p > q) + 0.5 * (p == q) for p in right for q in wrong) / (len(right) * len(wrong))
    assert found["yesno"]["all"].value == pytest.approx(wins)
    assert found["yesno"]["all"].n == 18
    assert found["yesno"]["first"].n == 6
    assert found["mean_logprob"]["all"].value == found["yesno"]["all"].value


def test_compare(records):
    found = metrics.compare(records)
    assert (found.only_first, found.only_second, found.n) == (0, 2, 6)


def test_replay_is_the_loop(records):
    for threshold in (0.0, 0.15, 0.5, 0.7, 0.85, 1.0):
        for row in records:
            expected = record(row.id, list(row.drafts), threshold, task=row.task)
            assert metrics.replay(row, threshold, 3) == expected
    assert list(metrics.sweep(records, [0.2, 0.9], 3)) == [0.2, 0.9]
    short = replace(records[2], drafts=records[2].drafts[:2])
    assert metrics.replay(short, 0.7, 3).accepted
    with pytest.raises(RsgwmError, match="needs 3 recorded drafts"):
        metrics.replay(short, 0.9, 3)
    assert metrics.sweep([short], [0.9], 3) == {}
    with pytest.raises(RsgwmError, match="no score 'other'"):
        metrics.replay(short, 0.9, 3, "other")


def test_records_round_trip_and_check_themselves(records):
    for row in records:
        assert ItemRecord.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    with pytest.raises(RsgwmError, match="not an item record"):
        ItemRecord.from_dict({"id": "a"})
    with pytest.raises(RsgwmError, match="attempts is 4"):
        replace(records[0], attempts=4)
    with pytest.raises(RsgwmError, match="chosen is 2"):
        replace(records[0], chosen=2)
    with pytest.raises(RsgwmError, match="not accepted with yesno"):
        replace(records[0], accepted=False)
    with pytest.raises(RsgwmError, match="without an answer"):
        DraftRecord("", None, True)
