"""Wrong solutions: what must stay true after one number or operation was changed."""

import os
import random
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rsgwm.data.boxes import find_boxes
from mlx_rsgwm.data.equations import find_equations, scan_equations, value_of_parts
from mlx_rsgwm.data.numbers import parse_number, write_number
from mlx_rsgwm.data.perturb import borrow, make_wrong, perturb
from mlx_rsgwm.data.questions import Question, load_questions

DATA = Path(os.environ.get("RSGWM_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data slices: set RSGWM_DATA to a folder of them")


def ask(rationale, gold, question="Q?"):
    return Question("q", "t", question, rationale, gold)


def check(question, wrong):
    """The contract in the module's text."""
    before, after = find_equations(question.rationale), list(scan_equations(wrong.rationale))
    true = sum(holds for _, holds in after)
    old, new = parse_number(question.gold), parse_number(wrong.gold)
    assert wrong.gold != question.gold
    assert old is None or old != new
    assert true >= len(before) - (wrong.change in ("slip", "answer"))
    if wrong.change in ("operand", "operation"):
        assert true == len(before)
    if wrong.change == "slip":
        assert true == len(before) - 1
    if wrong.change in ("operand", "operation", "slip"):
        results = [equation.right.value for equation, _ in after]
        assert abs(new) in results, "the wrong answer is the result of an equation in the wrong rationale"
        assert wrong.rationale != question.rationale


@st.composite
def solutions(draw):
    """A chain of equations, each using the one before, with prose around them."""
    value = draw(st.integers(2, 60))
    lines = []
    for _ in range(draw(st.integers(1, 4))):
        sign = draw(st.sampled_from("+-*/"))
        other = draw(st.integers(1, 12))
        if sign == "-" and other >= value:
            sign = "+"
        if sign == "/" and value % other:
            sign = "*"
        result = value_of_parts([Fraction(value), sign, Fraction(other)])
        style = draw(
            st.sampled_from(["{a} {s} {b} = {c}", "so ${a}{s}{b}=${c}.", "He has {a} eggs {s} {b} eggs = {c} eggs."])
        )
        lines.append(style.format(a=value, b=other, s=sign, c=result))
        value = int(result)
    if draw(st.booleans()):
        lines.append(f"The total is {value}.")
    return ask("\n".join(lines), str(value))


@given(solutions(), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_wrong_solutions_keep_the_contract(question, seed):
    wrong = make_wrong(question, random.Random(seed))
    assert wrong is not None
    check(question, wrong)
    assert make_wrong(question, random.Random(seed)) == wrong


@given(st.text(max_size=80), st.text(min_size=1, max_size=8), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_any_text_is_survived(rationale, gold, seed):
    found = perturb(ask(rationale, gold), random.Random(seed))
    assert found is None or found.gold != gold


def every(question, count=60):
    return [make_wrong(question, random.Random(seed)) for seed in range(count)]


def test_the_consequence_reaches_text_and_answer():
    question = ask("12 + 7 = 19\nSo there are 19 eggs.\n19 * 2 = 38 eggs.\nShe sells 38.", "38")
    found = every(question)
    assert {wrong.change for wrong in found} == {"operand", "operation", "slip"}
    assert "12 * 7 = 84\nSo there are 84 eggs.\n84 * 2 = 168 eggs.\nShe sells 168." in {w.rationale for w in found}
    for wrong in found:
        assert wrong.rationale.endswith(f"She sells {wrong.gold}.")
        assert "38" not in wrong.rationale or wrong.gold.startswith("38")


def test_a_value_computed_afresh_is_left_alone():
    question = ask("2 + 3 = 5\n4 + 1 = 5\n5 * 10 = 50", "50")
    for wrong in every(question):
        lines = wrong.rationale.split("\n")
        assert lines[0] == "2 + 3 = 5", "a change there would not reach the answer"
        check(question, wrong)


def test_style_of_numbers_is_kept():
    for wrong in every(ask("$1,200 x 12 months = $14,400\nHe pays $14,400.", "14400")):
        assert "," not in wrong.gold
        last = wrong.rationale.split("$")[-1].rstrip(".")
        assert parse_number(last) == parse_number(wrong.gold)
        assert "," in last or parse_number(last) < 1000


def test_percent_and_reason_first():
    question = ask("He pays $40 because 20% of 200 = 40", "40")
    assert len(find_equations(question.rationale)) == 1
    for wrong in every(question, 30):
        assert wrong.rationale.startswith(f"He pays ${wrong.gold} because ")
        assert wrong.rationale.endswith(f"= {wrong.gold}")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12 + 7 = 19", 1),
        ("$5*3=15", 1),
        ("28 cans / 4 cans per trip = 7 trips", 1),
        ("$300/month x 12 months = $3,600/year", 1),
        ("(5 + 3) * 2 = 16", 1),
        ("2 + 3 * 4 = 14", 1),
        ("20 - 5 - 3 = 12", 1),
        ("36,000 * 10% = 3,600", 1),
        ("5 / 20 * 100 = 25%", 1),
        (r"14\times 5=70", 1),
        ("15 ÷ 2 = 7.5", 1),
        ("20 x .05 =1", 1),
        ("12 + 7 = 20", 0),
        ("100 / 3 = 33.33", 0),
        ("x^2 + 7 = 9", 0),
        ("2*(her height) = 80cm", 0),
        ("5 + 3 = 10 - 2", 0),
        ("x = 36", 0),
    ],
)
def test_equations_found(text, count):
    assert len(find_equations(text)) == count


def test_precedence_and_failure():
    read = [Fraction(2), "+", Fraction(3), "*", Fraction(4), "-", Fraction(8), "/", Fraction(2), "/", Fraction(2)]
    assert value_of_parts(read) == 12
    assert value_of_parts([Fraction(1), "/", Fraction(0)]) is None
    assert value_of_parts(["(", Fraction(1)]) is None
    assert value_of_parts([Fraction(1), "+"]) is None


def test_labels():
    yes = perturb(ask("19 is more than 15, so yes", "yes"), random.Random(0))
    assert (yes.gold, yes.rationale) == ("no", "19 is more than 15, so no")
    assert perturb(ask("", "No"), random.Random(0)).gold == "Yes"
    choice = ask("", "B", "Where?\nA. bank\nB. mall\nC. sea")
    assert {perturb(choice, random.Random(seed)).gold for seed in range(40)} == {"A", "C"}
    assert perturb(ask("", "B", "Where?\nB. mall"), random.Random(0)) is None


def test_answers_without_equations():
    found = perturb(ask(r"Then \boxed{\frac12} it is", r"\frac12"), random.Random(0))
    assert parse_number(found.gold) != Fraction(1, 2)
    assert rf"\boxed{{{found.gold}}}" in found.rationale
    assert perturb(ask("", "43"), random.Random(0)).gold != "43"
    assert perturb(ask("It is Paris.", "Paris"), random.Random(0)) is None
    negative = perturb(ask("It fell to -5.", "-5"), random.Random(1))
    assert negative.rationale == f"It fell to {negative.gold}."


def test_rounded_lines_are_not_rewritten():
    question = ask("50 * 2 = 100\n100 / 3 = 33.33\n33.33 * 3 = 99.99", "99.99")
    for wrong in every(question, 30):
        assert "100 / 3 = 33.33" in wrong.rationale


@needs_data
def test_gsm8k_coverage_and_contract():
    questions = load_questions("gsm8k", "train", DATA, limit=400)
    rng, kinds = random.Random(0), []
    for question in questions:
        wrong = make_wrong(question, rng)
        assert wrong is not None, question
        check(question, wrong)
        kinds.append(wrong.change)
    assert sum(kind != "answer" for kind in kinds) >= 0.93 * len(kinds)
    assert all(kinds.count(kind) >= 0.2 * len(kinds) for kind in ("operand", "operation", "slip"))


@needs_data
@pytest.mark.parametrize("task", ["math", "commonsense_qa", "strategyqa", "svamp"])
def test_other_sources(task):
    rng = random.Random(0)
    found = [(q, perturb(q, rng)) for q in load_questions(task, None, DATA, limit=200)]
    assert sum(wrong is not None for _, wrong in found) >= 0.9 * len(found)
    assert all(wrong is None or wrong.gold != q.gold for q, wrong in found)


def test_written_numbers_read_back():
    for value in (Fraction(1, 3), Fraction(7, 4), Fraction(-5), Fraction(123456, 100)):
        assert parse_number(write_number(value)) == value


def test_boxes_that_give_one_gold_together_are_changed_together():
    rationale = r"So $x = \boxed{1}$ or $x = \boxed{-1}$."
    for seed in range(8):
        found = perturb(ask(rationale, "1, -1"), random.Random(seed))
        assert found.gold != "1, -1"
        assert [boxes.answer for boxes in find_boxes(found.rationale)] == [found.gold]


@pytest.mark.parametrize(
    ("rationale", "gold"),
    [
        (r"So \boxed{\text{B}}.", "B"),
        (r"So \boxed{(\text{B})} it is.", "B"),
        (r"So \boxed{1} and thus in sum \boxed{2}.", "1, 2"),
        (r"First \boxed{x+7} holds.\n Checking, it is \boxed{x+7} again.", "x+7"),
        (r"It is \boxed{12\text{ cm}}.", "12"),
        (r"So \boxed{B}. Yes, \boxed{\textbf{B}}.", "B"),
        (r"Then $\boxed{\text{Paris}}$.", "Paris"),
    ],
)
def test_no_box_goes_on_giving_the_gold(rationale, gold):
    others = [Question(f"o{name}", "t", "Q?", "", name) for name in ("Rome", "Oslo", r"\sqrt{2}")]
    question = ask(rationale, gold)
    for seed in range(8):
        rng = random.Random(seed)
        found = perturb(question, rng) or borrow(question, others, rng)
        assert found is not None
        assert found.gold != gold
        assert all(gold not in box.answer for box in find_boxes(found.rationale))
        given = [box.answer for box in find_boxes(found.rationale)]
        assert found.gold in (", ".join(given), given[-1])


def test_boxes_that_cannot_be_changed_give_no_row():
    question = ask(r"So \boxed{17} it is.", r"\sqrt{3}")
    assert all(perturb(question, random.Random(seed)) is None for seed in range(8))


@pytest.mark.parametrize(("gold", "wrong"), [("True", "Maybe"), ("Apollo 11", "Route 66"), (r"\pi", r"\sqrt{e}")])
def test_a_borrowed_answer_has_the_form_of_the_gold(gold, wrong):
    others = [Question(f"o{name}", "t", "Q?", "", name) for name in ("Maybe", "Route 66", r"\sqrt{e}")]
    assert {borrow(ask("", gold), others, random.Random(seed)).gold for seed in range(8)} == {wrong}
