"""Controls on records small enough to follow, and their budgets."""

import json
import random
from dataclasses import replace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.studies.controls import (
    LoopRule,
    control_notes,
    control_rows,
    paper_systems,
    summarise_controls,
    systems_on_drafts,
)

RULES = {
    "verifier": LoopRule("good", 0.6),
    "self": LoopRule("self:noise", 0.5),
    "direct": LoopRule("direct:good", 0.9),
}


def records(items=60, seeds=(1, 2), drafts=6):
    rng = random.Random(7)
    found = []
    for seed in seeds:
        for index in range(items):
            made = []
            for _ in range(drafts):
                right = rng.random() < 0.5
                good = min(1.0, max(0.0, 0.35 + 0.3 * right + rng.uniform(-0.2, 0.2)))
                scores = {"good": good, "self:noise": rng.random(), "direct:good": good}
                made.append(
                    DraftRecord("t", "1" if right else rng.choice("23"), right, scores, 10, verified={"good": 30})
                )
            found.append(ItemRecord(f"i{index}", "t", "q", "1", tuple(made), "good", 2.0, False, 1, 0, seed=seed))
    return found


@pytest.fixture(scope="module")
def systems():
    return {system.name: system for system in systems_on_drafts(records(), 3, RULES)}


def test_every_control_is_there(systems):
    assert list(systems) == [
        "drafter once", "draft–verify", "drafter + self-verify", "directly trained verifier", "best of 3",
        "majority of 3", "random accept", "majority, equal drafted tokens", "majority, equal drafted + verified tokens",
    ]  # fmt: skip
    assert "drafter + self-verify" not in {
        system.name for system in systems_on_drafts(records(), 3, {"verifier": RULES["verifier"]})
    }


def spent(system, verified=0):
    return sum(r.drafted_tokens + verified * r.verified_tokens for r in system.records)


def test_equal_budgets_are_kept_and_used(systems):
    ours = systems["draft–verify"]
    for name, verified in (("majority, equal drafted tokens", 0), ("majority, equal drafted + verified tokens", 1)):
        allowed, used = spent(ours, verified), spent(systems[name])
        ceiling = sum(draft.tokens for record in ours.records for draft in record.drafts)
        assert used <= allowed
        assert used > 0.97 * min(allowed, ceiling)
    assert len({record.attempts for record in systems["majority, equal drafted tokens"].records}) > 1


def test_random_accept_has_the_rate_and_not_the_judgement(systems):
    ours, lot = systems["draft–verify"].records, systems["random accept"].records
    rate = [sum(r.accepted for r in rows) / sum(r.attempts for r in rows) for rows in (ours, lot)]
    assert rate[0] == pytest.approx(rate[1], abs=0.08)
    right = [sum(r.returned.correct for r in rows) / len(rows) for rows in (ours, lot)]
    assert right[0] > right[1] + 0.1


def test_best_of_k_takes_the_best_score(systems):
    for record in systems["best of 3"].records:
        scores = [draft.scores["good"] for draft in record.drafts[:3]]
        assert record.chosen == scores.index(max(scores))
        assert not record.accepted


def test_summary_tests_every_system_against_ours(systems):
    found = summarise_controls(list(systems.values()), 3)
    rows = {row["name"]: row for row in found["systems"]}
    assert rows["drafter once"]["tokens_drafted"] == 10
    assert rows["majority of 3"]["tokens_verified"] == 0
    assert rows["draft–verify"]["tokens_verified"] == 30 * rows["draft–verify"]["attempts"]
    assert "p_value" not in rows["draft–verify"]
    for name, row in rows.items():
        if name != "draft–verify":
            assert row["p_value"] <= row["p_value_holm"] <= 1
            assert row["difference"]["n"] == 60
    assert rows["drafter once"]["p_value_holm"] < 0.05
    assert rows["draft–verify"]["accuracy"]["n"] == 120
    width = rows["draft–verify"]["accuracy"]["high"] - rows["draft–verify"]["accuracy"]["low"]
    assert width > 0.08
    assert found["false_accepts_against_self"]["value"] < 0
    assert len(found["gap_closed"]["values"]) == 2
    text = json.dumps(found, allow_nan=False) + " ".join(control_notes(found))
    assert "ceiling" in text
    assert all(len(row) == len(control_rows(found)[0]) for row in control_rows(found))


