"""kill -9 before every change that a command makes to its files, and in the middle of every write.

The same command again then ends in the same bytes, or says in one line that the work is finished or what to remove;
either way nothing half written is believed and nothing is left lying about.
"""

from __future__ import annotations

import pytest

from tests.faults.catalogue import KINDS


def killed_at(harness, events):
    outcomes = [harness.kill(event) for event in events]
    assert [outcome for outcome in outcomes if outcome not in ("again", "finished")] == []
    return {name: outcomes.count(name) for name in ("again", "finished")}


@pytest.mark.parametrize("name", ["merge", "to-peft", "data build"])
def test_killed_at_a_few_events(harness, name):
    found = harness(name)
    assert killed_at(found, sorted({1, 2, found.events // 2, found.events - 1, found.events}))["again"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_killed_at_every_event(harness, name):
    found = harness(name)
    counts = killed_at(found, range(1, found.events + 1))
    print(f"{name}: {found.events} events, {counts['again']} again, {counts['finished']} finished already")
