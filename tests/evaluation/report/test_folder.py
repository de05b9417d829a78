"""The report folder: whole, readable back, the same numbers everywhere."""

import json
import random
from dataclasses import replace

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation import metrics
from mlx_rsgwm.evaluation.metrics import ItemRecord
from mlx_rsgwm.evaluation.records import DraftRecord
from mlx_rsgwm.evaluation.report import folder as report


def make_records(n=24, k=3):
    rng = random.Random(0)
    records = []
    for index in range(n):
        drafts = []
        for _ in range(k):
            right = rng.random() < 0.5
            value = "1" if right else rng.choice(["2", None])
            score = min(1.0, max(0.0, rng.random() * 0.6 + 0.4 * right))
            drafts.append(DraftRecord("text ▸ #### 1", value, right, {"yesno": score, "mean_logprob": rng.random()}, 4))
        row = ItemRecord(f"i{index}", f"family|{index % 4}", "q", "1", tuple(drafts), "yesno", 2.0, False, 1, 0)
        records.append(metrics.replay(row, 0.7, k))
    return records


def test_folder_is_whole_and_reads_back(tmp_path):
    records = make_records()
    summary = report.write_report(
        tmp_path / "out" / "report", records, 3, {"base": "toy", "seed": 0}, {"drafter": 2.0, "draft_verify": 6.0}
    )
    folder = tmp_path / "out" / "report"
    names = ["items.jsonl", "plot.png", "report.html", "report.json", "report.md"]
    assert sorted(path.name for path in folder.iterdir()) == names
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(summary))
    assert report.read_items(folder / "items.jsonl") == records
    again = report.summarise_records(
        report.read_items(folder / "items.jsonl"), 3, stored["metadata"], {"drafter": 2.0, "draft_verify": 6.0}
    )
    assert json.loads(json.dumps(again)) == {name: value for name, value in stored.items() if name != "files"}
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert stored["draft_verify"]["items_per_minute"] == pytest.approx(240)
    assert stored["oracle"]["any_of_k"]["value"] >= stored["draft_verify"]["accuracy"]["value"]
    assert len(stored["sweep"]["yesno"]) == 21


def test_text_and_markdown_show_every_row_with_interval_and_n():
    summary = report.summarise_records(make_records(), 3)
    text, markdown = report.render_table(summary), report.render_markdown(summary)
    cell = report.show(summary["draft_verify"]["accuracy"])
    rate = summary["draft_verify"]["false_accept_rate"]
    for shown in (text, markdown):
        assert all(label in shown for label in report.ROWS.values())
        assert cell in shown
        assert f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" in shown
        assert "mean_logprob" in shown
        assert "yesno (used)" in shown
        assert "oracle" in shown
    accept_line = next(line for line in text.split("\n") if line.startswith("False-accept rate "))
    assert accept_line.split()[-1] == str(rate["n"])
    assert r"family\|0" in markdown
    assert "nan" not in text.lower()


def test_missing_drafts_leave_dashes(tmp_path):
    records = [
        ItemRecord("a", "t", "q", "1", (DraftRecord("1", "1", True, {"yesno": 0.9}),), "yesno", 0.7, True, 1, 0),
        ItemRecord("b", "t", "q", "1", (DraftRecord("1", "1", True, {"yesno": 0.8}),), "yesno", 0.7, True, 1, 0),
    ]
    summary = report.write_report(tmp_path, records, 3)
    assert summary["oracle"] == {"any_of_k": None, "majority_of_k": None, "gap_closed": None}
    assert summary["verifier_auroc"] == {"yesno": {"all": None, "first": None, "passed": None}}
    assert summary["verifier"]["yesno"]["all"]["aurc"]["value"] == 0
    assert "–" in report.render_table(summary)


@pytest.mark.parametrize("items", [6, 7])
def test_report_json_is_never_beside_other_items_after_a_crash(tmp_path, monkeypatch, items):
    report.write_report(tmp_path, make_records(6), 3)
    before = (tmp_path / "report.json").read_text()

    def fail(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "plot_report", fail)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(tmp_path, make_records(items), 3)
    if items == 6:  # the same: without it the report could not be written anew
        assert (tmp_path / "report.json").read_text() == before
    else:
        assert not (tmp_path / "report.json").exists()
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]


def test_bad_items_file_names_the_line(tmp_path):
    path = tmp_path / "items.jsonl"
    report.write_items(path, make_records(2))
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(RsgwmError, match=r"items\.jsonl line 3: not valid JSON"):
        report.read_items(path)
    path.write_text('{"id": 1}\n')
    with pytest.raises(RsgwmError, match="line 1: not an item record"):
        report.read_items(path)


def test_any_task_name_can_be_drawn_and_tabled(tmp_path):
    names = ["costs in $ and $x_$", r"$\frac{$", "a" * 300, "two\nlines", "名前", "a|b<c>&d"]
    records = [replace(record, task=task) for record, task in zip(make_records(6), names, strict=True)]
    summary = report.write_report(tmp_path / "report", records, 3)
    assert (tmp_path / "report" / "plot.png").read_bytes().startswith(b"\x89PNG")
    families = report.render_table(summary).split("\n\n")[1].split("\n")
    assert len(families) == 3 + len(names)
    assert max(map(len, families)) < 160


def test_drafts_that_were_cut_off_are_told_as_such():
    cut = DraftRecord("so 3 +", None, False, {"yesno": 0.1}, 4, finished=False)
    records = [ItemRecord(f"i{index}", "t", "q", "1", (cut,), "yesno", 0.5, False, 1, 0) for index in range(4)]
    text = report.render_table(report.summarise_records(records, 1))
    shown = {line[:38].strip(): line[38:].split()[0] for line in text.split("\n")[3:8]}
    assert [shown[name] for name in ("Accuracy", "No answer", "Cut off")] == ["0.000", "0.000", "1.000"]
    assert metrics.table(records, "drafter").wrong_rate.value == 0


def test_records_of_earlier_versions_are_read():
    old = DraftRecord("x", None, False, status="refusal"), DraftRecord("x", None, False, status="truncated")
    assert [draft.status for draft in old] == ["no_answer", "cut_off"]
