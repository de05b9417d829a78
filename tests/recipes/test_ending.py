"""The last lines of a run are true for whatever came out, and fit 15 lines of 80 columns."""

import json
from functools import lru_cache

import pytest

from mlx_rsgwm.evaluation import metrics
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.evaluation.report.exchange import exchange
from mlx_rsgwm.evaluation.report.outcome import Outcome, acceptance, cost, verdict
from mlx_rsgwm.evaluation.report.summary import summarise_records
from mlx_rsgwm.recipes.ending import BAR, ending

RIGHT, WRONG = ("5 + 3 = 8\n#### 8", "8", True), ("5 + 3 = 9\n#### 9", "9", False)


def item(index, first, second=None, accepted=True, ms=None, **fields):
    """First draft right or not; with a second, the first was rejected."""
    drafts = [first] if second is None else [first, second]
    made = [
        DraftRecord(text, value, correct, {"yesno": 0.9 if accepted and place == len(drafts) - 1 else 0.1}, 7)
        for place, (text, value, correct) in enumerate(drafts)
    ]
    time = None if ms is None else ms * len(made)
    made[0] = DraftRecord(*drafts[0], made[0].scores, 7, latency_ms=ms)
    chosen = len(made) - 1 if accepted else 0
    question = f"Ada has 5 pens and gets 3 more (number {index}). How many pens does Ada have now?"
    return ItemRecord(
        f"i{index}", "change", question, "8", tuple(made), "yesno", 0.5, accepted, len(made), chosen, time, **fields
    )


@lru_cache
def written(name):
    records = [item(index, *row[:-1], **row[-1]) for index, row in enumerate(RUNS[name])]
    if name == "timed":
        return json.dumps(summarise_records(records, 3))
    return json.dumps({  # the parts that are read, without the bootstrap of the others
        "n": len(records), "metadata": {}, "overlap": None, "by_task": {"change": None},
        "drafter": metrics.table(records, "drafter").to_dict(),
        "draft_verify": metrics.table(records, "draft_verify").to_dict(),
        "paired": metrics.compare(records).to_dict(),
        "exchange": exchange(records),
    })  # fmt: skip


def report_of(name):
    return json.loads(written(name))


def outcome(name):
    return Outcome.of(report_of(name))


MENDED, SPOILED, KEPT, LOST = (WRONG, RIGHT, {}), (RIGHT, WRONG, {}), (RIGHT, {}), (WRONG, {"accepted": False})
REJECTED = (RIGHT, {"accepted": False})
RUNS = {
    "helps": [MENDED] * 12 + [SPOILED] * 2 + [KEPT] * 20 + [LOST] * 30,
    "hurts": [MENDED] * 1 + [SPOILED] * 9 + [KEPT] * 20,
    "only spoiled": [SPOILED] * 9 + [KEPT] * 20,
    "chance": [MENDED] * 4 + [SPOILED] * 2 + [KEPT] * 60,
    "chance the other way": [MENDED] * 2 + [SPOILED] * 4 + [KEPT] * 60,
    "few": [MENDED, LOST],
    "nothing": [KEPT] * 40 + [LOST] * 40,
    "none accepted": [LOST] * 5,
    "all accepted": [KEPT] * 5,
    "misleads": [(WRONG, {})] * 30 + [REJECTED] * 30,
    "alike": [KEPT, (WRONG, {}), REJECTED, LOST] * 20,
    "timed": [(RIGHT, {"ms": 100.0}), (WRONG, RIGHT, {"ms": 120.0})] * 3,
}
VERDICTS = {
    "helps": "Checking helps: it mended 12 answers and spoiled 2 (p = 0.013).",
    "hurts": "Checking costs right answers here: it spoiled 9 and mended 1 (p = 0.021).",
    "chance": "Checking mended 4 answers and spoiled 2: that can be chance (p = 0.688).",
    "chance the other way": "Checking mended 2 answers and spoiled 4: that can be chance (p = 0.688).",
    "few": "Checking mended 1 answer and spoiled 0: that can be chance (p = 1.000).",
    "nothing": "Checking changed nothing: no answer became right, and none became wrong.",
}
ACCEPTANCE = {
    "helps": "Acceptance tells: right are 94 % of 34 accepted answers, 0 % of 30 others.",
    "few": "Right are 100 % of 1 accepted answers, 0 % of 1 others: that can be chance.",
    "none accepted": "No answer was accepted: every score is below the threshold.",
    "all accepted": "All 5 answers were accepted; 100 % of them are right.",
    "misleads": "Acceptance misleads: right are 0 % of 30 accepted answers, 100 % of 30 others.",
    "alike": "Right are 50 % of 40 accepted answers, 50 % of 40 others: that can be chance.",
}


@pytest.mark.parametrize("name", VERDICTS)
def test_whether_checking_helped(name):
    assert verdict(outcome(name)) == VERDICTS[name]


@pytest.mark.parametrize("name", ACCEPTANCE)
def test_what_acceptance_tells(name):
    assert acceptance(outcome(name)) == ACCEPTANCE[name]


