"""What the drafts of questions are worth: read by the verifier for its scores, and compared with gold for the label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.hard_negatives import Labelled
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.evaluation.answers import BESIDE, REFUSAL, answer_kind, extract
from mlx_rsgwm.evaluation.equality import is_correct
from mlx_rsgwm.evaluation.records import DraftRecord, ExtractedAnswer
from mlx_rsgwm.inference.draft import Draft, Signals
from mlx_rsgwm.inference.loop import DraftVerify


@dataclass(frozen=True)
class VerifierSaid:
    """By the names of scores: their values for one draft, the tokens read for them, the values of a pool's adapters."""

    scores: dict[str, float] = field(default_factory=dict)
    verified: dict[str, int] = field(default_factory=dict)
    adapters: dict[str, Mapping[str, float]] = field(default_factory=dict)


def judge(
    question: Question,
    draft: Draft,
    scores: Mapping[str, float],
    verified: Mapping[str, int] | None = None,
    refusal: re.Pattern[str] = REFUSAL,
) -> DraftRecord:
    """Read the answer out of a draft with every extractor of the task, and compare each reading with gold."""
    kind = answer_kind(question.task, question.gold)
    readings = {}
    for name in (kind, *BESIDE.get(kind, ())):
        answer = extract(draft.text, name, draft.finished, question.question, refusal)
        readings[name] = ExtractedAnswer(answer.value, answer.status, is_correct(answer.value, question.gold))
    return DraftRecord(
        text=draft.text,
        value=readings[kind].value,
        correct=readings[kind].correct,
        scores=dict(scores),
        tokens=len(draft.tokens),
        finished=draft.finished,
        status=readings[kind].status,
        readings=readings,
        verified=dict(verified or {}),
        kind=draft.kind,
    )


def label_drafts(
    pipelines: Sequence[DraftVerify],
    questions: Sequence[Question],
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> list[list[Labelled]]:
    """Drafts of every question by the drafters of all ``pipelines``, each labelled by gold."""
    texts = [question.question for question in questions]
    labels: list[list[Labelled]] = [[] for _ in questions]
    for pipeline in pipelines:
        drafted = pipeline.draft_many(texts, pipeline.config.most, batch_rows, progress)
        for question, drafts, labelled in zip(questions, drafted, labels, strict=True):
            labelled += [(draft.text, judge(question, draft, {}).correct) for draft in drafts]
    return labels


def read_all(
    pipeline: DraftVerify,
    texts: Sequence[str],
    drafted: Sequence[Sequence[Draft]],
    batch_rows: int = 32,
    progress: Progress = SILENT,
) -> list[list[Signals]]:
    """What the verifier says of every draft of every question, for all scores at once."""
    flat = [draft for drafts in drafted for draft in drafts]
    owners = [text for text, drafts in zip(texts, drafted, strict=True) for _ in drafts]
    signals = iter(pipeline.reader.signals_many(owners, flat, batch_rows=batch_rows, progress=progress))
    return [[next(signals) for _ in drafts] for drafts in drafted]


def read_by(
    pipeline: DraftVerify,
    names: Sequence[str],
    texts: Sequence[str],
    drafted: Sequence[Sequence[Draft]],
    batch_rows: int,
    prefix: str = "",
) -> list[list[VerifierSaid]]:
    """For every draft of every question: the scores ``names``, and how many tokens the verifier read for each.

    Scores that the verifier cannot give are left out; ``prefix`` is put before the names of the others.
    """
    scorers = {name: pipeline.scorer(name) for name in names if name in pipeline.scores}
    if not scorers:
        return [[VerifierSaid() for _ in drafts] for drafts in drafted]
    signals = read_all(pipeline, texts, drafted, batch_rows)
    columns = {name: [scorer.values(said).tolist() for said in signals] for name, scorer in scorers.items()}
    rows = []
    for index, (text, drafts) in enumerate(zip(texts, drafted, strict=True)):
        read = verified_tokens(pipeline, text, drafts)
        rows.append(
            [
                VerifierSaid(
                    {prefix + name: columns[name][index][number] for name in scorers},
                    {prefix + name: read[number][name] for name in scorers},
                    {prefix + name: pipeline.by_adapter(signals[index][number], name) for name in scorers}
                    if len(pipeline.verifiers) > 1
                    else {},
                )
                for number in range(len(drafts))
            ]
        )
    return rows


def verified_tokens(pipeline: DraftVerify, question: str, drafts: Sequence[Draft]) -> list[dict[str, int]]:
    """How many tokens the verifier reads to give each of its scores to each draft, prompt included; a pool reads them
    as often as it has adapters."""
    template, tokenizer, readers = pipeline.verify_template, pipeline.tokenizer, max(1, len(pipeline.verifiers))
    prompt = len(pipeline.reader.prompt(question))
    counts = []
    for draft in drafts:
        likelihood = prompt + len(draft.tokens) + draft.finished
        verdict = len(template.verify_prompt(tokenizer, question, draft.text.strip()))
        # Where the verdict is asked for after the draft, one reading serves both.
        both = verdict + likelihood if template.chat else verdict
        tokens = {"mean_logprob": likelihood, "yesno": verdict, "combined": both}
        counts.append({name: readers * count for name, count in tokens.items()})
    return counts
