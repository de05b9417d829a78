"""Running questions through the pipeline and writing down what happened, draft by draft."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.evaluation import judging
from mlx_rsgwm.evaluation.answers import REFUSAL
from mlx_rsgwm.evaluation.journal import EvaluationJournal
from mlx_rsgwm.evaluation.latency import with_latency
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.inference.identity import describe_pipeline
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import Decision, LoopConfig, decide
from mlx_rsgwm.inference.pool import winner
from mlx_rsgwm.inference.scores import SCORES


def evaluate(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    timed: int,
    batch_rows: int = 32,
    progress: Progress = SILENT,
    *,
    seeds: Sequence[int] = (),
    drafts: int | None = None,
    beside: Mapping[str, DraftVerify] | None = None,
    scores: Sequence[str] = SCORES,
    journal: EvaluationJournal | None = None,
    part: str = "",
    refusal: re.Pattern[str] = REFUSAL,
    processes: Processes = ALONE,
) -> list[ItemRecord]:
    """One record per question and sampling seed, with all drafts and every score of each.

    Drafts and scores are made in batches; the loop's decision is then replayed on them. Drafting all K whatever the
    verifier says costs drafts that the loop would not make, and buys the ceiling any-of-K and the drafter alone on the
    same items from the same drafts. Latency is taken apart, one question at a time as a user would wait for it, on
    ``timed`` questions of the first seed, spread evenly over the list.

    Args:
        pipeline: drafter and verifier; its sampling seed is used where ``seeds`` is empty.
        timed: how many questions are also run one by one; 0 for no latencies.
        seeds: sampling seeds, each one a pass over all questions.
        drafts: recorded per question, at least those that the loop may make (None: as many).
        beside: other verifiers of the same drafts; the score each decides by is recorded as ``name:score``.
        scores: the pipeline's verifier scores to record; the loop's own must be among them, or none at all.
        journal: keeps every finished batch under its run, whose key is ``part`` and the seed, and what it holds already
            is not run again.
        refusal: wording of a refusal (see :func:`~mlx_rsgwm.evaluation.answers.extract`).
        processes: each takes every size-th batch and keeps it in its own shard of the ``journal``, which there must be
            for several; all return all records, which are those of one process. The first alone takes the latencies.

    Raises:
        RsgwmError: no questions, questions without gold or of one id.
    """
    config = replace(pipeline.config, check="none")  # the report replays the loop with a check on the same drafts
    pipeline = pipeline.with_config(config)
    _check(questions, scores, config.score)
    if processes.size > 1 and journal is None:
        raise RsgwmError("several processes need a folder in which each keeps what it has done")
    count = max(config.most, drafts or 0)
    verifiers = {"": (pipeline, scores)}
    verifiers |= {f"{name}:": (other, (other.config.score,)) for name, other in (beside or {}).items()}
    blocks = _blocks(pipeline, questions, max(1, batch_rows // count))
    records: dict[tuple[str, str], ItemRecord] = {}
    runs: dict[str, DraftVerify] = {}
    for seed in seeds or (config.sampling.seed,):
        run = f"{part}/{seed}"
        runs[run] = pipeline.with_config(replace(config, sampling=replace(config.sampling, seed=seed)))
        label = f"{part or 'evaluate'}, seed {seed}" if part or len(seeds) > 1 else "evaluate"
        with progress.task(label, len(questions)) as advance:
            for block in blocks[processes.rank :: processes.size]:
                made = _finished(journal, run, block)
                if not made:
                    made = _evaluate_block(runs[run], block, count, batch_rows, verifiers, refusal)
                    if journal:
                        journal.add_items(run, made)
                records.update({(run, record.id): record for record in made})
                advance(len(block), "")
    processes.wait()
    if processes.size > 1 and journal:
        journal.read_others()
        records = journal.items
    rows = {run: [records[run, question.id] for question in questions] for run in runs}
    if timed and processes.writes:
        run, drafter = next(iter(runs.items()))
        rows[run] = with_latency(drafter, rows[run], min(timed, len(questions)), progress, journal, run)
    return [record for run in runs for record in rows[run]]


def _finished(journal: EvaluationJournal | None, run: str, questions: Sequence[Question]) -> list[ItemRecord]:
    """The records of a batch that the journal holds; none unless it holds all."""
    items = [journal.items.get((run, question.id)) for question in questions] if journal else []
    records = [record for record in items if record is not None]
    return records if len(records) == len(questions) else []


def _check(questions: Sequence[Question], scores: Sequence[str], used: str) -> None:
    if not questions:
        raise RsgwmError("there are no questions to evaluate")
    double = sorted(name for name, count in Counter(question.id for question in questions).items() if count > 1)
    if double:
        raise RsgwmError(f"questions need ids of their own; given twice: {', '.join(double[:5])}")
    if missing := [question.id for question in questions if not question.gold.strip()]:
        raise RsgwmError(f"questions without a gold answer: {', '.join(missing[:5])}")
    if scores and used not in scores:
        raise RsgwmError(f"the loop decides by {used!r}, which is not among the scores {', '.join(scores)}")


def _blocks(pipeline: DraftVerify, questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Batches of questions of like prompt length: the same ones whenever the same questions are asked."""
    lengths = [len(pipeline.template.draft_prompt(pipeline.tokenizer, question.question)) for question in questions]
    order = sorted(range(len(questions)), key=lambda index: (lengths[index], index))
    return [[questions[index] for index in order[start : start + size]] for start in range(0, len(order), size)]


