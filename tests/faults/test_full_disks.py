"""A disk that is full after so many bytes, at every size that a command can meet.

The command ends in one line and exit 2 and leaves nothing that passes for a result; with room again it makes what it
always makes.
"""

from __future__ import annotations

import pytest

from tests.faults.catalogue import KINDS

SIZES = 24


def sizes(total: int, count: int) -> list[int]:
    """Even steps through what is written, no byte and one too few among them."""
    return sorted({*(total * step // count for step in range(count)), total - 1})


@pytest.mark.parametrize("name", ["merge", "convert to-gguf"])
def test_a_disk_full_at_a_few_sizes(harness, name):
    made = harness(name)
    assert [wrong for room in sizes(made.written, 3) if (wrong := made.fill(room)) != "again"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_a_disk_full_at_every_size(harness, tally, name):
    made = harness(name)
    outcomes = [made.fill(room) for room in sizes(made.written, SIZES)]
    tally.keep(name, "sizes", outcomes, bytes=made.written)
    assert [outcome for outcome in outcomes if outcome != "again"] == []
