"""Four embedded task families: seeded word problems, one arithmetic step each, in GSM8K style.

They exist so that the whole line (train, merge, draft, verify) runs on a fresh machine in minutes with a 135M model
that learns them and still errs. Questions are generated, never stored; a seed and a count name a data set.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from mlx_rsgwm.data.sources import Question
from mlx_rsgwm.errors import RsgwmError

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo", "Mia", "Noah", "Omar", "Pia")
THINGS = ("apples", "books", "cards", "coins", "eggs", "kites", "marbles", "pens", "plums", "shells", "stamps", "toys")


def _addition(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    total = rng.randint(12, 60)
    a = rng.randint(4, total - 4)
    b = total - a
    text = rng.choice(
        (
            f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
            f"{name} finds {a} {thing} on Monday and {b} on Tuesday. How many {thing} is that in all?",
            f"There are {a} {thing} on a shelf. {name} adds {b}. How many {thing} are there?",
        )
    )
    return text, f"{a} + {b} = {total}", total


def _subtraction(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a = rng.randint(12, 60)
    b = rng.randint(4, a - 4)
    text = rng.choice(
        (
            f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
            f"{name} had {a} {thing} but lost {b} of them. How many {thing} remain?",
            f"There are {a} {thing} in a bag. {name} takes {b} out. How many {thing} stay in the bag?",
        )
    )
    return text, f"{a} - {b} = {a - b}", a - b


def _multiplication(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, 9), rng.randint(3, 9)
    text = rng.choice(
        (
            f"{name} has {a} boxes with {b} {thing} each. How many {thing} does {name} have?",
            f"{name} buys {a} packs of {b} {thing}. How many {thing} is that?",
            f"There are {a} rows of {b} {thing}. How many {thing} does {name} count?",
        )
    )
    return text, f"{a} * {b} = {a * b}", a * b


def _division(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, 9), rng.randint(3, 9)
    text = rng.choice(
        (
            f"{name} shares {a * b} {thing} equally among {a} friends. How many {thing} does each friend get?",
            f"{name} puts {a * b} {thing} into {a} equal piles. How many {thing} are in each pile?",
            f"{a * b} {thing} fill {a} bags evenly. How many {thing} does {name} find in one bag?",
        )
    )
    return text, f"{a * b} / {a} = {b}", b


FAMILIES: dict[str, Callable[[random.Random, str, str], tuple[str, str, int]]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "division": _division,
}


def generate(family: str, count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[Question]:
    """``count`` distinct questions of one family, the same for the same seed.

    ``exclude`` holds question texts that must not occur again (training questions, for a held-out set).
    """
    if family not in FAMILIES:
        raise RsgwmError(f"unknown task family {family!r}; the embedded ones are {', '.join(FAMILIES)}")
    rng = random.Random(f"{family}/{seed}")
    seen, questions = set(exclude), []
    for _ in range(200 * count + 1000):
        if len(questions) == count:
            return questions
        text, rationale, answer = FAMILIES[family](rng, rng.choice(NAMES), rng.choice(THINGS))
        if text not in seen:
            seen.add(text)
            questions.append(Question(f"{family}-{seed}-{len(questions)}", family, text, rationale, str(answer)))
    raise RsgwmError(f"{family} cannot give {count} distinct questions; ask for fewer")