@pytest.mark.parametrize("name", RUNS)
def test_the_figures_are_those_of_the_items(name):
    rows = RUNS[name]
    shown, returned = outcome(name), [row[-2] for row in rows]
    accepted = [final[2] for final, row in zip(returned, rows, strict=True) if row[-1].get("accepted", True)]
    others = [row[0][2] for row in rows if not row[-1].get("accepted", True)]
    assert (shown.before.value, shown.after.value) == (
        pytest.approx(sum(row[0][2] for row in rows) / len(rows)),
        pytest.approx((sum(accepted) + sum(others)) / len(rows)),
    )
    assert (shown.mended, shown.spoiled) == (rows.count(MENDED) + rows.count(RUNS["timed"][1]), rows.count(SPOILED))
    for rate, right in ((shown.accepted, accepted), (shown.others, others)):
        assert (rate.n, rate.value) == (len(right), pytest.approx(sum(right) / len(right))) if right else rate is None


def test_what_checking_cost():
    assert cost(outcome("timed")) == "Checking took 1.55 × the time, 1.50 drafts a question (6 timed)."
    assert cost(outcome("helps")) == "Checking took 1.22 drafts a question; time was not measured."


SUMMARY = {
    "base": {"name": "smollm2-135m"},
    "tasks": ["change", "groups"],
    "adapters": {"drafter": "runs/demo/drafter", "verifier": "runs/demo/verifier"},
    "report": "runs/demo/report",
}


@pytest.mark.parametrize("name", RUNS)
def test_at_most_15_lines_of_80_columns(name):
    lines = ending(report_of(name), SUMMARY)
    assert 11 <= len(lines) <= 15
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("Next: rsgwm chat --drafter runs/demo/drafter") for line in lines)
    assert "runs/demo/report/report.html" in lines[-1]


def test_large_numbers_fit():
    report = report_of("helps")
    report["n"] = 123456
    report["paired"] = {"only_first": 10234, "only_second": 23456, "p_value": 0.06}
    lines = ending(report, SUMMARY)
    assert max(map(len, lines)) <= 80
    assert "chance" in verdict(Outcome.of(report))


def test_a_question_whose_draft_was_rejected_and_the_next_accepted():
    lines = ending(report_of("helps"), SUMMARY)
    assert lines[7:10] == [
        "“Ada has 5 pens and gets 3 more (number 0). How many pens does Ada have now?”",
        "  rejected  5 + 3 = 9 → 9  (wrong, score 0.10)",
        "  accepted  5 + 3 = 8 → 8  (right, score 0.90)",
    ]
    worse = ending(report_of("only spoiled"), SUMMARY)  # not one was mended: what there is, and that it is wrong
    assert worse[8:10] == [
        "  rejected  5 + 3 = 8 → 8  (right, score 0.10)",
        "  accepted  5 + 3 = 9 → 9  (wrong, score 0.90)",
    ]
    assert not [line for line in ending(report_of("nothing"), SUMMARY) if "rejected  " in line]


def test_a_verifier_with_more_training_has_a_line_of_its_own():
    report = report_of("helps")
    trained = {**report["draft_verify"], "accuracy": {"value": 0.75, "low": 0.6, "high": 0.9, "n": 64}}
    lines = ending(report, {**SUMMARY, "draft_verify_own_mistakes": trained})
    assert "With a verifier trained on the drafter's own mistakes: 75 % right." in lines
    assert [line for line in lines if "After" not in line][:4] == ending(report, SUMMARY)[:4]
    assert (len(lines), max(map(len, lines)) <= 80) == (15, True)


def test_bars_are_as_long_as_their_rates():
    before, after = ending(report_of("helps"), SUMMARY)[2:4]
    assert before.count("█") == round(BAR * 22 / 64)
    assert after.count("█") == round(BAR * 32 / 64)
    assert (before.split()[-2:], after.split()[-2:]) == (["34", "%"], ["50", "%"])


def test_long_names_and_texts_are_shortened():
    rows = [
        item(0, ("so " * 90, "8", True)),
        item(1, ("step by step " * 40 + "\n#### 9", "9", False), ("word " * 50, "8", True)),
    ]
    report = summarise_records(rows, 3)
    summary = {**SUMMARY, "base": {"name": "an-owner/" + "a" * 90}, "tasks": ["a" * 60, "b" * 60]}
    report["by_task"] = dict.fromkeys(summary["tasks"], report["by_task"]["change"])
    assert max(map(len, ending(report, summary))) <= 80


def test_items_that_were_trained_on_stand_above_everything():
    report = report_of("helps") | {"overlap": {"headline": "NOT A TEST: 3 of 64 items were trained on (drafter 3)"}}
    lines = ending(report, SUMMARY)
    assert lines[0].startswith("NOT A TEST")
    assert lines[2].startswith("64 questions")
    assert len(lines) == 15


def test_what_was_not_accepted_may_be_left_unanswered():
    rows = [item(index, RIGHT, accepted=False, abstain=True) for index in range(8)] + [item(9, RIGHT)]
    shown = Outcome.of(summarise_records(rows, 3, {"loop": {"abstain": True}}))
    assert verdict(shown) == "Checking costs right answers here: it withheld 8 and mended 0 (p = 0.008)."
    assert acceptance(shown) == "Of 1 accepted, 100 % are right; 8 were left unanswered."


def test_one_task_makes_one_adapter():
    lines = ending(report_of("few"), {**SUMMARY, "tasks": ["change"]})
    assert lines[0] == "One adapter trained on smollm2-135m drafts the answers and verifies them."
