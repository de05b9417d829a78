"""What one run over a set of items was worth: the rows of the paper's Table 1 and what explains them.

Everything is computed from :class:`ItemRecord`, one per item, so that a report can be recomputed from its JSONL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import comb
from typing import Any, Literal

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.equality import canonical
from mlx_rsgwm.evaluation.records import DraftRecord, ItemRecord
from mlx_rsgwm.evaluation.records import replay as replay
from mlx_rsgwm.evaluation.stats.intervals import Rate, auroc, bootstrapped, share, wilson
from mlx_rsgwm.evaluation.stats.paired import PairedTest, mcnemar

Mode = Literal["drafter", "draft_verify"]


@dataclass(frozen=True)
class Table:
    """The eight rows of Table 1, and what the paper leaves out. None marks what does not apply or was not measured.

    Every draft is right, wrong (an answer that is not the gold: the paper's hallucination), without an answer, or cut
    off before one, and the four shares sum to one. ``false_accept_rate`` counts every accepted draft that is not right
    over the accepted ones; ``accepted_wrong_rate`` leaves those without an answer out of the numerator. Latency is end
    to end, over the ``timed_items`` that were run one by one; ``items_per_minute`` is by the wall clock when that was
    given, else 60000 / latency. Tokens are means per item: written by the drafter, read by the verifier (prompts
    included). ``energy_j`` is the mean per timed item, where the platform tells.
    """

    mode: Mode
    n: int
    accuracy: Rate
    wrong_rate: Rate
    accept_rate: Rate | None
    accepted_and_correct: Rate | None
    false_accept_rate: Rate | None
    average_attempts: float | None
    average_latency_ms: float | None
    items_per_minute: float | None
    timed_items: int
    no_answer_rate: Rate
    cut_off_rate: Rate
    accepted_wrong_rate: Rate | None
    median_latency_ms: float | None = None
    p95_latency_ms: float | None = None
    tokens_drafted: float = 0.0
    tokens_verified: float | None = None
    energy_j: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Rates as ``{value, low, high, n}``, the rest as plain JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value.to_dict() if isinstance(value, Rate) else value for name, value in values.items()}


def final(record: ItemRecord, mode: Mode) -> DraftRecord:
    """The draft a mode answers with."""
    return record.first if mode == "drafter" else record.returned


def table(
    records: Sequence[ItemRecord],
    mode: Mode,
    *,
    wall_seconds: float | None = None,
    max_attempts: int | None = None,
) -> Table:
    """Compute the rows for the drafter alone (first drafts) or for draft–verify (returned drafts).

    ``wall_seconds`` is the time the whole pass took; without it throughput is 60000 / average latency. Acceptance does
    not apply to the drafter alone.

    Raises:
        RsgwmError: no records, or an unknown mode.
        AssertionError: the rows contradict each other, which is a bug here.
    """
    if not records:
        raise RsgwmError("no item records to evaluate")
    if mode not in ("drafter", "draft_verify"):
        raise RsgwmError(f"unknown mode {mode!r}; known are drafter, draft_verify")
    alone, n = mode == "drafter", len(records)
    finals = [final(record, mode) for record in records]
    times = [record.first.latency_ms if alone else record.latency_ms for record in records]
    timed = [value for value in times if value is not None]
    latency = sum(timed) / len(timed) if timed else None
    seconds = wall_seconds if wall_seconds is not None else (None if latency is None else latency * n / 1000)
    accepted = [record.returned for record in records if record.accepted]
    wrong = [draft for draft in accepted if not draft.correct]
    energy = [record.energy_j for record in records if record.energy_j is not None and not alone]
    rates = Table(
        mode=mode,
        n=n,
        accuracy=share(sum(draft.correct for draft in finals), n),
        wrong_rate=share(sum(draft.value is not None and not draft.correct for draft in finals), n),
        accept_rate=None if alone else wilson(len(accepted), n),
        accepted_and_correct=None if alone else wilson(len(accepted) - len(wrong), n),
        false_accept_rate=None if alone else wilson(len(wrong), len(accepted)),
        average_attempts=None if alone else sum(record.attempts for record in records) / n,
        average_latency_ms=latency,
        items_per_minute=60 * n / seconds if seconds else None,
        timed_items=len(timed),
        no_answer_rate=share(sum(draft.status == "no_answer" for draft in finals), n),
        cut_off_rate=share(sum(draft.status == "cut_off" for draft in finals), n),
        accepted_wrong_rate=None if alone else wilson(sum(draft.value is not None for draft in wrong), len(accepted)),
        median_latency_ms=float(np.median(timed)) if timed else None,
        p95_latency_ms=float(np.quantile(timed, 0.95)) if timed else None,
        tokens_drafted=sum(record.first.tokens if alone else record.drafted_tokens for record in records) / n,
        tokens_verified=None if alone else sum(record.verified_tokens for record in records) / n,
        energy_j=sum(energy) / len(energy) if energy else None,
    )
    check_identities(rates, max_attempts)
    return rates


def identity_problems(
    accuracy: float,
    wrong: float,
    missing: float,
    accept_rate: float | None = None,
    accepted_and_correct: float | None = None,
    false_accept_rate: float | None = None,
    average_attempts: float | None = None,
    max_attempts: int | None = None,
) -> list[str]:
    """Which identities of the paper's metrics the figures break, with values; errors below 1e-9 are ignored.

    ``missing`` is the share of all texts without an answer, those cut off before one included.
    """
    tiny, problems = 1e-9, []
    if abs(accuracy + wrong + missing - 1) > tiny:
        problems.append(f"accuracy {accuracy} + wrong {wrong} + no answer or cut off {missing} is not 1")
    if accept_rate is not None and accepted_and_correct is not None:
        if accepted_and_correct > min(accept_rate, accuracy) + tiny:
            problems.append(
                f"accepted and correct {accepted_and_correct} exceeds accept rate {accept_rate} or accuracy {accuracy}"
            )
        if accept_rate and false_accept_rate is not None:
            expected = 1 - accepted_and_correct / accept_rate
            if abs(false_accept_rate - expected) > tiny:
                problems.append(
                    f"false-accept rate {false_accept_rate} is not "
                    f"1 - {accepted_and_correct}/{accept_rate} = {expected:.4f}"
                )
    if average_attempts is not None and (
        average_attempts < 1 or (max_attempts is not None and average_attempts > max_attempts + tiny)
    ):
        problems.append(f"average attempts {average_attempts} is outside 1–{max_attempts}")
    return problems


def check_identities(rates: Table, max_attempts: int | None = None) -> None:
    """Raise AssertionError with the values when the rows of a table contradict each other."""
    problems = identity_problems(
        rates.accuracy.value,
        rates.wrong_rate.value,
        rates.no_answer_rate.value + rates.cut_off_rate.value,
        _value(rates.accept_rate),
        _value(rates.accepted_and_correct),
        _value(rates.false_accept_rate),
        rates.average_attempts,
        max_attempts,
    )
    if problems:
        raise AssertionError("metrics contradict each other: " + "; ".join(problems))


def _value(rate: Rate | None) -> float | None:
    return None if rate is None else rate.value


def by_task(records: Sequence[ItemRecord], mode: Mode) -> dict[str, Rate]:
    """Accuracy of each task (family), in order of first appearance."""
    results: dict[str, list[bool]] = {}
    for record in records:
        results.setdefault(record.task, []).append(final(record, mode).correct)
    return {task: share(sum(correct), len(correct)) for task, correct in results.items()}


def any_of_k(records: Sequence[ItemRecord], k: int) -> Rate | None:
    """Share of items with a correct draft among the first ``k``: the ceiling for any verifier.

    None when some item has fewer than ``k`` drafts recorded: the drafts an accepting loop never made are unknown.
    """
    if not records or any(len(record.drafts) < k for record in records):
        return None
    return wilson(sum(any(draft.correct for draft in record.drafts[:k]) for record in records), len(records))


def pass_at_k(records: Sequence[ItemRecord], k: int, seed: int = 0) -> Rate | None:
    """Chance that ``k`` drafts drawn from the recorded ones hold a correct one, over items (Chen et al. 2021, eq. 1).

    With n recorded drafts, c of them right: 1 - C(n-c, k) / C(n, k). None when some item has fewer than ``k`` drafts.
    """
    if not records or any(len(record.drafts) < k for record in records):
        return None
    chances = []
    for record in records:
        n, right = len(record.drafts), sum(draft.correct for draft in record.drafts)
        chances.append(1 - comb(n - right, k) / comb(n, k))
    values = np.asarray(chances)
    return bootstrapped(lambda rows: float(values[rows].mean()), [record.id for record in records], seed=seed)


def majority_index(drafts: Sequence[DraftRecord], calculated: bool = False) -> int:
    """Index of the first draft with the commonest answer; drafts without one do not vote, ties go to the earliest.

    ``calculated``: nor do drafts that state a false equation, unless all that have an answer do.
    """
    voters = [i for i, draft in enumerate(drafts) if draft.value is not None]
    if calculated:
        voters = [i for i in voters if drafts[i].false_equation is None] or voters
    answers = {i: canonical(drafts[i].value or "") for i in voters}
    votes = Counter(answers.values())
    if not votes:
        return 0
    winner = max(votes, key=lambda value: votes[value])  # Counter keeps first-seen order, max the first of equals
    return next(i for i, answer in answers.items() if answer == winner)


def majority_of_k(records: Sequence[ItemRecord], k: int) -> Rate | None:
    """Accuracy of the majority answer among the first ``k`` drafts (maj@k); None when not all were recorded."""
    if not records or any(len(record.drafts) < k for record in records):
        return None
    return wilson(sum(r.drafts[majority_index(r.drafts[:k])].correct for r in records), len(records))


def gap_closed(accuracy: float, first: float, ceiling: float | None) -> float | None:
    """(accuracy − first draft) / (any-of-K − first draft); None without a ceiling or without a gap. May be negative."""
    return None if ceiling is None or ceiling <= first else (accuracy - first) / (ceiling - first)


def score_names(records: Sequence[ItemRecord]) -> list[str]:
    """Every verifier score that some draft has."""
    return list(dict.fromkeys(name for record in records for draft in record.drafts for name in draft.scores))


def scored_drafts(
    records: Sequence[ItemRecord],
    name: str,
    count: int | None = None,
    passes: Callable[[ItemRecord, DraftRecord], bool] | None = None,
) -> tuple[list[float], list[bool], list[str]]:
    """(scores, right or not, item ids) of the first ``count`` drafts of every item (None: of all) that have a score.

    ``passes`` leaves out the drafts that it does not hold for.
    """
    rows = [
        (draft.scores[name], draft.correct, record.id)
        for record in records
        for draft in record.drafts[:count]
        if name in draft.scores and (passes is None or passes(record, draft))
    ]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def verifier_auroc(records: Sequence[ItemRecord], seed: int = 0) -> dict[str, dict[str, Rate | None]]:
    """For every score: how well it ranks right above wrong among ``all`` recorded drafts and among ``first`` ones.

    Drafts of one item are resampled together. Those without an answer count as not right.
    """
    by_score: dict[str, dict[str, Rate | None]] = {}
    for name in score_names(records):
        by_score[name] = {}
        for label, count in (("all", None), ("first", 1)):
            scores, correct, ids = scored_drafts(records, name, count)
            by_score[name][label] = auroc(scores, correct, groups=ids, seed=seed)
    return by_score


def compare(records: Sequence[ItemRecord]) -> PairedTest:
    """Exact McNemar test of draft–verify (second) against the drafter alone (first) on the same items."""
    return mcnemar([record.first.correct for record in records], [record.returned.correct for record in records])


def sweep(
    records: Sequence[ItemRecord], thresholds: Sequence[float], k: int, score_name: str | None = None
) -> dict[float, Table]:
    """Draft–verify at other thresholds, replayed from recorded drafts; empty when a needed draft is missing."""
    try:
        return {
            threshold: table([replay(record, threshold, k, score_name) for record in records], "draft_verify")
            for threshold in thresholds
        }
    except RsgwmError:
        return {}
