"""Four embedded task families: seeded word problems in GSM8K style, each with two operations to tell apart.

They exist so that the whole line (train, merge, draft, verify) runs on a fresh machine in minutes with a 135M model
that learns them and still errs. A family with one operation would teach an adapter to stop reading the question, and
the merge of four such adapters confuses the operations (docs/lab-notes/task-families.md). Questions are generated,
never stored; a seed and a count name a data set.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.questions import Question

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


Problem = tuple[str, str, int]


def _change(rng: random.Random, name: str, thing: str) -> Problem:
    """Something is added to a number of things, or taken away."""
    a, b = rng.randint(11, 49), rng.randint(3, 9)
    if rng.random() < 0.5:
        text = rng.choice(
            (
                f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
                f"There are {a} {thing} on a shelf. {name} adds {b}. How many {thing} are there?",
            )
        )
        return text, f"{a} + {b} = {a + b}", a + b
    text = rng.choice(
        (
            f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
            f"There are {a} {thing} in a bag. {name} takes {b} out. How many {thing} stay in the bag?",
        )
    )
    return text, f"{a} - {b} = {a - b}", a - b


def _groups(rng: random.Random, name: str, thing: str) -> Problem:
    """Equal groups: how many in all, or how many in each."""
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if rng.random() < 0.5:
        text = rng.choice(
            (
                f"{name} has {a} boxes with {b} {thing} each. How many {thing} does {name} have?",
                f"There are {a} rows of {b} {thing}. How many {thing} does {name} count?",
            )
        )
        return text, f"{a} * {b} = {a * b}", a * b
    text = rng.choice(
        (
            f"{name} shares {a * b} {thing} equally among {a} friends. How many {thing} does each friend get?",
            f"{name} puts {a * b} {thing} into {a} equal piles. How many {thing} are in each pile?",
        )
    )
    return text, f"{a * b} / {a} = {b}", b


def _compare(rng: random.Random, name: str, thing: str) -> Problem:
    """Two people's things: how many together, or how many more one of them has."""
    other = rng.choice([known for known in NAMES if known != name])
    a, b = rng.randint(12, 40), rng.randint(2, 11)
    start = f"{name} has {a} {thing} and {other} has {b}."
    if rng.random() < 0.5:
        return f"{start} How many {thing} do they have together?", f"{a} + {b} = {a + b}", a + b
    return f"{start} How many more {thing} does {name} have than {other}?", f"{a} - {b} = {a - b}", a - b


def _prices(rng: random.Random, name: str, thing: str) -> Problem:
    """Money: what several things cost, or what is left of a note."""
    if rng.random() < 0.5:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return f"{name} buys {a} {thing} for {b} dollars each. How many dollars is that?", f"{a} * {b} = {a * b}", a * b
    a, b = rng.choice((20, 30, 50)), rng.randint(3, 18)
    text = f"{name} pays {b} dollars for {thing} with {a} dollars. How many dollars does {name} get back?"
    return text, f"{a} - {b} = {a - b}", a - b


FAMILIES: dict[str, Callable[[random.Random, str, str], Problem]] = {
    "change": _change,
    "groups": _groups,
    "compare": _compare,
    "prices": _prices,
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
    questions: list[Question] = []
    for _ in range(200 * count + 1000):
        text, rationale, answer = FAMILIES[family](rng, rng.choice(NAMES), rng.choice(THINGS))
        if text in seen or split_of(text) != split:
            continue
        seen.add(text)
        questions.append(Question(f"{family}-{split}-{seed}-{len(questions)}", family, text, rationale, str(answer)))
        if len(questions) == count:
            return questions
    raise RsgwmError(f"{family} cannot give {count} distinct {split} questions; ask for fewer")
