"""Tables: every format of the same rows, read back where there is a reader."""

import csv
import io
import re
import xml.etree.ElementTree as ET

import pytest

from mlx_rsgwm.core import tables
from mlx_rsgwm.core.errors import RsgwmError

ROWS = [["", "rate", "n"], ["a|b_c & 5 %", '0.5 [0.4, 0.6]\n"quoted"', "12"], ["x" * 80, "–", ""]]


def test_cells():
    assert tables.show({"value": 0.72, "low": 0.625, "high": 0.7985, "n": 9}) == "0.720 [0.625, 0.798]"
    assert (tables.show(None), tables.show(2.345), tables.show(3)) == ("–", "2.35", "3")
    assert tables.show_difference({"value": 0.1, "low": -0.05, "high": 0.25}) == "+0.100 [-0.050, +0.250]"
    assert tables.show_difference(None) == "–"
    assert tables.shortened("two\n lines") == "two lines"
    assert tables.shortened("a" * 20 + "b" * 20, 11) == "aaaaa…bbbbb"


def test_aligned_columns_begin_where_their_heads_do():
    lines = tables.aligned([["name", "rate", "n"], ["long name", "0.5", "1"], ["b", "0.25", "20"]]).split("\n")
    assert lines == ["name       rate  n", "-" * 19, "long name  0.5   1", "b          0.25  20"]
    assert max(map(len, tables.aligned(ROWS).split("\n")[2:])) < 100


def test_markdown_has_as_many_cells_in_every_row():
    lines = tables.markdown(ROWS).split("\n")
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert r"a\|b_c & 5 %" in lines[2]


def test_csv_reads_back():
    assert list(csv.reader(io.StringIO(tables.comma_separated(ROWS)))) == ROWS
    several = tables.csv_page("t", [("first", ROWS), ("second", ROWS)])
    assert [row[1:] for row in csv.reader(io.StringIO(several))] == ROWS + ROWS


def test_latex_escapes_what_would_be_a_command():
    text = tables.latex(ROWS)
    assert r"a|b\_c \& 5 \%" in text
    assert {line.replace(r"\&", "").count("&") for line in text.split("\n") if line.endswith(r"\\")} == {2}
    for sign in "\\&%$#_{}~^":
        escaped = tables.latex([[sign]]).split("\n")[2].removesuffix(r" \\")
        assert escaped != sign
        assert escaped.startswith("\\")
    page = tables.latex_page("50 % of it", [("", ROWS)], ["two\nlines"])
    assert page.startswith("% 50 % of it\n% two lines\n")
    assert page.count(r"\begin{table}") == page.count(r"\end{table}") == 1


def test_html_shows_the_cells():
    cells = [[c.text or "" for c in row] for row in ET.fromstring(tables.html([["<b>", "&"], ["1", "2"]])).iter("tr")]
    assert cells == [["<b>", "&"], ["1", "2"]]


def test_the_suffix_chooses(tmp_path):
    for suffix, start in ((".md", "# t\n\nsaid\n\n## s\n\n|"), (".tex", "% t\n% said\n"), (".CSV", ",rate,n\n")):
        tables.write_page(tmp_path / f"x{suffix}", "t", [("s", ROWS)], ["said"])
        assert (tmp_path / f"x{suffix}").read_text().startswith(start)
    with pytest.raises(RsgwmError, match=r"x\.txt: tables are written as \.md, \.tex, \.csv"):
        tables.write_page(tmp_path / "x.txt", "t", [("s", ROWS)])
    assert not (tmp_path / "x.txt").exists()
