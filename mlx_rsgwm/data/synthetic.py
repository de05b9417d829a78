"""The embedded task families: seeded word problems that a 135M model learns and still gets wrong.

They exist so that the whole line (train, merge, draft, verify) runs on a fresh machine in minutes. Questions are
generated, never stored; a seed and a count name a data set. The demo's are ``PLAIN``; in those of ``BLIND`` wrong
drafts calculate rightly, so that only a verifier can tell them from right ones.
"""

from __future__ import annotations

import hashlib
import random

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.blind_problems import BLIND
from mlx_rsgwm.data.questions import Question, SolvedQuestion
from mlx_rsgwm.data.word_problems import NAMES, PLAIN, THINGS, Family, WordProblem

FAMILIES: dict[str, Family] = {**PLAIN, **BLIND}

SPLITS = {"train": range(6), "calibration": range(6, 8), "test": range(8, 10)}
LARGEST_COUNT = 100_000  # beyond what most families have; all of them are made before the first is used


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
    if count > LARGEST_COUNT:
        raise RsgwmError(f"{family}: {count} questions are more than the {LARGEST_COUNT} that are generated at most")
    rng = random.Random(f"{family}/{seed}")
    seen: set[str] = set()
    questions: list[Question] = []
    in_vain = 0  # tries since the last new question
    while in_vain < 1000 + 20 * len(seen):
        in_vain += 1
        problem = FAMILIES[family](rng, rng.choice(NAMES), rng.choice(THINGS))
        undecided = family in BLIND and not problem.mistakes
        if undecided or problem.text in seen or split_of(problem.text) != split:
            continue
        seen.add(problem.text)
        in_vain = 0
        questions.append(_question(f"{family}-{split}-{seed}-{len(questions)}", family, problem))
        if len(questions) == count:
            return questions
    raise RsgwmError(f"{family} cannot give {count} distinct {split} questions; ask for fewer")


def _question(name: str, family: str, problem: WordProblem) -> Question:
    told = (name, family, problem.text, problem.rationale, str(problem.answer))
    return SolvedQuestion(*told, mistakes=problem.mistakes) if problem.mistakes else Question(*told)
