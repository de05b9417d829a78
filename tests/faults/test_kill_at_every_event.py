"""kill -9 before every change that a command makes to its files, before every write and in the middle of it.

The same command again then ends in the same bytes, or says in one line that the work is finished; either way nothing
half written is believed and nothing is left lying about.
"""

from __future__ import annotations

import os

import pytest

from mlx_rsgwm.core.temporary import boot
from tests.faults.catalogue import KINDS
from tests.faults.harness import KILLED
from tests.faults.states import Recorder, key_of, names_in, restore
from tests.faults.tally import RIGHT


@pytest.mark.parametrize("name", ["merge", "convert from-gguf", "data negatives", "recipe init", "hub pull"])
def test_killed_at_a_few_events(harness, name):
    found = harness(name)
    events = sorted({1, 2, found.events // 2, found.events - 1, found.events})
    outcomes = [found.kill(event) for event in events]
    assert [outcome for outcome in outcomes if outcome not in RIGHT] == []
    assert "again" in outcomes


# One that links, one that copies a file, one that writes through the C library's buffers.
@pytest.mark.parametrize("name", ["merge", "recipe init", "fuse", "convert to-gguf"])
def test_a_kill_leaves_what_a_process_shows_that_is_held_there(harness, name):
    found = harness(name, states=True)
    assert list(found.keys) == list(range(1, found.events + 1))
    for event in sorted({2, found.events // 3, 2 * found.events // 3, found.events}):
        shown = [names_in(found.states[key]) for key in found.keys[event]]
        found.fresh()
        assert found.once(kill_at=event).code == KILLED
        assert names_in(found.now()) == shown[-1], event


def test_what_is_read_of_the_half_written_is_counted(server, tmp_path):
    names = [tmp_path / f".recipe.{pid}-{boot()}0000-0.tmp.yaml" for pid in (7, 77)]
    for name in names:
        name.write_text("name: [")
    ended = [server.run(["run", name, "--dry-run"], tmp_path, dead=f".7-{boot()}") for name in names]
    assert [(one.code, one.peeks > 0) for one in ended] == [(2, True), (2, False)]


def test_states_are_the_same_whoever_wrote_what_is_half_written_in_them(tmp_path):
    def state(pid, number, text, inside):
        root = tmp_path / f"{pid}-{number}"
        part = root / f".out.{pid}-{boot()}0000-{number}.part"
        part.mkdir(parents=True)
        (part / "config.json").write_text(text)
        if inside:
            (part / f".manifest.{pid}-{boot()}0000-{number}.tmp.json").write_text(text)
        (root / "rows.jsonl").write_text("finished")
        return Recorder(root, tmp_path / "store").state(), root

    (first, _), (second, root) = state(7, 0, "half", True), state(77, 3, "", False)
    assert key_of(first) == key_of(second)
    restore(second, tmp_path / "store", tmp_path / "again")
    assert Recorder(tmp_path / "again", tmp_path / "store").state().keys() == second.keys()
    (root / "rows.jsonl").write_text("other")
    assert key_of(Recorder(root, tmp_path / "store").state()) != key_of(first)
    (root / "rows.jsonl").write_text("finished")
    next(root.glob(".*/config.json")).unlink()  # what stands in a half-written folder may be looked for by its name
    assert key_of(Recorder(root, tmp_path / "store").state()) != key_of(first)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_killed_at_every_event(harness, tally, name):
    """At every one, or where RSGWM_MOST_EVENTS says how many are enough, at so many evenly through them."""
    found = harness(name, states=True)
    most = min(found.events, int(os.environ.get("RSGWM_MOST_EVENTS", found.events)))
    events = [1 + number * (found.events - 1) // max(1, most - 1) for number in range(most)]
    outcomes = [found.from_states_of(event) for event in events]
    tally.keep(name, "kills", outcomes, events=found.events, states=len(found.outcomes))
    assert [outcome for outcome in outcomes if outcome not in RIGHT] == []
