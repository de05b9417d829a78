"""False equations: the labelled drafts (written before the parser), hand-made values, and input that means harm."""

from __future__ import annotations

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from mlx_rsgwm.data.arithmetic import false_equations
from mlx_rsgwm.data.digits import fold_digits
from mlx_rsgwm.data.synthetic import FAMILIES, generate

AS_WRITTEN = {
    "plain",
    "chain",
    "units",
    "percent",
    "thousands",
    "rounding",
    "sign",
    "lines",
    "label",
    "odd",
    "hi",
}
DRAFTS = [json.loads(line) for line in Path(__file__).with_name("arithmetic.jsonl").read_text().splitlines()]


def _texts(text: str) -> list[str]:
    return [equation.text for equation in false_equations(text)]


def test_there_are_drafts_of_every_label() -> None:
    counts = {
        label: sum(row["label"] == label for row in DRAFTS) for label in ("false", "right", "unparseable", "none")
    }
    assert sum(counts.values()) >= 300
    assert min(counts.values()) >= 40


@pytest.mark.parametrize("label", ["right", "unparseable", "none"])
def test_no_right_equation_is_refused_and_nothing_is_guessed(label: str) -> None:
    refused = {row["text"]: _texts(row["text"]) for row in DRAFTS if row["label"] == label and _texts(row["text"])}
    assert refused == {}


def test_false_equations_are_reported_each_where_it_stands() -> None:
    rows = [row for row in DRAFTS if row["label"] == "false"]
    missed = [row["text"] for row in rows if len(_texts(row["text"])) != len(row["false"])]
    assert len(missed) <= 0.02 * len(rows), missed
    for row in (row for row in rows if row["kind"] in AS_WRITTEN and row["text"] not in missed):
        for expected, found in zip(row["false"], _texts(row["text"]), strict=True):
            assert _plain(expected) in _plain(found) or _plain(found) in _plain(expected)


def _plain(text: str) -> str:
    """Without spaces, Markdown and the spellings of the operators."""
    for written, sign in {" percent": "%", " of ": "×", "x": "×", "X": "×"}.items():
        text = text.replace(written, sign)
    return re.sub(r"[\s*×`.]", "", fold_digits(text))


@pytest.mark.parametrize(
    ("text", "left", "right"),
    [
        ("21 − 4 = 18", 17, 18),
        ("1/2 + 1/4 = 2/6", Fraction(3, 4), Fraction(1, 3)),
        ("3,5 km + 0,5 km = 4,5 km", 4, Fraction(9, 2)),
        ("20% of 50 = 12", 10, 12),
        ("1.234 + 1 = 1.236", Fraction(2234, 1000), Fraction(1236, 1000)),
        (r"\frac{1}{2} + \frac{1}{3} = \frac{2}{5}", Fraction(5, 6), Fraction(2, 5)),
        ("2 + 3 * 4 = 20", 14, 20),
        ("-2^2 = 5", -4, 5),
        ("2(3 + 4) = 15", 14, 15),
        ("√16 + 2^3 = 13", 12, 13),
    ],
)
def test_both_sides_are_exact(text: str, left: Fraction, right: Fraction) -> None:
    (equation,) = false_equations(text)
    assert (equation.left, equation.right) == (left, right)


def test_the_reason_is_the_equation() -> None:
    assert false_equations("So 21 - 4 = 18 are left.")[0].reason == "21 - 4 = 18 is false"


def test_where_the_question_gives_a_sign_another_meaning_nothing_is_claimed() -> None:
    assert _texts("3 * 4 = 25") == ["3 * 4 = 25"]
    assert false_equations("3 * 4 = 25", "Let a * b = a^2 + b^2. What is 3 * 4?") == []
    means = r"$P$ and $Q$ are numbers, and $P \ast Q$ means $\cfrac{P+Q}{2}$. What is $6 \ast 8$?"
    assert false_equations(r"$6 \ast 8 = \cfrac{6+8}{2}$", means) == []
    assert false_equations("3 * 4 = 24", "Let a * b be twice the product. What is 3 * 4?") == []
    assert false_equations("12 + 3 = 20", "What is 12 + 3 in base 5?") == []


def test_a_running_total_is_no_error_and_a_wrong_step_of_it_is() -> None:
    assert _texts("3 + 4 = 7 × 2 = 14 - 1 = 13") == []
    assert _texts("3 + 4 = 7 × 2 = 14 - 1 = 12") == ["14 - 1 = 12"]
    assert _texts("3 + 4 = 7 × 2") == ["3 + 4 = 7 × 2"]  # it leads nowhere


def test_the_embedded_families_calculate_rightly_and_one_more_is_an_error() -> None:
    for family in FAMILIES:
        for question in generate(family, 30, 0, "train"):
            assert false_equations(question.rationale, question.question) == []
            spoilt = question.rationale.split("\n")[0].rsplit("= ", 1)
            if len(spoilt) == 2 and spoilt[1].isdigit():
                assert len(false_equations(f"{spoilt[0]}= {int(spoilt[1]) + 1}", question.question)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000 + "1 = 2",
        "(1+1)" * 50_000 + "= 2",
        "1+" * 100_000 + "1 = 2",
        "9^9^9^9^9 = 1",
        "9^" * 50_000 + "9 = 1",
        "10^-99999999 = 1",
        "1" * 100_000 + " + 1 = 2",
        "√" * 50_000 + "4 = 3",
        r"\frac{" * 50_000 + "1}{2} = 1",
        "1 000 " * 50_000 + "= 1 + 1",
        "½" * 50_000 + " = 1",
        "<<1+1=3>>" * 50_000,
        "=" * 200_000,
        "-" * 200_000 + "1 = 1",
    ],
    ids=lambda text: text[:12],
)
def test_the_time_is_bounded(text: str) -> None:
    start = time.process_time()
    false_equations(text)
    assert time.process_time() - start < 10  # a second or less; unbounded it would be hours


def test_what_is_too_long_or_too_deep_is_not_read_and_the_rest_is() -> None:
    assert _texts("(" * 50 + "1+1" + ")" * 50 + " = 3. Then 2 + 2 = 5") == ["2 + 2 = 5"]
    assert _texts("2 + 2 = 5. " + "9" * 400 + " + 1 = 2") == ["2 + 2 = 5"]
    assert _texts("x " * 6000 + "2 + 2 = 5") == []
