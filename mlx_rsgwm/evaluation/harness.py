"""Running questions through the pipeline and writing down what happened, draft by draft."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from mlx_rsgwm.data.negatives import perturb
from mlx_rsgwm.data.sources import Question
from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.evaluation.answers import answer_kind, extract, is_correct
from mlx_rsgwm.evaluation.metrics import Draft, ItemRecord
from mlx_rsgwm.pipeline.calibration import Calibration, fit
from mlx_rsgwm.pipeline.loop import Drafted, DraftVerify, decide
from mlx_rsgwm.pipeline.verifying import SCORES
from mlx_rsgwm.progress import SILENT, Progress


def evaluate(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    timed: int,
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> list[ItemRecord]:
    """One record per question, with all K drafts and every score of each.

    Drafts and scores are made in batches; the loop's decision is then replayed on them. Drafting all K whatever the
    verifier says costs drafts that the loop would not make, and buys the ceiling any-of-K and the drafter alone on the
    same items from the same drafts. Latency is taken apart, one question at a time as a user would wait for it, on
    ``timed`` questions spread evenly over the list.
    """
    if not questions:
        raise RsgwmError("there are no questions to evaluate")
    config = pipeline.config
    texts = [question.question for question in questions]
    drafted = pipeline.draft_many(texts, config.attempts, batch_rows, progress)
    scores = _scores(pipeline, texts, drafted, batch_rows, progress)
    records = []
    for question, drafts, item_scores in zip(questions, drafted, scores, strict=True):
        decision = decide([found[config.score] for found in item_scores], config.threshold)
        records.append(
            ItemRecord(
                id=question.id,
                task=question.task,
                question=question.question,
                gold=question.gold,
                drafts=tuple(judge(question, *pair) for pair in zip(drafts, item_scores, strict=True)),
                score_name=config.score,
                threshold=config.threshold,
                accepted=decision.accepted,
                attempts=decision.attempts,
                chosen=decision.chosen,
            )
        )
    return _with_latency(pipeline, records, min(timed, len(records)), progress)


def judge(question: Question, draft: Drafted, scores: dict[str, float]) -> Draft:
    """Read the answer out of a draft and compare it with gold."""
    found = extract(draft.text, answer_kind(question.task, question.gold))
    return Draft(
        text=draft.text,
        value=found.value,
        correct=is_correct(found.value, question.gold),
        scores=scores,
        tokens=len(draft.tokens),
        finished=draft.finished,
    )


def calibrate(
    pipeline: DraftVerify, questions: Sequence[Question], seed: int, batch_rows: int = 32, progress: Progress = SILENT
) -> Calibration:
    """Compare the scores on the drafter's own drafts of held-out questions, and on gold against perturbed answers."""
    texts = [question.question for question in questions]
    drafted = pipeline.draft_many(texts, pipeline.config.attempts, batch_rows, progress)
    scores = _scores(pipeline, texts, drafted, batch_rows, progress)
    judged = [
        judge(question, draft, found)
        for question, drafts, item_scores in zip(questions, drafted, scores, strict=True)
        for draft, found in zip(drafts, item_scores, strict=True)
    ]
    own = {name: [draft.scores[name] for draft in judged] for name in SCORES}
    rng = random.Random(f"calibration/{seed}")
    pair_questions: list[str] = []
    answers: list[Drafted] = []
    for question in questions:
        negative = perturb(question, rng)
        if negative is not None:
            pair_questions += [question.question] * 2
            answers += [pipeline.as_draft(question.answer), pipeline.as_draft(negative.answer)]
    labels = [index % 2 == 0 for index in range(len(answers))]
    perturbed = {
        name: pipeline.score_many(pair_questions, answers, name, batch_rows, progress) if answers else []
        for name in SCORES
    }
    return fit(own, [draft.correct for draft in judged], perturbed, labels, pipeline.template.hash)


def _scores(
    pipeline: DraftVerify,
    texts: Sequence[str],
    drafted: Sequence[Sequence[Drafted]],
    batch_rows: int,
    progress: Progress,
) -> list[list[dict[str, float]]]:
    flat = [draft for drafts in drafted for draft in drafts]
    owners = [text for text, drafts in zip(texts, drafted, strict=True) for _ in drafts]
    columns = {name: iter(pipeline.score_many(owners, flat, name, batch_rows, progress)) for name in SCORES}
    return [[{name: next(column) for name, column in columns.items()} for _ in drafts] for drafts in drafted]


def _with_latency(
    pipeline: DraftVerify, records: Sequence[ItemRecord], timed: int, progress: Progress
) -> list[ItemRecord]:
    found = list(records)
    if not timed:
        return found
    indices = sorted({round(step * len(records) / timed) for step in range(timed)} - {len(records)})
    # The first pass through a shape compiles and allocates; nobody should pay for that in the figures.
    pipeline.answer(records[indices[0]].question)
    with progress.task("time, one question at a time", len(indices)) as advance:
        for index in indices:
            record = records[index]
            started = time.perf_counter()
            first = 0.0
            for step in pipeline.steps(record.question):
                if isinstance(step, Drafted) and step.attempt == 1:
                    first = time.perf_counter() - started
            total = time.perf_counter() - started
            drafts = (replace(record.drafts[0], latency_ms=first * 1000), *record.drafts[1:])
            found[index] = replace(record, drafts=drafts, latency_ms=total * 1000)
            advance(1, f"{total:.2f} s")
    return found
