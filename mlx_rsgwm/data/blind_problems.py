"""Word problems that a calculator cannot check: a wrong solution does the wrong thing and calculates it rightly.

Numbers are so small that a 135M model calculates them well; what it gets wrong is which operation, which order, which
number, which unit. Every family asks different things in almost the same words, so that its adapter must read them.
Each question comes with its likely mistakes, as wrong solutions whose equations are all true: what a verifier is taught
and tested on (docs/verifier.md).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from fractions import Fraction

from mlx_rsgwm.data.equations import OPERATIONS
from mlx_rsgwm.data.questions import Wrong
from mlx_rsgwm.data.word_problems import NAMES, THINGS, Family, WordProblem

EquationStep = tuple[int, str, int]  # one equation: left, sign, right; its result is computed
Steps = tuple[EquationStep, ...]

# The larger unit, the smaller one, how many of these it holds, a number taken for that, and what is measured in them.
UNITS = (
    ("hours", "minutes", 60, 100, "works for"),
    ("weeks", "days", 7, 5, "travels for"),
    ("metres", "centimetres", 100, 10, "walks"),
    ("feet", "inches", 12, 10, "jumps"),
    ("dollars", "cents", 100, 10, "saves"),
    ("years", "months", 12, 10, "waits"),
)
_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


def worked(steps: Steps) -> tuple[str, int] | None:
    """The equations, one a line, and the last result; None where a result is no positive whole number."""
    lines, value = [], Fraction(0)
    for left, sign, right in steps:
        value = OPERATIONS[sign](Fraction(left), Fraction(right))
        if value <= 0 or value.denominator != 1:
            return None
        lines.append(f"{left} {sign} {right} = {value}")
    return "\n".join(lines), int(value)


def _problem(text: str, steps: Steps, mistakes: Mapping[str, Steps]) -> WordProblem:
    """Mistakes that come to no positive whole number, or to the right answer by chance, are left out."""
    solution = worked(steps)
    assert solution is not None
    known = []
    for name, other in mistakes.items():
        wrong = worked(other)
        if wrong is not None and wrong[1] != solution[1]:
            known.append(Wrong(wrong[0], str(wrong[1]), name))
    return WordProblem(text, *solution, tuple(known))


def _another(rng: random.Random, choices: tuple[str, ...], taken: str) -> str:
    return rng.choice([choice for choice in choices if choice != taken])


def _operation(rng: random.Random, name: str, thing: str) -> WordProblem:
    """Who has more than whom: "more" may ask for a difference, and "times" for a division."""
    other, b = _another(rng, NAMES, name), rng.randint(2, 4)
    relation, forward = rng.choice((("more than", "+"), ("fewer than", "-"), ("times as many as", "*")))
    a = b * rng.randint(2, 4) if forward == "*" else rng.randint(b + 2, 14)
    inverse = rng.random() < 0.5
    who, whom = (name, other) if inverse else (other, name)
    text = f"{name} has {a} {thing}. {who} has {b} {relation} {whom}. How many {thing} does {other} have?"
    right, wrong = (_INVERSE[forward], forward) if inverse else (forward, _INVERSE[forward])
    unrelated = "+" if forward == "*" else "*"
    mistakes = {"opposite_operation": ((a, wrong, b),), "other_operation": ((a, unrelated, b),)}
    return _problem(text, ((a, right, b),), mistakes)


def _order(rng: random.Random, name: str, thing: str) -> WordProblem:
    """Two operations, in the order of the question's numbers or not: into one box or into each of them."""
    a, b, c = rng.randint(2, 5), rng.randint(4, 6), rng.randint(2, 3)
    sign, done = rng.choice((("+", "puts {} more into {}"), ("-", "takes {} out of {}")))
    each = rng.random() < 0.5
    changed = done.format(c, "each box" if each else "one box")
    text = f"{name} has {a} boxes with {b} {thing} each and {changed}. How many {thing} are in the boxes now?"
    multiplied_first = ((a, "*", b), (a * b, sign, c))
    multiplied_last = ((b, sign, c), ((b + c) if sign == "+" else (b - c), "*", a))
    right, wrong = (multiplied_last, multiplied_first) if each else (multiplied_first, multiplied_last)
    return _problem(text, right, {"wrong_order": wrong, "step_left_out": right[:1]})


