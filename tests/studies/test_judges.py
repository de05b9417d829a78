"""AUROC of several verifiers on one set of drafts, against the definition by pairs."""

from dataclasses import replace

import pytest

from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.studies.judges import judge_rows, judge_scores

FALSE, TRUE = "1 + 1 = 3", "1 + 1 = 2"
# (right, stated equation, score): of two items with three drafts each, and a fourth that is not judged.
DRAFTS = [
    [(True, TRUE, 0.5), (False, FALSE, 0.9), (False, TRUE, 0.4), (True, TRUE, 0.0)],
    [(False, TRUE, 0.6), (True, TRUE, 0.7), (False, FALSE, 0.5), (True, TRUE, 0.0)],
]


def item(number, drafts, gold="1"):
    made = tuple(
        DraftRecord(text, gold if right else "7", right, {"good": score, "flat": 0.5}) for right, text, score in drafts
    )
    return ItemRecord(f"i{number}", "t", "q", gold, made, "good", 2.0, False, 1, 0)


def by_pairs(drafts):
    """Probability that a right draft scores above a wrong one, ties half, pair by pair."""
    right = [score for correct, _, score in drafts if correct]
    wrong = [score for correct, _, score in drafts if not correct]
    return sum((r > w) + (r == w) / 2 for r in right for w in wrong) / (len(right) * len(wrong))


@pytest.fixture
def judges():
    records = [item(n, drafts) for n, drafts in enumerate(DRAFTS)]
    return judge_scores(records, 3, {"merged verifier": "good", "coin": "flat"}, "auto")


def test_slices_are_those_of_the_definition(judges):
    drafts = [draft for rows in DRAFTS for draft in rows[:3]]
    checked = [(correct, text, -1.0 if text == FALSE else score) for correct, text, score in drafts]
    passed = [draft for draft in drafts if draft[1] == TRUE]
    merged = judges[0]
    assert merged["all"]["value"] == pytest.approx(by_pairs(drafts))
    assert merged["checked"]["value"] == pytest.approx(by_pairs(checked))
    assert merged["passed"]["value"] == pytest.approx(by_pairs(passed))
    assert (merged["all"]["n"], merged["passed"]["n"]) == (6, 4)


def test_a_score_that_is_blind_has_the_calculator_alone(judges):
    coin = judges[1]
    assert coin["all"]["value"] == coin["passed"]["value"] == 0.5
    assert coin["checked"]["value"] == pytest.approx(0.75)  # four wrong drafts, two found by calculation


def test_nothing_to_tell_apart_is_no_figure_and_answers_in_letters_are_not_calculated():
    records = [item(n, drafts) for n, drafts in enumerate(DRAFTS)]
    right = [replace(row, drafts=(row.drafts[0], row.drafts[3])) for row in records[:1]]
    [row] = judge_scores(right, 2, {"merged verifier": "good"}, "auto")
    assert row["all"] is None
    assert judge_rows([row])[1][2:] == ["–"] * 3
    letters = [item(n, drafts, gold="B") for n, drafts in enumerate(DRAFTS)]
    [row] = judge_scores(letters, 3, {"merged verifier": "good"}, "auto")
    assert row["all"] == row["checked"] == row["passed"]
