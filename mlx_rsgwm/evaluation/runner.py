"""Running questions through the pipeline and writing down what happened, draft by draft."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.hard_negatives import LabelledDraft
from mlx_rsgwm.data.perturb import perturb
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.row_hashes import RowRecord
from mlx_rsgwm.evaluation.answers import BESIDE, REFUSAL, answer_kind, extract
from mlx_rsgwm.evaluation.calibration_set import (
    CalibrationItem,
    explain,
    header_of,
    identity,
    keep_drafts,
    kept_drafts,
)
from mlx_rsgwm.evaluation.energy import counters, joules
from mlx_rsgwm.evaluation.equality import is_correct
from mlx_rsgwm.evaluation.journal import Journal, Timing
from mlx_rsgwm.evaluation.records import Draft, ItemRecord, Reading
from mlx_rsgwm.inference.calibration import Calibration, NothingToTellApart
from mlx_rsgwm.inference.calibration_fit import Judged, fit
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.policy import Drafted, LoopConfig, decide
from mlx_rsgwm.inference.risk_control import Target
from mlx_rsgwm.inference.verifier import SCORES, Signals


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
    journal: Journal | None = None,
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
        questions: each with an id of its own.
        timed: how many questions are also run one by one; 0 for no latencies.
        batch_rows: drafts made at a time.
        seeds: sampling seeds, each one a pass over all questions.
        drafts: recorded per question, at least the loop's attempts (None: as many).
        beside: other verifiers of the same drafts; the score each decides by is recorded as ``name:score``.
        scores: the pipeline's verifier scores to record; the loop's own must be among them, or none at all.
        journal: keeps every finished batch, and what it holds already is not run again.
        part: name of this drafter in the journal.
        refusal: wording of a refusal (see :func:`~mlx_rsgwm.evaluation.answers.extract`).
        processes: with several, each takes every size-th batch and keeps it in its own shard of the ``journal``, which
            there must be; all return all records. The batches, and so the records, are those of one process. The first
            process alone takes the latencies.

    Raises:
        RsgwmError: no questions, questions without gold or of one id.
    """
    config = pipeline.config
    _check(questions, scores, config.score)
    if processes.size > 1 and journal is None:
        raise RsgwmError("several processes need a folder in which each keeps what it has done")
    count = max(config.attempts, drafts or 0)
    found: dict[tuple[str, str], ItemRecord] = {}
    drafters: dict[str, DraftVerify] = {}
    for seed in seeds or (config.sampling.seed,):
        seeded = replace(config, sampling=replace(config.sampling, seed=seed))
        name = f"{part}/{seed}"
        drafters[name] = drafter = _with_config(pipeline, seeded)
        blocks = _blocks(pipeline, questions, max(1, batch_rows // count))
        label = f"{part or 'evaluate'}, seed {seed}" if part or len(seeds) > 1 else "evaluate"
        with progress.task(label, len(questions)) as advance:
            for block in blocks[processes.rank :: processes.size]:
                kept = [journal.items.get((name, question.id)) for question in block] if journal else []
                known = [record for record in kept if record is not None]
                if len(known) < len(block):
                    known = list(_block(drafter, block, count, batch_rows, beside or {}, scores, refusal))
                    if journal:
                        journal.add_items(name, known)
                found.update({(name, record.id): record for record in known})
                advance(len(block), "")
    processes.wait()
    if processes.size > 1 and journal:
        journal.read_others()
        found = journal.items
    records: list[ItemRecord] = []
    for name, drafter in drafters.items():
        rows = [found[name, question.id] for question in questions]
        if timed and not records and processes.writes:
            rows = _with_latency(drafter, rows, min(timed, len(rows)), progress, journal, name)
        records += rows
    return records


def _with_config(pipeline: DraftVerify, config: LoopConfig) -> DraftVerify:
    other = copy(pipeline)
    other.config = config
    return other


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


def _block(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    count: int,
    batch_rows: int,
    beside: Mapping[str, DraftVerify],
    scores: Sequence[str],
    refusal: re.Pattern[str],
) -> Iterator[ItemRecord]:
    config = pipeline.config
    texts = [question.question for question in questions]
    drafted = pipeline.draft_many(texts, count, batch_rows)
    verifiers = [
        ("", pipeline, scores),
        *((f"{name}:", other, (other.config.score,)) for name, other in beside.items()),
    ]
    columns = [
        (prefix, verifier, _scores(verifier, texts, drafted, batch_rows, SILENT, names))
        for prefix, verifier, names in verifiers
    ]
    for index, (question, drafts) in enumerate(zip(questions, drafted, strict=True)):
        judged = []
        for number, draft in enumerate(drafts):
            values: dict[str, float] = {}
            read: dict[str, int] = {}
            for prefix, verifier, found in columns:
                values |= {prefix + name: value for name, value in found[index][number].items()}
                costs = verified_tokens(verifier, question.question, draft)
                read |= {prefix + name: costs[name] for name in found[index][number] if name in costs}
            judged.append(judge(question, draft, values, read, refusal))
        used = [draft.scores.get(config.score, -1.0) for draft in judged[: config.attempts]]
        decision = decide(used, config.threshold if scores else -1.0)
        yield ItemRecord(
            id=question.id,
            task=question.task,
            question=question.question,
            gold=question.gold,
            drafts=tuple(judged),
            score_name=config.score,
            threshold=config.threshold,
            accepted=decision.accepted and bool(scores),
            attempts=decision.attempts,
            chosen=decision.chosen,
            seed=config.sampling.seed,
            abstain=config.abstain,
        )


def verified_tokens(pipeline: DraftVerify, question: str, draft: Drafted) -> dict[str, int]:
    """How many tokens the verifier reads to give each of its scores to a draft, prompt included."""
    template, tokenizer = pipeline.verify_template, pipeline.tokenizer
    prompt = len(template.draft_prompt(tokenizer, question))
    costs = {
        "mean_logprob": prompt + len(draft.tokens) + draft.finished,
        "yesno": len(template.verify_prompt(tokenizer, question, draft.text.strip())),
    }
    # Where the verdict is asked for after the draft, one reading serves both.
    return {**costs, "combined": costs["yesno"] if not template.chat else sum(costs.values())}


def judge(
    question: Question,
    draft: Drafted,
    scores: Mapping[str, float],
    verified: Mapping[str, int] | None = None,
    refusal: re.Pattern[str] = REFUSAL,
) -> Draft:
    """Read the answer out of a draft with every extractor of the task, and compare each reading with gold."""
    kind = answer_kind(question.task, question.gold)
    readings = {}
    for name in (kind, *BESIDE.get(kind, ())):
        found = extract(draft.text, name, draft.finished, question.question, refusal)
        readings[name] = Reading(found.value, found.status, is_correct(found.value, question.gold))
    return Draft(
        text=draft.text,
        value=readings[kind].value,
        correct=readings[kind].correct,
        scores=dict(scores),
        tokens=len(draft.tokens),
        finished=draft.finished,
        status=readings[kind].status,
        readings=readings,
        verified=dict(verified or {}),
    )


def collect(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    seed: int,
    batch_rows: int = 32,
    progress: Progress = SILENT,
    file: Path | None = None,
) -> list[CalibrationItem]:
    """Draft all attempts of every question and read them, with gold and perturbed answers beside them.

    With ``file``, what is there is read instead, if it is for the same questions, adapters and settings; else it is
    written.

    Raises:
        RsgwmError: no questions, or a file that is for something else.
    """
    if not questions:
        raise RsgwmError("there are no held-out questions")
    header = header_of(pipeline, questions)
    if file is not None and (kept := kept_drafts(file, header, len(questions))) is not None:
        return kept
    texts = [question.question for question in questions]
    drafted = pipeline.draft_many(texts, pipeline.config.attempts, batch_rows, progress)
    signals = read_all(pipeline, texts, drafted, batch_rows, progress)
    rng = random.Random(f"calibration/{seed}")
    pairs: list[list[Drafted]] = []
    for question in questions:
        wrong = perturb(question, rng)
        answers = [] if wrong is None else [question.answer, wrong.answer]
        pairs.append([pipeline.as_draft(answer) for answer in answers])
    read_pairs = read_all(pipeline, texts, pairs, batch_rows, progress)
    items = [
        CalibrationItem(
            id=question.id,
            task=question.task,
            texts=tuple(draft.text for draft in drafts),
            correct=tuple(judge(question, draft, {}).correct for draft in drafts),
            signals=tuple(said),
            pair=tuple(pair),
        )
        for question, drafts, said, pair in zip(questions, drafted, signals, read_pairs, strict=True)
    ]
    if file is not None:
        keep_drafts(file, header, items)
    return items


def calibrate(
    pipeline: DraftVerify,
    questions: Sequence[Question],
    seed: int,
    batch_rows: int = 32,
    progress: Progress = SILENT,
    *,
    score: str = "auto",
    scores: Sequence[str] = SCORES,
    method: str = "auto",
    target: Target | None = None,
    file: Path | None = None,
    record: RowRecord | None = None,
) -> Calibration:
    """Fit a calibration on the drafter's own drafts of held-out questions; see :func:`collect` and :func:`fit`.

    ``record``: the rows that the calibration says it was fitted on.  [default: the questions alone]

    Raises:
        NothingToTellApart: every draft is right, or every draft wrong.
    """
    items = collect(pipeline, questions, seed, batch_rows, progress, file)
    labels = [correct for item in items for correct in item.correct]
    if all(labels) or not any(labels):
        raise NothingToTellApart(
            f"{'all' if all(labels) else 'none'} of {len(labels)} drafts of {len(items)} questions are right: scores "
            "cannot be calibrated on these; give more or other questions, a higher temperature, or a drafter that "
            "answers some of them and not others"
        )
    pairs = [item.pair for item in items if item.pair]
    calibration = fit(
        Judged([item.signals for item in items], [item.correct for item in items]),
        Judged(pairs, [(True, False)] * len(pairs)),
        score=score,
        scores=scores,
        method=method,
        target=target,
        made_for=identity(pipeline),
        seed=seed,
    )
    record = record or RowRecord.of(question.question for question in questions)
    calibration = replace(calibration, row_hashes=record.describe())
    progress.message(explain(calibration))
    return calibration


def read_all(
    pipeline: DraftVerify,
    texts: Sequence[str],
    drafted: Sequence[Sequence[Drafted]],
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> list[list[Signals]]:
    """What the verifier says of every draft of every question, for all scores at once."""
    flat = [draft for drafts in drafted for draft in drafts]
    owners = [text for text, drafts in zip(texts, drafted, strict=True) for _ in drafts]
    found = iter(pipeline.signals_many(owners, flat, batch_rows=batch_rows, progress=progress))
    return [[next(found) for _ in drafts] for drafts in drafted]


def label_drafts(
    pipelines: Sequence[DraftVerify],
    questions: Sequence[Question],
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> list[list[LabelledDraft]]:
    """Drafts of every question by the drafters of all ``pipelines``, each labelled by gold."""
    texts = [question.question for question in questions]
    found: list[list[LabelledDraft]] = [[] for _ in questions]
    for pipeline in pipelines:
        drafted = pipeline.draft_many(texts, pipeline.config.attempts, batch_rows, progress)
        for question, drafts, labelled in zip(questions, drafted, found, strict=True):
            labelled += [LabelledDraft(draft.text, judge(question, draft, {}).correct) for draft in drafts]
    return found


def _scores(
    pipeline: DraftVerify,
    texts: Sequence[str],
    drafted: Sequence[Sequence[Drafted]],
    batch_rows: int,
    progress: Progress,
    names: Sequence[str] = SCORES,
) -> list[list[dict[str, float]]]:
    scorers = {name: pipeline.scorer(name) for name in names if name in pipeline.scores}
    if not scorers:
        return [[{} for _ in drafts] for drafts in drafted]
    read = read_all(pipeline, texts, drafted, batch_rows, progress)
    columns = {name: [scorer.values(signals).tolist() for signals in read] for name, scorer in scorers.items()}
    return [
        [{name: columns[name][index][number] for name in scorers} for number in range(len(drafts))]
        for index, drafts in enumerate(drafted)
    ]


def _with_latency(
    pipeline: DraftVerify,
    records: Sequence[ItemRecord],
    timed: int,
    progress: Progress,
    journal: Journal | None,
    part: str,
) -> list[ItemRecord]:
    found = list(records)
    indices = sorted({round(step * len(records) / timed) for step in range(timed)} - {len(records)})
    # Side by side, the first draft waits for the others; alone it is what a user of the drafter would wait for.
    single = replace(pipeline.config, attempts=1, mode="sequential")
    alone = _with_config(pipeline, single)
    known = journal.timings if journal else {}
    if any((part, records[index].id) not in known for index in indices):
        # The first pass through a shape compiles and allocates; nobody should pay for that in the figures.
        pipeline.answer(records[indices[0]].question)
    with progress.task("time, one question at a time", len(indices)) as advance:
        for index in indices:
            record = records[index]
            timing = known.get((part, record.id))
            if timing is None:
                timing = _time(pipeline, alone, record.question)
                if journal:
                    journal.add_timing(part, record.id, timing)
            first, total, energy = timing
            drafts = (replace(record.drafts[0], latency_ms=first), *record.drafts[1:])
            found[index] = replace(record, drafts=drafts, latency_ms=total, energy_j=energy)
            advance(1, f"{total / 1000:.2f} s")
    return found


def _time(pipeline: DraftVerify, alone: DraftVerify, question: str) -> Timing:
    started = time.perf_counter()
    next(alone.steps(question))
    first = time.perf_counter() - started
    known = counters()
    before = [counter.read() for counter in known]
    started = time.perf_counter()
    pipeline.answer(question)
    total = time.perf_counter() - started
    return first * 1000, total * 1000, joules(known, before)


def describe_run(pipeline: DraftVerify, questions: Sequence[Question], batch_rows: int, **more: Any) -> dict[str, Any]:
    """Everything the items of a run depend on, for its journal and its report: prompt and decoding included."""
    adapters = {
        role: files.sha256_json(pipeline.slots.adapter(name).manifest.get("files") or {}) if name else None
        for role, name in (("drafter", pipeline.drafter), ("verifier", pipeline.verifier))
    }
    return {
        "base": pipeline.slots.base.fingerprint,
        "adapters": adapters,
        "template": pipeline.template.describe(),
        "verify_template": pipeline.verify_template.describe(),
        "loop": asdict(pipeline.config),
        "questions": files.sha256_json([asdict(question) for question in questions]),
        "items": len(questions),
        "batch_rows": batch_rows,
        **more,
    }