def test_too_few_drafts():
    with pytest.raises(RsgwmError, match=r"needs 3 (recorded )?drafts"):
        systems_on_drafts(records(4, (1,), 2), 3, {"verifier": LoopRule("good", 1.0)})


def test_a_calculator_adds_systems_and_leaves_the_others_as_they_are():
    plain = records(items=40, seeds=(1,))
    stating = [
        replace(row, drafts=tuple(replace(d, text="1 + 1 = 2" if d.correct else "1 + 1 = 3") for d in row.drafts))
        for row in plain
    ]
    assert [system.name for system in systems_on_drafts(stating, 3, RULES)] == [
        system.name for system in systems_on_drafts(plain, 3, RULES, "none")
    ]
    before = summarise_controls(systems_on_drafts(stating, 3, RULES), 3)
    after = summarise_controls(systems_on_drafts(stating, 3, RULES, "auto"), 3)
    count = len(before["systems"])
    assert after["systems"][:count] == before["systems"]
    rows = {row["name"]: row for row in after["systems"][count:]}
    assert list(rows) == [
        "draft–verify, arithmetic checked", "best of 3, arithmetic checked", "calculator", "calculator, majority of 3"
    ]  # fmt: skip
    ceiling = after["any_of_k"]["values"][0]["value"]  # every wrong draft states a false equation
    assert [row["accuracy"]["value"] for row in rows.values()] == [ceiling] * 4
    assert rows["calculator"]["tokens_verified"] == 0
    assert rows["draft–verify, arithmetic checked"]["false_accept_rate"]["value"] == 0
    assert any("calculator" in row[0] for row in control_rows(after))


def test_what_a_verifier_adds_to_a_calculator():
    """Half of the wrong drafts miscalculate: what is left is the verifier's, with an interval of its own."""
    rows = [
        replace(row, drafts=tuple(replace(d, text="1 + 1 = 2" if d.correct or n % 2 else "1 + 1 = 3")
                                  for n, d in enumerate(row.drafts)))
        for row in records(items=40, seeds=(1, 2))
    ]  # fmt: skip
    summary = summarise_controls(systems_on_drafts(rows, 3, RULES, "auto"), 3)
    named = {row["name"]: row for row in summary["systems"]}
    gap = named["best of 3, arithmetic checked"]["over_calculator"]
    accuracies = [named[name]["accuracy"]["value"] for name in ("calculator", "best of 3, arithmetic checked")]
    assert gap["value"] == pytest.approx(accuracies[1] - accuracies[0])
    assert 0 < gap["value"] < gap["high"]
    assert gap["low"] < gap["value"]
    assert not any("over_calculator" in named[name] for name in ("calculator", "draft–verify"))
    assert any(line.startswith("best of 3, arithmetic checked minus the calculator") for line in control_notes(summary))


def test_the_paper_merge_is_compared_on_its_own_drafts():
    rows = records(items=40)
    alone, loop = paper_systems([replace(row, drafts=row.drafts[:3]) for row in rows], 3, LoopRule("good", 0.6))
    assert alone.mode == "drafter"
    assert [system.accepts for system in (alone, loop)] == [False, True]
    summary = summarise_controls([*systems_on_drafts(rows, 3, RULES), alone, loop], 3)
    ours, paper = summary["systems"][1], summary["systems"][-1]
    assert paper["difference"]["value"] == 0
    assert paper["accept_rate"] == ours["accept_rate"]
