"""Word problems in GSM8K style, each family with two operations to tell apart: what the demo trains and asks.

A family with one operation would teach an adapter to stop reading the question, and the merge of four such adapters
confuses the operations (docs/lab-notes/task-families.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from mlx_rsgwm.data.questions import Wrong

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Omar",
    "Pia",
)
THINGS = ("apples", "books", "cards", "coins", "eggs", "kites", "marbles", "pens", "plums", "shells", "stamps", "toys")


class WordProblem(NamedTuple):
    """A question, its worked solution without the final line, the answer, and wrong solutions that are known."""

    text: str
    rationale: str
    answer: int
    mistakes: tuple[Wrong, ...] = ()


def _change(rng: random.Random, name: str, thing: str) -> WordProblem:
    """Something is added to a number of things, or taken away."""
    a, b = rng.randint(11, 49), rng.randint(3, 9)
    if rng.random() < 0.5:
        text = rng.choice(
            (
                f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
                f"There are {a} {thing} on a shelf. {name} adds {b}. How many {thing} are there?",
            )
        )
        return WordProblem(text, f"{a} + {b} = {a + b}", a + b)
    text = rng.choice(
        (
            f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
            f"There are {a} {thing} in a bag. {name} takes {b} out. How many {thing} stay in the bag?",
        )
    )
    return WordProblem(text, f"{a} - {b} = {a - b}", a - b)


def _groups(rng: random.Random, name: str, thing: str) -> WordProblem:
    """Equal groups: how many in all, or how many in each."""
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if rng.random() < 0.5:
        text = rng.choice(
            (
                f"{name} has {a} boxes with {b} {thing} each. How many {thing} does {name} have?",
                f"There are {a} rows of {b} {thing}. How many {thing} does {name} count?",
            )
        )
        return WordProblem(text, f"{a} * {b} = {a * b}", a * b)
    text = rng.choice(
        (
            f"{name} shares {a * b} {thing} equally among {a} friends. How many {thing} does each friend get?",
            f"{name} puts {a * b} {thing} into {a} equal piles. How many {thing} are in each pile?",
        )
    )
    return WordProblem(text, f"{a * b} / {a} = {b}", b)


def _compare(rng: random.Random, name: str, thing: str) -> WordProblem:
    """Two people's things: how many together, or how many more one of them has."""
    other = rng.choice([known for known in NAMES if known != name])
    a, b = rng.randint(12, 40), rng.randint(2, 11)
    start = f"{name} has {a} {thing} and {other} has {b}."
    if rng.random() < 0.5:
        return WordProblem(f"{start} How many {thing} do they have together?", f"{a} + {b} = {a + b}", a + b)
    return WordProblem(f"{start} How many more {thing} does {name} have than {other}?", f"{a} - {b} = {a - b}", a - b)


def _prices(rng: random.Random, name: str, thing: str) -> WordProblem:
    """Money: what several things cost, or what is left of a note."""
    if rng.random() < 0.5:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return WordProblem(
            f"{name} buys {a} {thing} for {b} dollars each. How many dollars is that?", f"{a} * {b} = {a * b}", a * b
        )
    a, b = rng.choice((20, 30, 50)), rng.randint(3, 18)
    text = f"{name} pays {b} dollars for {thing} with {a} dollars. How many dollars does {name} get back?"
    return WordProblem(text, f"{a} - {b} = {a - b}", a - b)


Family = Callable[[random.Random, str, str], WordProblem]

PLAIN: dict[str, Family] = {
    "change": _change,
    "groups": _groups,
    "compare": _compare,
    "prices": _prices,
}
