"""What a calculator adds, on drafts few enough to follow: beside the verifier, alone, and as a vote."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_rsgwm.evaluation import calculator_systems, metrics
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord, read_items, replay, write_items
from mlx_rsgwm.evaluation.report.folder import read_report, render_table, write_report
from mlx_rsgwm.evaluation.report.summary import summarise_records

# Of "21 - 4": right; a false equation; the wrong operation, rightly calculated; no answer.
RIGHT, FALSE, BLIND, SILENT = "21 - 4 = 17\n#### 17", "21 - 4 = 18\n#### 18", "21 + 4 = 25\n#### 25", "21 - 4 = 19 and"


def draft(text, score):
    value = text.rpartition("#### ")[2] if "####" in text else None
    return DraftRecord(text, value, value == "17", {"yesno": score}, 10, verified={"yesno": 30})


def item(name, *drafts, gold="17", threshold=0.5):
    made = tuple(draft(text, score) for text, score in drafts)
    blank = ItemRecord(name, "change", "q", gold, made, "", 1.0, False, 1, 0)
    return replay(blank, threshold, 3, "yesno")


@pytest.fixture
def records():
    return [
        item("a", (FALSE, 0.9), (RIGHT, 0.8), (RIGHT, 0.1)),  # the verifier is wrong, the calculator right
        item("b", (BLIND, 0.2), (RIGHT, 0.7), (FALSE, 0.9)),  # the verifier is right, the calculator blind
        item("c", (FALSE, 0.9), (FALSE, 0.2), (SILENT, 0.1)),  # nothing to be had
        item("d", (FALSE, 0.3), (BLIND, 0.1), (RIGHT, 0.4)),  # accepted by nobody: the best score of the passing
    ]


def rows(records, name, k=3):
    return [calculator_systems.SYSTEMS[name][1](record, k) for record in calculator_systems.annotated(records, "auto")]


def told(records):
    return [(record.chosen, record.accepted, record.attempts) for record in records]


def test_without_a_check_the_loop_is_what_it_was(records):
    assert told(records) == [(0, True, 1), (1, True, 2), (0, True, 1), (2, False, 3)]
    assert calculator_systems.annotated(records, "none") == records


def test_draft_verify_accepts_no_false_equation_and_does_not_read_it(records):
    checked = rows(records, "draft_verify_arithmetic")
    assert told(checked) == [(1, True, 2), (1, True, 2), (0, False, 3), (2, False, 3)]
    assert [record.verified_tokens for record in checked] == [30, 60, 0, 60]
    assert [record.drafted_tokens for record in checked] == [20, 20, 30, 30]
    assert checked[0].drafts[0].false_equation == "21 - 4 = 18"


def test_the_calculator_takes_the_first_that_passes_and_pays_for_no_verifier(records):
    alone = rows(records, "calculator")
    assert told(alone) == [(1, True, 2), (0, True, 1), (0, False, 3), (1, True, 2)]
    assert [record.verified_tokens for record in alone] == [0, 0, 0, 0]


def test_the_majority_is_of_those_that_pass(records):
    voted = rows(records, "calculator_majority")
    assert [record.returned.value for record in voted] == ["17", "25", "18", "25"]
    assert told(voted)[0] == (1, False, 3)
    assert metrics.majority_index(records[2].drafts) == metrics.majority_index(records[2].drafts, calculated=True) == 0


def test_only_where_the_gold_is_a_number_unless_asked(records):
    worded = [replace(record, gold="yes") for record in records]
    assert calculator_systems.annotated(worded, "auto") == worded
    assert calculator_systems.annotated(worded, "arithmetic")[0].drafts[0].false_equation == "21 - 4 = 18"
    assert "arithmetic" not in summarise_records(worded, 3, check="auto")


def test_rows_of_their_own_and_no_other_figure_moves(records):
    before, after = summarise_records(records, 3), summarise_records(records, 3, check="auto")
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {*calculator_systems.SYSTEMS, "arithmetic"}
    assert after["draft_verify"]["accuracy"]["value"] == 2 / 4
    assert after["draft_verify_arithmetic"]["accuracy"]["value"] == 3 / 4
    assert after["draft_verify_arithmetic"]["false_accept_rate"]["value"] == 0
    assert after["calculator"]["accuracy"]["value"] == 1 / 4
    assert after["calculator_majority"]["accuracy"]["value"] == 1 / 4
    assert after["arithmetic"]["against_draft_verify"]["only_second"] == 1
    assert after["arithmetic"]["against_calculator"]["only_second"] == 2


def test_a_report_shows_them_and_keeps_the_reason(records, tmp_path):
    plain = write_report(tmp_path / "plain", records, 3)
    report = write_report(tmp_path / "report", records, 3, check="auto")
    assert "false_equation" not in (tmp_path / "plain" / "items.jsonl").read_text()
    assert '"check"' not in (tmp_path / "report" / "items.jsonl").read_text()
    _, kept = read_report(tmp_path / "report")
    assert kept[0].drafts[0].false_equation == "21 - 4 = 18"
    assert read_items(tmp_path / "plain" / "items.jsonl") == records
    shown = render_table(report)
    assert "calculator, no verifier" in shown
    assert "with arithmetic checked, same items" in shown
    assert "calculator, no verifier" not in render_table(plain)


def test_several_seeds_have_one_accuracy_over_all(records):
    both = [*records, *(replace(record, seed=1) for record in records)]
    about = summarise_records(both, 3, check="auto")["arithmetic"]
    assert about["seeds"]["draft_verify_arithmetic"]["value"] == 3 / 4


def test_a_checked_record_is_read_back_equal(records, tmp_path):
    checked = rows(records, "draft_verify_arithmetic")
    write_items(tmp_path / "items.jsonl", checked)
    assert read_items(tmp_path / "items.jsonl") == checked
