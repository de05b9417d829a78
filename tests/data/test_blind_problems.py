"""Families in which wrong solutions calculate rightly: answers by another solver, equations by exact fractions."""

import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from mlx_rsgwm.data.blind_problems import BLIND, worked
from mlx_rsgwm.data.corpus import make_rows
from mlx_rsgwm.data.perturb import make_wrong, perturb
from mlx_rsgwm.data.synthetic import SPLITS, generate

PER_UNIT = {
    frozenset(pair): count
    for pair, count in (
        (("hours", "minutes"), 60), (("weeks", "days"), 7), (("metres", "centimetres"), 100),
        (("feet", "inches"), 12), (("dollars", "cents"), 100), (("years", "months"), 12),
    )
}  # fmt: skip
LARGE = ("hours", "weeks", "metres", "feet", "dollars", "years")


def _operation(text):
    name, a, who, b, word, whom, asked = re.fullmatch(
        r"(\w+) has (\d+) \w+\. (\w+) has (\d+) (more than|fewer than|times as many as) (\w+)\. "
        r"How many \w+ does (\w+) have\?", text
    ).groups()  # fmt: skip
    a, b = int(a), int(b)
    assert asked != name
    assert {who, whom} == {name, asked}
    relation = {"more than": lambda x: x + b, "fewer than": lambda x: x - b, "times as many as": lambda x: x * b}[word]
    candidates = [x for x in range(1, 200) if (relation(x) == a if who == name else x == relation(a))]
    assert len(candidates) == 1
    return candidates[0]


def _order(text):
    a, b, verb, c, which = re.fullmatch(
        r"\w+ has (\d+) boxes with (\d+) \w+ each and (puts|takes) (\d+) (?:more into|out of) (each|one) box\. "
        r"How many \w+ are in the boxes now\?", text
    ).groups()  # fmt: skip
    boxes = [int(b)] * int(a)
    for index in range(len(boxes) if which == "each" else 1):
        boxes[index] += int(c) if verb == "puts" else -int(c)
    return sum(boxes)


def _distractor(text):
    a, thing, b, kind, verb, c, changed, asked = re.fullmatch(
        r"(?:\w+) has (\d+) (\w+) and (\d+) (\w+)\. \w+ (buys|gives away) (\d+) (?:more )?(\w+)\. "
        r"How many (.+) does \w+ have now\?", text
    ).groups()  # fmt: skip
    owned = {thing: int(a), kind: int(b)}
    owned[changed] += int(c) if verb == "buys" else -int(c)
    return sum(owned[each] for each in asked.split(" and "))


def _units(text):
    measured, asked = re.fullmatch(r"\w+ [a-z ]+? (\d.*)\. How many (\w+) is that\?", text).groups()
    total = Fraction(0)
    for count, unit in re.findall(r"(\d+) (\w+)", measured):
        per = PER_UNIT[frozenset((unit, asked))] if unit != asked else 1
        total += Fraction(int(count)) * (Fraction(1, per) if asked in LARGE else per)
    return total


def _cheaper(text):
    n, price, paid, word = re.fullmatch(
        r"\w+ buys (\d+) \w+ for (\d+) dollars each\. \w+ pays (\d+) dollars\. How many dollars "
        r"(?:(more|less) does \w+ pay than \w+|do they pay together)\?", text
    ).groups()  # fmt: skip
    first, second = sum([int(price)] * int(n)), int(paid)
    return {"more": first - second, "less": second - first, None: first + second}[word]


def _choice(text):
    thing, p, kind, q, n, bought, note, one = re.match(
        r"Each (\w+) costs (\d+) dollars and each (\w+) (\d+) dollars\. \w+ buys (\d+) (\w+)s"
        r"(?: with (\d+) dollars)?(?: and one (\w+))?\. How many dollars (?:is that|does \w+ get back)\?$", text
    ).groups()  # fmt: skip
    price = {thing: int(p), kind: int(q)}
    total = int(n) * price[bought] + (price[one] if one else 0)
    return int(note) - total if note else total


SOLVERS = {
    "operation": _operation,
    "order": _order,
    "distractor": _distractor,
    "units": _units,
    "cheaper": _cheaper,
    "choice": _choice,
}
OPERATIONS = {
    "+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__,
}  # fmt: skip


def check_equations(rationale):
    """Every line is one equation of two numbers and true; what the last one comes to."""
    for line in rationale.split("\n"):
        left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
        assert OPERATIONS[sign](Fraction(left), Fraction(right)) == Fraction(result), line
    return result


@pytest.mark.parametrize("family", BLIND)
def test_right_solutions_are_right_and_wrong_ones_wrong_though_every_equation_is_true(family):
    questions = [question for split in SPLITS for question in generate(family, 150, 3, split)]
    assert len({question.question for question in questions}) == 450
    names = Counter()
    for question in questions:
        assert SOLVERS[family](question.question) == Fraction(question.gold), question.question
        assert check_equations(question.rationale) == question.gold
        assert question.mistakes
        for mistake in question.mistakes:
            assert check_equations(mistake.rationale) == mistake.gold != question.gold
        assert len({mistake.change for mistake in question.mistakes}) == len(question.mistakes)
        names.update(mistake.change for mistake in question.mistakes)
    assert len(names) >= 2
    assert min(names.values()) >= 40


@pytest.mark.parametrize("family", BLIND)
def test_a_family_gives_enough_questions_that_adapters_can_be_trained_on(family):
    questions = generate(family, 1200, 5, "train")
    assert len({question.question for question in questions}) == 1200
    assert max(len(question.answer.split("\n")) for question in questions) <= 3


@pytest.mark.parametrize("family", BLIND)
def test_verify_rows_hold_mistakes_of_every_kind_the_question_has(family):
    questions = generate(family, 120, 1, "train")
    wrong = [row for row in make_rows(questions, 0, 120, 1) if row.correct is False]
    assert len(wrong) == 60
    known = {question.question: {f"{m.rationale}\n#### {m.gold}" for m in question.mistakes} for question in questions}
    assert all(row.answer in known[row.question] for row in wrong)
    made = Counter(make_wrong(question, random.Random(index)).change for index, question in enumerate(questions))
    assert set(made) == {mistake.change for question in questions for mistake in question.mistakes}
    assert perturb(questions[0], random.Random(1)) == perturb(questions[0], random.Random(1))


@pytest.mark.parametrize("steps", [((2, "-", 2),), ((2, "-", 3),), ((3, "/", 2),), ((4, "-", 5), (1, "+", 1))])
def test_equations_without_a_positive_whole_result_are_no_solution(steps):
    assert worked(steps) is None
