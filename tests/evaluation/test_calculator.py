"""Selection among drafts without a false equation, by hand; AUROC on them alone."""

import pytest

from mlx_rsgwm.evaluation.calculator import calculator_slice
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.evaluation.report.folder import render_table
from mlx_rsgwm.evaluation.report.summary import summarise_records
from mlx_rsgwm.evaluation.verifier_quality import verifier_quality

RIGHT, WRONG = ("7 + 2 = 9\n#### 9", "9"), ("7 - 2 = 5\n#### 5", "5")
MISCALCULATED = ("7 + 2 = 8\n#### 8", "8")


def record(name, *drafts):
    made = tuple(DraftRecord(text, value, value == "9", {"yesno": score}) for (text, value), score in drafts)
    return ItemRecord(name, "t", "7 and 2 more?", "9", made, "yesno", 0.0, True, 1, 0)


RECORDS = [
    record("a", (WRONG, 0.2), (RIGHT, 0.6), (MISCALCULATED, 0.9)),  # the verifier alone would take the third
    record("b", (MISCALCULATED, 0.9), (RIGHT, 0.8), (WRONG, 0.1)),  # so does the calculator for the control
    record("c", (WRONG, 0.7), (WRONG, 0.5), (RIGHT, 0.6)),
    record("d", (MISCALCULATED, 0.9), (MISCALCULATED, 0.4), (MISCALCULATED, 0.3)),  # none passes: the first answers
]


def test_selection_among_passed_drafts_by_hand():
    told = calculator_slice(RECORDS)
    assert (told.passing_wrong.value, told.passing_wrong.n) == (4 / 9, 9)
    assert (told.passing_right.value, told.passing_right.n) == (1.0, 3)
    assert told.control.accuracy.value == 0.25
    assert told.best["yesno"].accuracy.value == 0.5
    assert told.best["yesno"].over_control.value == 0.25
    assert told.any.accuracy.value == 0.75


def test_fewer_drafts_and_another_calculator():
    assert calculator_slice(RECORDS, k=2).any.accuracy.value == 0.5
    trusting = calculator_slice(RECORDS, passes=lambda *_: True)
    assert trusting.passing_wrong.value == 1.0
    assert trusting.control.accuracy.value == 0.0
    assert trusting.best["yesno"].accuracy.value == 0.0


def test_auroc_on_passed_drafts_leaves_out_what_a_calculator_finds():
    quality = verifier_quality(RECORDS)["yesno"]
    assert (quality["all"].n, quality["passed"].n, quality["passed"].correct) == (12, 7, 3)
    # right .6 .8 .6 against wrong .2 .1 .7 .5: 10 of 12 pairs in order
    assert quality["passed"].auroc.value == pytest.approx(10 / 12)
    assert quality["all"].auroc.value < quality["passed"].auroc.value


def test_a_score_that_some_passed_draft_lacks_selects_nothing():
    bare = DraftRecord(*RIGHT, True, {})
    other = ItemRecord("e", "t", "q", "9", (RECORDS[0].drafts[0], bare), "yesno", 0.0, True, 1, 0)
    assert calculator_slice([*RECORDS, other]).best == {}


def test_the_report_shows_them():
    shown = render_table(summarise_records(RECORDS, 3))
    assert "Drafts without a false equation" in shown
    (line,) = [line for line in shown.split("\n") if line.startswith("best by yesno")]
    assert "0.500" in line
    assert "+0.250" in line