def _evaluate_block(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    count: int,
    batch_rows: int,
    verifiers: Mapping[str, tuple[DraftVerify, Sequence[str]]],
    refusal: re.Pattern[str],
) -> list[ItemRecord]:
    """Draft ``count`` times, have every verifier read the drafts, label them by gold; ``verifiers`` by the prefix of
    their scores, each with the scores to record. The one without a prefix is the loop's."""
    config = pipeline.config
    texts = [question.question for question in questions]
    drafted = pipeline.draft_many(texts, count, batch_rows)
    columns = [
        judging.read_by(verifier, names, texts, drafted, batch_rows, prefix)
        for prefix, (verifier, names) in verifiers.items()
    ]
    records = []
    for index, (question, drafts) in enumerate(zip(questions, drafted, strict=True)):
        judged = []
        for number, draft in enumerate(drafts):
            scores: dict[str, float] = {}
            verified: dict[str, int] = {}
            adapters: dict[str, Mapping[str, float]] = {}
            for column in columns:
                said = column[index][number]
                scores, verified, adapters = scores | said.scores, verified | said.verified, adapters | said.adapters
            record = judging.judge(question, draft, scores, verified, refusal)
            if adapters:
                record = replace(record, adapters=adapters, won={name: winner(by) for name, by in adapters.items()})
            judged.append(record)
        records.append(_record(question, judged, config, scored=bool(verifiers[""][1])))
    return records


def _record(question: Question, drafts: Sequence[DraftRecord], config: LoopConfig, scored: bool) -> ItemRecord:
    """The record of one item, with the loop's decision; without scores its first draft, not accepted."""
    used = [draft.scores.get(config.score) for draft in drafts[: config.most]]
    decision = decide(used, config.threshold) if scored else Decision(chosen=0, attempts=1, accepted=False)
    return ItemRecord(
        id=question.id,
        task=question.task,
        question=question.question,
        gold=question.gold,
        drafts=tuple(drafts),
        score_name=config.score,
        threshold=config.threshold,
        accepted=decision.accepted,
        attempts=decision.attempts,
        chosen=decision.chosen,
        seed=config.sampling.seed,
        abstain=config.abstain,
    )


def describe_run(
    pipeline: DraftVerify, questions: Sequence[Question], batch_rows: int | None, **more: Any
) -> dict[str, Any]:
    """Everything the items of a run depend on, for its journal and its report: prompt and decoding included.

    ``batch_rows``: where a run that goes on has to end in the same bits; None: where it may go on in other batches.
    """
    return {
        **describe_pipeline(pipeline),
        "questions": files.sha256_json([asdict(question) for question in questions]),
        "items": len(questions),
        **({} if batch_rows is None else {"batch_rows": batch_rows}),
        **more,
    }
