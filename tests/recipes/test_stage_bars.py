"""A stage has one bar, which its tasks move to the end."""

import pytest

from mlx_rsgwm.core.progress import LineProgress
from mlx_rsgwm.recipes.stage_bars import StageBars


class Recorded(LineProgress):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text.rsplit(",", 1)[0])


def test_pieces_share_a_bar_that_moves_while_they_run():
    inner = Recorded()
    bars = StageBars(inner)
    with bars.stage("1/2 calibrate", 2):
        with bars.task("draft", 2) as advance:
            advance(1, "")
            with bars.task("a detail", 5) as deeper:
                deeper(5, "")
            advance(1, "")
        with bars.task("verify", 4) as advance:
            advance(2, "")
    assert inner.lines == [
        "1/2 calibrate: 0/100",
        "1/2 calibrate: 25/100, draft 1/2",
        "1/2 calibrate: 50/100, draft 2/2",
        "1/2 calibrate: 75/100, verify 2/4",
        "1/2 calibrate: 100/100",
    ]


def test_more_tasks_than_pieces_do_not_overrun_it_and_failures_do_not_fill_it():
    inner = Recorded()
    bars = StageBars(inner)
    with bars.stage("a", 1):
        for _ in range(3):
            with bars.task("work", 1) as advance:
                advance(1, "note")
    assert inner.lines[-1] == "a: 100/100, note"

    def fail():
        with bars.stage("b", 1), bars.task("work", 2) as advance:
            advance(1, "half")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert inner.lines[-1] == "b: 50/100, half"
    with bars.task("alone", 1) as advance:
        advance(1, "")
    assert inner.lines[-1] == "alone: 1/1"


def test_details_are_for_who_asks():
    for details, shown in ((False, ["news", "worth"]), (True, ["small", "news", "worth"])):
        inner = Recorded()
        bars = StageBars(inner, details)
        bars.detail("small")
        bars.message("news")
        bars.warning("worth")
        assert inner.lines == shown
