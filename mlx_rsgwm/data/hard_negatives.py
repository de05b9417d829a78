"""Verify rows from drafts that adapters wrote themselves: the mistakes a verifier will meet.

Perturbed gold answers err in one number or operation; a drafter errs in its own ways, and a verifier that knows only
the former need not see the latter. Both rows of a pair, one right and one wrong, have the same question, so that
neither the question nor how hard it is gives the verdict away, and a right draft is preferred to the gold answer, so
that the drafter's manner does not either.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.arithmetic import false_equations
from mlx_rsgwm.data.corpus import CorpusRow, wrong_answer
from mlx_rsgwm.data.questions import Question

Labelled = tuple[str, bool]  # a draft's text, and whether its final answer is the gold one


@dataclass(frozen=True)
class MixedRows:
    """Verify rows, and how many of the pairs have a draft or a perturbed gold answer as their wrong answer.

    ``missing``: pairs that should have had a draft and have perturbed gold for want of one.
    """

    rows: list[CorpusRow]
    drafted_pairs: int
    perturbed_pairs: int
    missing: int


def make_mixed_rows(
    questions: Sequence[Question],
    drafts: Sequence[Sequence[Labelled]],
    pairs: int,
    share: float,
    seed: int,
    true_equations: bool = False,
    at_most: bool = False,
) -> MixedRows:
    """``pairs`` pairs of verify rows, ``share`` of them with a draft as the wrong answer, the rest perturbed gold.

    Each question gives its wrong drafts one by one: every question one before any gives a second. Where there are
    fewer wrong drafts than wanted, perturbed gold answers take their place; the result says how many. Perturbed pairs
    take the questions without a drafted pair first. With ``true_equations`` no wrong answer states a false equation.

    Raises:
        RsgwmError: a number out of range, or fewer drafts and perturbable solutions than pairs, unless ``at_most``.
    """
    if pairs < 1 or not 0 <= share <= 1:
        raise RsgwmError(f"pairs must be at least 1 and share in [0, 1], found {pairs} and {share}")
    if len(questions) != len(drafts):
        raise ValueError(f"{len(questions)} questions and drafts of {len(drafts)}")
    rng = random.Random(f"drafted/{seed}")
    order = list(range(len(questions)))
    rng.shuffle(order)
    wrong = {index: _distinct(drafts[index], correct=False, rng=rng) for index in order}
    if true_equations:
        wrong = {
            index: [text for text in texts if not false_equations(text, questions[index].question)]
            for index, texts in wrong.items()
        }
    right = {index: _distinct(drafts[index], correct=True, rng=rng) for index in order}
    rows: list[CorpusRow] = []
    used: set[int] = set()
    wanted, turn = round(pairs * share), 0
    while len(rows) < 2 * wanted and any(len(texts) > turn for texts in wrong.values()):
        for index in order:
            if len(rows) < 2 * wanted and len(wrong[index]) > turn:
                good = right[index][turn % len(right[index])] if right[index] else questions[index].answer
                rows += _pair(questions[index], "drafted", turn, good, wrong[index][turn])
                used.add(index)
        turn += 1
    drafted = len(rows) // 2
    for index in sorted(order, key=lambda index: index in used):
        if len(rows) == 2 * pairs:
            break
        negative = wrong_answer(questions[index], questions, rng, true_equations)
        if negative is not None:
            rows += _pair(questions[index], "perturbed", 0, questions[index].answer, negative.answer)
    if len(rows) < 2 * pairs and not at_most:
        raise RsgwmError(
            f"{pairs} pairs asked for, but {len(questions)} questions gave only {drafted} with a wrong draft and "
            f"{len(rows) // 2 - drafted} with a perturbed answer; ask for fewer or give more questions"
        )
    return MixedRows(rows, drafted, len(rows) // 2 - drafted, wanted - drafted)


def _distinct(drafts: Sequence[Labelled], correct: bool, rng: random.Random) -> list[str]:
    """Different texts with this label, shuffled; empty ones left out."""
    texts = list(dict.fromkeys(text.strip() for text, label in drafts if label == correct))
    texts = [text for text in texts if text]
    rng.shuffle(texts)
    return texts


def _pair(question: Question, kind: str, turn: int, good: str, bad: str) -> list[CorpusRow]:
    name = f"{question.id}/{kind}{f'-{turn + 1}' if turn else ''}"
    return [
        CorpusRow(f"{name}/{label}", question.task, "verify", question.question, text, correct)
        for label, text, correct in (("right", good, True), ("wrong", bad, False))
    ]
