"""Scores from files and runs: read as they are, matched by item, or refused with the row's number."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.evaluation.tails.accepted_wrong import compare_tails, expected_worst
from mlx_rsgwm.evaluation.tails.scores import read_scores, same_items, wrongly_accepted


def record(name, score, correct, threshold=0.5):
    draft = DraftRecord("text", "1" if correct else "2", correct, {"yesno": score}, 3)
    return ItemRecord(name, "task", "q", "1", (draft,), "yesno", threshold, score >= threshold, 1, 0)


def test_lines_tables_and_arrays_give_the_same(tmp_path):
    rows = [{"id": f"i{n}", "score": n / 7} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("id,score\n" + "".join(f"{row['id']},{row['score']!r}\n" for row in rows))
    (tmp_path / "a.tsv").write_text("score\tid\n" + "".join(f"{row['score']!r}\t{row['id']}\n" for row in rows))
    for suffix in ("jsonl", "json", "csv", "tsv"):
        read = read_scores(tmp_path / f"a.{suffix}")
        assert read.ids == ("i0", "i1", "i2", "i3", "i4")
        np.testing.assert_array_equal(read.scores, np.arange(5) / 7)


def test_items_without_names_count_by_their_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"toxicity": 0.5}\n\n{"toxicity": 1}\n')
    read = read_scores(tmp_path / "a.jsonl", "toxicity")
    assert read.ids == ("1", "2")
    np.testing.assert_allclose(read.scores, [0.5, 1.0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"score": NaN}\n', "line 1"),
        ('{"score": 1}\n{"scor": 2}\n', "line 2: no score; did you mean --column scor"),
        ('{"score": "much"}\n', "'much', not a number"),
        ('{"score": true}\n', "True, not a number"),
        ('{"score": "1_0"}\n', "'1_0', not a number"),
        ('{"score": 1, "id": "a"}\n{"score": 2}\n', "line 2: no id"),
        ('{"score": 1e999}\n', "line 1"),
        ("[1, 2]\n", "not a JSON object"),
        ('{"score": 1, "id": "a"}\n{"score": 2, "id": "a"}\n', "'a' is there twice"),
        ("\n", "no scores"),
    ],
)
def test_what_is_no_score_is_refused_with_its_row(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(RsgwmError, match=words):
        read_scores(tmp_path / "a.jsonl")


def test_files_of_other_items_are_refused_and_others_put_in_order(tmp_path):
    for name, ids in (("a", "xyz"), ("b", "zxy"), ("c", "xyw")):
        lines = [json.dumps({"id": item, "score": ord(item)}) + "\n" for item in ids]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    first, second, third = (read_scores(tmp_path / f"{name}.jsonl") for name in "abc")
    np.testing.assert_array_equal(same_items(first, second).scores, first.scores)
    with pytest.raises(RsgwmError, match=r"1 only in the first \(z\), 1 only in the second \(w\)"):
        same_items(first, third)


def test_log_odds_of_chances_alone(tmp_path):
    (tmp_path / "a.csv").write_text("id,score\na,0.25\nb,0.75\n")
    read = read_scores(tmp_path / "a.csv")
    np.testing.assert_allclose(read.logits().scores, [np.log(1 / 3), np.log(3)])
    (tmp_path / "b.csv").write_text("id,score\na,0.25\nb,1\n")
    near = np.array([1e-300, 1e-9, 1 - 1e-12, 0.5])  # what other logits clip is the tail here
    (tmp_path / "c.csv").write_text("score\n" + "".join(f"{chance!r}\n" for chance in near.tolist()))
    np.testing.assert_allclose(
        read_scores(tmp_path / "c.csv").logits().scores, [np.log(1e-300), np.log(1e-9), -np.log(1e-12), 0.0], rtol=1e-4
    )
    with pytest.raises(RsgwmError, match="1 scores are not between 0 and 1"):
        read_scores(tmp_path / "b.csv").logits()


def test_a_column_of_names_that_is_asked_for_is_there(tmp_path):
    (tmp_path / "a.csv").write_text("item,score\na,1\nb,2\n")
    (tmp_path / "b.csv").write_text("id,score\na,1\nb,2\n")
    with pytest.raises(RsgwmError, match=r"has no column 'itme'; did you mean --id item\?"):
        read_scores(tmp_path / "a.csv", id_column="itme")
    with pytest.raises(RsgwmError, match=r"b.csv names its items and .*a.csv does not; .*--id"):
        same_items(read_scores(tmp_path / "a.csv"), read_scores(tmp_path / "b.csv"))
    named = read_scores(tmp_path / "a.csv", id_column="item")
    assert same_items(named, read_scores(tmp_path / "b.csv")).ids == ("a", "b")


def test_a_runs_log_odds_are_clipped_at_what_float32_tells_apart():
    records = [record("a", 1 - 2.0**-24, False), record("b", 1.0, False), record("c", 0.6, False)]
    read = wrongly_accepted(records, "run")
    np.testing.assert_allclose(read.scores, [np.log(2.0**24), np.log(2.0**25), np.log(1.5)], rtol=1e-6)


def test_of_a_run_wrong_answers_that_were_accepted_count_alone():
    records = [record("a", 0.9, False), record("b", 0.8, True), record("c", 0.2, False), record("d", 0.6, False)]
    read = wrongly_accepted(records, "run")
    assert read.ids == ("a/0", "d/0")
    np.testing.assert_allclose(read.scores, [np.log(9), np.log(1.5)])
    with pytest.raises(RsgwmError, match="no wrong answer was accepted"):
        wrongly_accepted(records[1:3], "run")


def test_the_worst_twentieth_is_compared_and_few_answers_decide_nothing():
    random = np.random.default_rng(0)
    runs = [[record(f"{n}", score, False) for n, score in enumerate(random.uniform(0.5, 1, size=60))] for _ in range(2)]
    told = compare_tails(*runs, ("A", "B"))
    logits = wrongly_accepted(runs[0], "A").scores
    assert told["runs"][0]["cvar"] == pytest.approx(np.sort(logits)[-3:].mean())
    assert told["runs"][0]["interval"][0] <= told["runs"][0]["cvar"] <= told["runs"][0]["interval"][1]
    assert (told["verdict"], told["runs"][1]["answers"]) == ("INCONCLUSIVE", 60)
    assert "4000 wrong answers" in told["reason"]
    assert expected_worst(np.array([1.0, 5.0])) == 5.0


def test_many_wrong_answers_are_judged_by_the_gates():
    random = np.random.default_rng(0)
    runs = [
        [record(f"{n}", 1 / (1 + np.exp(-value)), False) for n, value in enumerate(random.exponential(size=size))]
        for size in (4100, 4300)
    ]
    told = compare_tails(*runs, ("A", "B"))
    assert told["verdict"] == "REJECT"
    assert [gate["number"] for gate in told["gates"]] == [1, 2, 3, 4, 5]
