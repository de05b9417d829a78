"""Limits of addresses (``ulimit -v``) under which MLX crashes: one line says so, and nothing finished is lost."""

from __future__ import annotations

import pytest

from tests.faults.tally import RIGHT

MEGABYTES = [1, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 768]
LONG = ["train", "merge", "eval"]


def limited(found, megabytes):
    """How a command went on after it had so much memory beside what its libraries take: an outcome of ``tally``."""
    found.fresh()
    ended = found.once(memory=megabytes << 20)
    said = ended.stderr.strip().splitlines()
    if ended.code == 0:
        return "finished" if found.made() == found.expected else f"wrong: {megabytes} MB: other bytes"
    if ended.code != 2 or not ("out of memory" in said[-1] or "does not fit" in said[-1]) or "lower" not in said[-1]:
        return f"wrong: {megabytes} MB: exit {ended.code}: {ended.stderr[-600:]}"
    return found.again(f"{megabytes} MB")


@pytest.mark.parametrize("name", ["train"])
def test_a_few_limits(harness, name):
    found = harness(name)
    assert [limited(found, 1), limited(found, 1024)] == ["again", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_many_limits(harness, tally, name):
    found = harness(name)
    outcomes = [limited(found, megabytes) for megabytes in MEGABYTES]
    tally.keep(name, "memory limits", outcomes)
    assert [outcome for outcome in outcomes if outcome not in RIGHT] == []
    assert {"again", "finished"} <= set(outcomes)
