"""Verify rows from own drafts: balance, pairing, shares, and where they run out."""

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.arithmetic import false_equations
from mlx_rsgwm.data.hard_negatives import make_mixed_rows
from mlx_rsgwm.data.synthetic import generate

QUESTIONS = generate("change", 20, 7, "train")


def drafts_of(question, right=1, wrong=1):
    good = [(f" own way to {question.gold}, number {n}\n#### {question.gold}", True) for n in range(right)]
    bad = [(f" own mistake {n}\n#### -{n + 1}", False) for n in range(wrong)]
    return [*good, *bad, *good, *bad]


def test_pairs_share_a_question_and_are_balanced():
    drafts = [drafts_of(question) for question in QUESTIONS]
    found = make_mixed_rows(QUESTIONS, drafts, 16, 0.75, 1)
    assert (found.drafted_pairs, found.perturbed_pairs, found.missing) == (12, 4, 0)
    assert len(found.rows) == 32
    assert len({row.id for row in found.rows}) == 32
    gold = {question.question: question for question in QUESTIONS}
    for right, wrong in zip(found.rows[::2], found.rows[1::2], strict=True):
        assert (right.correct, wrong.correct) == (True, False)
        assert right.question == wrong.question
        assert right.role == wrong.role == "verify"
        assert right.answer.endswith(f"#### {gold[right.question].gold}")
        assert not wrong.answer.endswith(f"#### {gold[right.question].gold}")
        if "drafted" in right.id:
            assert "own way" in right.answer  # a right draft, not the gold answer
            assert "own mistake" in wrong.answer
        else:
            assert right.answer == gold[right.question].answer
    assert all(row.answer == row.answer.strip() for row in found.rows)
    assert make_mixed_rows(QUESTIONS, drafts, 16, 0.75, 1) == found
    assert make_mixed_rows(QUESTIONS, drafts, 16, 0.75, 2).rows != found.rows


def test_perturbed_pairs_take_other_questions():
    drafts = [drafts_of(question) for question in QUESTIONS]
    rows = make_mixed_rows(QUESTIONS, drafts, 16, 0.5, 1).rows
    kinds = {kind: {row.question for row in rows if f"/{kind}" in row.id} for kind in ("drafted", "perturbed")}
    assert len(kinds["drafted"]) == len(kinds["perturbed"]) == 8
    assert not kinds["drafted"] & kinds["perturbed"]


def test_without_a_right_draft_the_gold_answer_stands_in():
    found = make_mixed_rows(QUESTIONS, [drafts_of(q, right=0) for q in QUESTIONS], 20, 1.0, 1)
    assert {row.answer for row in found.rows if row.correct} == {question.answer for question in QUESTIONS}


def test_every_question_gives_one_before_any_gives_two():
    drafts = [drafts_of(question, wrong=1 + 2 * (index < 3)) for index, question in enumerate(QUESTIONS)]
    rows = make_mixed_rows(QUESTIONS, drafts, 24, 1.0, 1).rows
    wrong = [row for row in rows if not row.correct]
    assert len({row.question for row in wrong}) == 20
    assert len({(row.question, row.answer) for row in wrong}) == 24, "the same mistake never stands twice"
    assert {row.question for row in wrong[20:]} <= {question.question for question in QUESTIONS[:3]}


def test_missing_mistakes_are_made_up_and_told():
    drafts = [drafts_of(question, wrong=int(index < 5)) for index, question in enumerate(QUESTIONS)]
    found = make_mixed_rows(QUESTIONS, drafts, 16, 0.75, 1)
    assert (found.drafted_pairs, found.perturbed_pairs, found.missing) == (5, 11, 7)


def test_fewer_pairs_where_there_are_no_more_wrong_answers():
    none = [[] for _ in QUESTIONS]
    found = make_mixed_rows(QUESTIONS, none, 40, 1.0, 1, at_most=True)
    assert (found.drafted_pairs, found.perturbed_pairs, found.missing, len(found.rows)) == (0, 20, 40, 40)


def test_what_is_refused():
    none = [[] for _ in QUESTIONS]
    with pytest.raises(RsgwmError, match=r"gave only 0 with a wrong draft and 20 with a perturbed"):
        make_mixed_rows(QUESTIONS, none, 40, 1.0, 1)
    with pytest.raises(RsgwmError, match="share in"):
        make_mixed_rows(QUESTIONS, none, 4, 1.5, 1)
    with pytest.raises(RsgwmError, match="pairs must be"):
        make_mixed_rows(QUESTIONS, none, 0, 0.5, 1)


def test_drafts_that_a_calculator_finds_can_be_left_out():
    drafts = []
    for question in QUESTIONS:
        right, wrong = question.answer, f"2 + 2 = 4\n#### {int(question.gold) + 1}"
        drafts.append([(right, True), (f"2 + 2 = 5\n#### {int(question.gold) + 2}", False), (wrong, False)])
    rows = make_mixed_rows(QUESTIONS, drafts, 30, 20 / 30, 1, true_equations=True).rows
    wrong = [row.answer for row in rows if not row.correct]
    assert sum(answer.startswith("2 + 2 = 4\n") for answer in wrong) == 20
    assert not any(false_equations(answer) for answer in wrong)
    without = make_mixed_rows(QUESTIONS, drafts, 30, 20 / 30, 1).rows
    assert any(false_equations(row.answer) for row in without if not row.correct)