def _distractor(rng: random.Random, name: str, thing: str) -> WordProblem:
    """Two kinds of things of which one changes: one number has nothing to do with what is asked, or all have."""
    kind = _another(rng, THINGS, thing)
    (a, b), c = rng.sample(range(6, 13), 2), rng.randint(2, 5)
    sign, done = rng.choice((("+", "buys {} more {}"), ("-", "gives away {} {}")))
    wanted, asked, ignored = rng.choice(((thing, a, b), (kind, b, a)))
    text = f"{name} has {a} {thing} and {b} {kind}. {name} {done.format(c, wanted)}."
    if rng.random() < 0.7:
        text = f"{text} How many {wanted} does {name} have now?"
        mistakes: dict[str, Steps] = {"other_number": ((ignored, sign, c),), "distractor_added": ((a, "+", b),)}
        return _problem(text, ((asked, sign, c),), mistakes)
    text = f"{text} How many {thing} and {kind} does {name} have now?"
    mistakes = {"number_left_out": ((asked, sign, c),), "step_left_out": ((a, "+", b),)}
    return _problem(text, ((a, "+", b), (a + b, sign, c)), mistakes)


def _units(rng: random.Random, name: str, _: str) -> WordProblem:
    """A quantity in two units, or a conversion either way."""
    large, small, factor, taken, verb = rng.choice(UNITS)
    a, b = rng.randint(2, 6), rng.randint(1, 6)
    kind = rng.random()
    if kind < 0.5:
        mistakes: dict[str, Steps] = {
            "not_converted": ((a, "+", b),),
            "wrong_factor": ((a, "*", taken), (a * taken, "+", b)),
            "wrong_number_converted": ((b, "*", factor), (b * factor, "+", a)),
        }
        text = f"{name} {verb} {a} {large} and {b} {small}. How many {small} is that?"
        return _problem(text, ((a, "*", factor), (a * factor, "+", b)), mistakes)
    if kind < 0.75:
        text = f"{name} {verb} {a} {large}. How many {small} is that?"
        return _problem(text, ((a, "*", factor),), {"wrong_factor": ((a, "*", taken),)})
    text = f"{name} {verb} {a * factor} {small}. How many {large} is that?"
    mistakes = {"wrong_direction": ((a * factor, "*", factor),), "wrong_factor": ((a * factor, "/", taken),)}
    return _problem(text, ((a * factor, "/", factor),), mistakes)


def _cheaper(rng: random.Random, name: str, thing: str) -> WordProblem:
    """A price for each against a price for all: by how much does who pay more, or what do both pay?"""
    other, n, price = _another(rng, NAMES, name), rng.randint(2, 4), rng.randint(2, 5)
    total, gap = n * price, rng.randint(2, 5)
    together = rng.random() < 0.34
    paid = total - gap if rng.random() < 0.5 and total > gap + 1 else total + gap
    start = f"{name} buys {n} {thing} for {price} dollars each. {other} pays {paid} dollars. How many dollars"
    first, added = (n, "*", price), (total, "+", paid)
    compared = (max(total, paid), "-", min(total, paid))
    if together:
        mistakes: dict[str, Steps] = {"wrong_operation": (first, compared), "one_for_all": ((price, "+", paid),)}
        return _problem(f"{start} do they pay together?", (first, added), mistakes)
    word = "more" if total > paid else "less"
    difference = (max(price, paid), "-", min(price, paid))
    mistakes = {"wrong_operation": (first, added), "one_for_all": (difference,), "step_left_out": (first,)}
    return _problem(f"{start} {word} does {name} pay than {other}?", (first, compared), mistakes)


def _choice(rng: random.Random, name: str, thing: str) -> WordProblem:
    """Two prices: which applies, and to how many?"""
    kind = _another(rng, THINGS, thing)
    n, (p, q) = rng.randint(2, 5), rng.sample(range(2, 7), 2)
    wanted, price, other, unused = rng.choice(((thing, p, kind, q), (kind, q, thing, p)))
    text = f"Each {thing[:-1]} costs {p} dollars and each {kind[:-1]} {q} dollars."
    first, wrong_first = (n, "*", price), (n, "*", unused)
    form = rng.randrange(3)
    if form == 0:
        mistakes: dict[str, Steps] = {"other_price": (wrong_first,), "prices_added": ((p, "+", q),)}
        return _problem(f"{text} {name} buys {n} {wanted}. How many dollars is that?", (first,), mistakes)
    if form == 1:
        note = rng.choice((40, 50))
        text = f"{text} {name} buys {n} {wanted} with {note} dollars. How many dollars does {name} get back?"
        right, wrong = ((steps, (note, "-", n * each)) for steps, each in ((first, price), (wrong_first, unused)))
        return _problem(text, right, {"other_price": wrong, "step_left_out": (first,)})
    text = f"{text} {name} buys {n} {wanted} and one {other[:-1]}. How many dollars is that?"
    right = (first, (n * price, "+", unused))
    return _problem(text, right, {"other_price": (wrong_first, (n * unused, "+", price)), "step_left_out": (first,)})


BLIND: dict[str, Family] = {
    "operation": _operation,
    "order": _order,
    "distractor": _distractor,
    "units": _units,
    "cheaper": _cheaper,
    "choice": _choice,
}
