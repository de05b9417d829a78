"""A disk that is full after so many bytes, at every size that a command can meet.

The command ends in one line and exit 2 and leaves nothing that passes for a result; with room again it makes what it
always makes.
"""

from __future__ import annotations

import pytest

from tests.faults.catalogue import KINDS
from tests.faults.harness import Harness

SIZES = 24


def filled(harness: Harness, room: int) -> str:
    """What was wrong with a command on a disk of ``room`` bytes, and with the same one when there is room again."""
    harness.fresh()
    full = harness.once(room=room)
    lines = full.stderr.strip().splitlines()
    if full.code != 2 or len(lines) != 1:
        return f"{room} bytes: exit {full.code}: {full.stderr[-400:]}"
    if not any(said in lines[0] for said in ("cannot write", "cannot create", "too large for the disk", "disk space")):
        return f"{room} bytes: {lines[0]}"
    again = harness.once()
    if again.code != 0 or harness.made() != harness.expected:
        return f"{room} bytes: then exit {again.code}: {again.stderr[-400:]}"
    return f"{room} bytes: left over {harness.left_over()}" if harness.left_over() else ""


def sizes(total: int, count: int) -> list[int]:
    """Even steps through what is written, none and the last byte among them."""
    return sorted({*(total * step // count for step in range(count)), total - 1})


@pytest.mark.parametrize("name", ["merge", "to-gguf"])
def test_a_disk_full_at_a_few_sizes(harness, name):
    made = harness(name)
    assert [wrong for room in sizes(made.written, 3) if (wrong := filled(made, room))] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_a_disk_full_at_every_size(harness, name):
    made = harness(name)
    rooms = sizes(made.written, SIZES)
    print(f"{name}: {len(rooms)} sizes of {made.written} bytes")
    assert [wrong for room in rooms if (wrong := filled(made, room))] == []
