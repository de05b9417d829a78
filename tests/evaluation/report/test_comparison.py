"""Two runs on the same items, and a few joules."""

import random
from dataclasses import replace

import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.report import compare
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.latency import Counter, counters, joules
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.evaluation.report.comparison import compare_runs, comparison_notes, comparison_rows, parse_modes
from mlx_rsgwm.evaluation.report.folder import read_report, write_report


def run(share, seed, items=80, seeds=(1,)):
    rng = random.Random(seed)
    found = []
    for number in seeds:
        for index in range(items):
            right = rng.random() < share
            draft = DraftRecord("t", "1" if right else "2", right, {"s": 0.9 if rng.random() < 0.8 else 0.1})
            accepted = draft.scores["s"] >= 0.5
            found.append(
                ItemRecord(f"i{index}", "t", f"q{index}", "1", (draft,), "s", 0.5, accepted, 1, 0, seed=number)
            )
    return found


def test_a_clear_difference_and_none():
    found = compare_runs(run(0.3, 1), run(0.8, 2), "draft_verify", ("a", "b"))
    row = found["rates"]["accuracy"]
    assert row["difference"]["low"] > 0.2
    assert row["mcnemar"]["p_value"] < row["mcnemar_p_holm"] < 0.01
    assert row["second"] - row["first"] == pytest.approx(row["difference"]["value"])
    assert found["false_accept_rate"]["value"] < 0
    same = compare_runs(run(0.5, 1), run(0.5, 1), "drafter", ("a", "b"))
    assert same["rates"]["accuracy"]["mcnemar"]["p_value"] == 1
    assert same["false_accept_rate"] is None
    assert "accept_rate" not in same["rates"]
    assert all(len(line) == len(comparison_rows(found)[0]) for line in comparison_rows(found))
    assert "80 items in common" in comparison_notes(found)[0]


def test_several_seeds_stay_one_unit():
    found = compare_runs(run(0.4, 1, seeds=(1, 2, 3)), run(0.6, 2, seeds=(5, 6)), "draft_verify", ("a", "b"))
    assert found["seeds"] == [[1, 2, 3], [5, 6]]
    assert found["rates"]["accuracy"]["difference"]["n"] == 80


def test_runs_that_cannot_be_compared():
    rows = run(0.5, 1, items=4)
    with pytest.raises(RsgwmError, match="no item in common"):
        compare_runs(rows, [replace(row, id=f"other {row.id}") for row in rows], "drafter", ("a", "b"))
    with pytest.raises(RsgwmError, match="asks something else in b"):
        compare_runs(rows, [replace(row, question="?") for row in rows], "drafter", ("a", "b"))
    left = compare_runs(rows, rows[1:], "drafter", ("a", "b"))
    assert left["left_out"] == [1, 0]
    assert parse_modes("drafter,draft_verify") == ("drafter", "draft_verify")
    with pytest.raises(RsgwmError, match="--of must be"):
        parse_modes("both")


def test_energy_counters_and_their_wrap(tmp_path):
    package = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()
    package.mkdir()
    (package / "max_energy_range_uj").write_text("1000000\n")
    (package / "energy_uj").write_text("900000\n")
    known = counters(tmp_path)
    assert known == [Counter(package / "energy_uj", 1000000)]
    before = [counter.read() for counter in known]
    (package / "energy_uj").write_text("950000\n")
    assert joules(known, before) == pytest.approx(0.05)
    (package / "energy_uj").write_text("100000\n")
    assert joules(known, before) == pytest.approx(0.2)
    assert counters(tmp_path / "nowhere") == []
    assert joules([], []) is None


def test_a_run_is_named_by_its_folder_and_compared_as_csv_and_latex(tmp_path):
    """The report's folder, the run's around it, or report.json itself."""
    rows = run(0.5, 1, items=6)
    for name in ("a", "b"):
        write_report(tmp_path / name / "report", rows, 1)
    names = [tmp_path / "a", tmp_path / "a" / "report", tmp_path / "a" / "report" / "report.json"]
    read = [read_report(name) for name in names]
    assert read[0] == read[1] == read[2]
    with pytest.raises(RsgwmError, match=r"holds no report\.json; give the folder of a finished"):
        read_report(tmp_path)
    for suffix, head in ((".csv", ",A,B,B − A,only A"), (".tex", r"\begin{tabular}")):
        table = tmp_path / f"table{suffix}"
        arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(table)]
        done = CliRunner().invoke(compare, arguments, catch_exceptions=False)
        assert f"comparison: {table}" in done.output
        text = table.read_text(encoding="utf-8")
        assert head in text
        assert "accuracy" in text
