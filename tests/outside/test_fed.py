"""Shares of what is fed, and their counts in docs/reliability.md."""

from __future__ import annotations

import json

from tests.faults import tally
from tests.outside import fed


def test_shares_are_of_all_cases_and_all_of_them_where_none_is_asked_for(monkeypatch):
    monkeypatch.delenv("RSGWM_SHARE", raising=False)
    assert fed.share(range(100), "merge") == list(range(100))
    monkeypatch.setenv("RSGWM_SHARE", "20")
    starts = {fed.share(range(100), name)[0] for name in ("merge", "train", "eval", "fuse")}
    assert len(starts) > 1
    assert all(len(fed.share(range(100), name)) == 5 for name in ("merge", "train"))
    assert fed.at_most(1400) == 70


def test_counts_are_kept_by_what_is_tried_and_summed(monkeypatch, tmp_path):
    monkeypatch.setattr(fed, "commit", lambda: "1234567")
    monkeypatch.setenv("RSGWM_FED", str(tmp_path / "fed.json"))
    fed.keep("odd values", "merge", 9, 90, 1)
    fed.keep("odd values", "merge", 10, 90, 0)  # tried anew: only the last counts
    fed.keep("odd values", "train", 5, 5, 0)
    rows = fed.table(json.loads((tmp_path / "fed.json").read_text())).splitlines()
    assert rows[2:] == ["| odd values | 2 | 15 | 95 | 0 | 1234567 |"]


def test_the_page_shows_the_counts_that_were_kept():
    page, known = tally.PAGE.read_text(encoding="utf-8"), json.loads(fed.COUNTS.read_text(encoding="utf-8"))
    assert tally.put_into(page, fed.BEGIN, fed.table(known), fed.END) == page, "python -m tests.outside.fed"
