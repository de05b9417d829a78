"""Four embedded task families: seeded word problems, one arithmetic step each, in GSM8K style.

They exist so that the whole line (train, merge, draft, verify) runs on a fresh machine in minutes with a 135M model
that learns them and still errs. Questions are generated, never stored; a seed and a count name a data set.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from mlx_rsgwm.data.sources import Question
from mlx_rsgwm.errors import RsgwmError

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


SPLITS = {"train": range(6), "calibration": range(6, 8), "test": range(8, 10)}


def split_of(text: str) -> str:
    """The split a question belongs to, by a hash of its text: splits are disjoint whatever seeds and counts."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def generate(family: str, count: int, seed: int, split: str) -> list[Question]:
    """``count`` distinct questions of one split of one family, the same for the same seed.

    A longer list begins with a shorter one of the same seed.
    """
    if family not in FAMILIES:
        raise RsgwmError(f"unknown task family {family!r}; the embedded ones are {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise RsgwmError(f"unknown split {split!r} of {family}; there are {', '.join(SPLITS)}")
    if count < 1:
        raise RsgwmError(f"{family}: the number of questions must be at least 1, found {count}")
    rng = random.Random(f"{family}/{seed}")
    seen: set[str] = set()
    questions = []
    for _ in range(200 * count + 1000):
        text, rationale, answer = FAMILIES[family](rng, rng.choice(NAMES), rng.choice(THINGS))
        if text in seen or split_of(text) != split:
            continue
        seen.add(text)
        questions.append(Question(f"{family}-{split}-{seed}-{len(questions)}", family, text, rationale, str(answer)))
        if len(questions) == count:
            return questions
    raise RsgwmError(f"{family} cannot give {count} distinct {split} questions; ask for fewer")
