"""The paper's printed rows, and every identity that they violate."""

from mlx_rsgwm.studies.paper import TABLES, arithmetic_problems, footnotes
from mlx_rsgwm.studies.paper_tables import ROWS


def test_rows_of_ours_and_of_the_paper_match():
    assert {number: [row.name for row in rows] for number, rows in ROWS.items()} == {
        number: [row.name for row in rows] for number, rows in TABLES.items()
    }


def test_table_1_false_accepts():
    notes = " | ".join(footnotes(1))
    for shown in ("0.1463", "0.0575", "2 of 82", "1 of 87", "12 accepted", "5 accepted", "61%", "28.51", "18.27"):
        assert shown in notes


def test_table_2_accuracy_below_what_is_accepted_and_right():
    problems = {row.name: arithmetic_problems(row) for row in TABLES[2]}
    assert "0.85" in problems["τ 0.7 (default)"][0]
    assert problems["τ 0.5 (smoke)"] == []  # 3 of 19 obeys the definition
    assert problems["τ 0.5 (aligned prompts)"] == []


def test_table_3_refusals():
    assert [len(arithmetic_problems(row)) for row in TABLES[3]] == [1, 1, 1]
    assert "n = 20" in footnotes(3)[-1]
