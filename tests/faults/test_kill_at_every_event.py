"""kill -9 before every change that a command makes to its files, and in the middle of every write.

The same command again then ends in the same bytes, or says in one line that the work is finished; either way nothing
half written is believed and nothing is left lying about.
"""

from __future__ import annotations

import os

import pytest

from tests.faults.catalogue import KINDS, SMALL
from tests.faults.tally import RIGHT


@pytest.mark.parametrize("name", ["merge", "convert from-gguf", "data negatives", "recipe init", "hub pull"])
def test_killed_at_a_few_events(harness, name):
    found = harness(name)
    events = sorted({1, 2, found.events // 2, found.events - 1, found.events})
    outcomes = [found.kill(event) for event in events]
    assert [outcome for outcome in outcomes if outcome not in RIGHT] == []
    assert "again" in outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_killed_at_every_event(harness, tally, name):
    """At every one, or where RSGWM_MOST_EVENTS says how many are enough, at so many evenly through them."""
    found = harness(name)
    most = min(found.events, int(os.environ.get("RSGWM_MOST_EVENTS", found.events)))
    outcomes = [found.kill(1 + number * (found.events - 1) // max(1, most - 1)) for number in range(most)]
    tally.keep(name, "kills", outcomes, events=found.events)
    assert [outcome for outcome in outcomes if outcome not in RIGHT] == []


def saved(folder):
    """The last step that training had saved there; more than any once it is finished and older ones are gone."""
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoints/step-*")]
    return 10**6 if (folder / "manifest.json").exists() else max(steps, default=0)


def first_event_of(found, step):
    """The first event a kill at which leaves a step saved."""
    low, high = 1, found.events
    while low < high:
        middle = (low + high) // 2
        found.fresh()
        found.once(kill_at=middle)
        low, high = (low, middle) if saved(found.place / "out") >= step else (middle + 1, high)
    return low


@pytest.mark.slow
def test_training_killed_at_every_event_of_a_checkpoint(harness, tally):
    """From the moment that one is there to the moment that the next one is: everything that a checkpoint writes."""
    found = harness("train")
    every = SMALL[SMALL.index("--save-every") + 1]
    begin, end = (first_event_of(found, count * every) for count in (2, 3))
    assert end > begin + 20
    outcomes = [found.kill(event) for event in range(begin, end + 1)]
    tally.keep("train: one checkpoint", "kills", outcomes)
    assert [outcome for outcome in outcomes if outcome not in RIGHT] == []
