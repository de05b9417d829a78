"""Every command is tried on failing machines, or has a reason why not."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from mlx_rsgwm.cli.commands import COMMANDS, full_name
from tests.faults import tally
from tests.faults.catalogue import KINDS, NOT_HERE

WRITES = {"--out", "--replace", "--drafts-file", "--tables", "--certificate"}


def options(name: str) -> set[str]:
    module, attribute = COMMANDS[name][0].split(":")
    return {option for given in getattr(import_module(module), attribute).params for option in given.opts}


def test_every_command_is_in_the_catalogue_or_has_a_reason_not_to_be():
    commands = {
        name: full_name([str(word) for word in kind.arguments(Path("w"), Path("b"), Path("p"))])
        for name, kind in KINDS.items()
    }
    # each goes by its command's name, and where a command is tried twice by an option, too
    assert all(name.partition(" --")[0] == command for name, command in commands.items())
    tried = set(commands.values())
    assert not tried & set(NOT_HERE)
    assert tried | set(NOT_HERE) == set(COMMANDS), "a new command: put it into KINDS, or into NOT_HERE with the reason"


def test_the_page_shows_the_counts_that_were_kept():
    page, known = tally.PAGE.read_text(encoding="utf-8"), json.loads(tally.COUNTS.read_text(encoding="utf-8"))
    assert tally.with_table(page, known) == page, "python tests/faults/tally.py"
    assert {trial for trials in known.values() for trial in trials} <= set(tally.TRIALS)


def test_a_tally_counts_each_outcome_once_and_shows_what_went_wrong(tmp_path, monkeypatch):
    commits = iter(["1234567", "1234567", "89abcde"])
    monkeypatch.setattr(tally, "commit", lambda: next(commits))
    kept = tally.Tally(str(tmp_path / "counts.json"))
    kept.keep("a", "kills", ["again", "finished", "lost: event 3"], events=9, states=2)
    kept.keep("a", "sizes", ["again", "wrong: 2 bytes"])
    kept.keep("a", "sizes", ["again", "left over: 2 bytes"])  # tried anew: only the last counts
    rows = tally.table(json.loads((tmp_path / "counts.json").read_text())).splitlines()
    assert rows[2] == "| a | 3 of 9 events, 2 states | 2 | – | – | – | 1 | 0 | 1 | 1234567, 89abcde |"
    assert rows[3] == "| all | 3 of 9 events, 2 states | 2 | 0 | 0 | 0 | 1 | 0 | 1 |  |"


def test_what_writes_where_it_is_told_to_is_not_said_to_write_nothing():
    silent = [name for name, reason in NOT_HERE.items() if reason == "writes nothing"]
    assert {name: options(name) & WRITES for name in silent if options(name) & WRITES} == {}
