"""Drafts that state a false equation: not accepted, not shown to the verifier, returned only when all do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.inference.draft import Answer, Draft
from mlx_rsgwm.inference.policy import LoopConfig, decide, failed_check

QUESTION = "Ada has 21 pens and gives away 4. How many pens are left?"
FALSE, RIGHT = "21 - 4 = 18\n#### 18", "21 - 4 = 17\n#### 17"


@pytest.fixture
def writing(make_loop, monkeypatch):
    """Makes a loop whose drafter writes the given texts, and the list of attempts that its verifier reads."""

    def make(texts, **settings):
        loop = make_loop(len(texts), 4)
        loop.config = replace(loop.config, **settings)
        write = lambda draft: replace(draft, text=texts[draft.attempt - 1], tokens=(draft.attempt, 7))  # noqa: E731
        monkeypatch.setattr(type(loop), "_with_text", lambda self, draft: write(draft))
        read = []
        for name in ("signals", "signals_many"):
            method = getattr(loop.reader, name)

            def reading(questions, drafts, *arguments, method=method, **named):
                read.extend(draft.attempt for draft in drafts)
                return method(questions, drafts, *arguments, **named)

            monkeypatch.setattr(loop.reader, name, reading)
        return loop, read

    return make


@pytest.mark.parametrize("mode", ["sequential", "parallel", "adaptive"])
def test_a_false_draft_is_rejected_unread_and_the_next_one_is_judged(writing, mode):
    loop, read = writing([FALSE, RIGHT, RIGHT], threshold=0.0, check="auto", mode=mode)
    first, judged, second, accepted, answer = loop.steps(QUESTION)
    assert (first.state, second.state, accepted.state) == ("drafted", "drafted", "accepted")
    assert (judged.state, judged.score, judged.signals) == ("rejected", None, None)
    assert judged.false_equation == "21 - 4 = 18"
    assert read == [2]
    assert answer == Answer(RIGHT, accepted.score, True, 2)
    assert loop.answer_many([QUESTION])[0] == replace(answer, score=pytest.approx(answer.score, abs=1e-5))


def test_without_an_acceptable_draft_the_best_that_calculates_rightly_is_returned(writing):
    loop, read = writing([FALSE, RIGHT, FALSE], threshold=1.0, check="arithmetic")
    answer = loop.answer(QUESTION)
    assert (answer.text, answer.accepted, answer.attempts, answer.false_equation) == (RIGHT, False, 3, None)
    assert read == [2]


def test_where_every_draft_is_false_the_first_is_the_last_resort_and_says_so(writing):
    loop, read = writing([FALSE, FALSE], threshold=0.0, check="auto")
    assert loop.answer(QUESTION) == Answer(FALSE, 0.0, False, 2, "21 - 4 = 18")
    assert loop.answer_many([QUESTION] * 2) == [Answer(FALSE, 0.0, False, 2, "21 - 4 = 18")] * 2
    assert read == []
    loop.config = replace(loop.config, abstain=True)
    assert loop.answer(QUESTION).text is None


def test_without_the_check_nothing_changes(writing):
    loop, read = writing([FALSE, RIGHT], threshold=0.0)
    steps = list(loop.steps(QUESTION))
    assert [step.state for step in steps[:-1]] == ["drafted", "accepted"]
    assert read == [1]
    assert all(draft.false_equation is None for draft in steps if isinstance(draft, Draft))
    assert LoopConfig().check == "none"


def test_which_drafts_are_checked():
    assert failed_check(FALSE, QUESTION, "none") is None
    assert failed_check(FALSE, QUESTION, "auto") == failed_check(FALSE, QUESTION, "arithmetic") == "21 - 4 = 18"
    chosen = "21 - 4 = 18, so it is more than 10.\nyes"
    assert failed_check(chosen, QUESTION, "auto") is None
    assert failed_check(chosen, QUESTION, "arithmetic") == "21 - 4 = 18"
    assert failed_check("3 * 4 = 25\n#### 25", "Let a * b = a^2 + b^2. What is 3 * 4?", "arithmetic") is None
    assert failed_check("", QUESTION, "auto") is None


def test_a_draft_that_failed_is_never_accepted_and_comes_last():
    assert decide([None, 0.2, 0.9], 0.1).chosen == 1
    assert decide([None, 0.0], 0.0).accepted
    assert decide([None, None], 0.0) == decide([None, None], 0.7)
    last = decide([None, 0.0, None], 0.5)
    assert (last.chosen, last.attempts, last.accepted) == (1, 3, False)
    with pytest.raises(RsgwmError, match="check must be one of"):
        LoopConfig(check="spelling")
