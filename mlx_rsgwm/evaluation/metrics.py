"""What one run over a set of items was worth: the rows of the paper's Table 1 and what explains them.

Everything is computed from :class:`ItemRecord`, one per item, so that a report can be recomputed from its JSONL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from mlx_rsgwm.errors import RsgwmError, raise_problems
from mlx_rsgwm.evaluation.answers import canonical
from mlx_rsgwm.evaluation.intervals import PairedTest, Rate, auroc, mcnemar, wilson

Mode = Literal["drafter", "draft_verify"]


@dataclass(frozen=True)
class Draft:
    """One generated answer. ``value`` is None for a refusal; ``finished`` is False when the token limit cut it.

    ``scores`` holds every verifier score that was computed, in [0, 1]; ``latency_ms`` is the time to draft it.
    """

    text: str
    value: str | None
    correct: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    finished: bool = True
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        if self.correct and self.value is None:
            raise RsgwmError("draft: a refusal (value None) cannot be correct")


@dataclass(frozen=True)
class ItemRecord:
    """What happened on one item.

    ``drafts`` may hold more drafts than the loop used: the oracle needs all K of them, the loop the first
    ``attempts``. ``chosen`` is the index of the returned draft; ``latency_ms`` is end to end, verification and
    retries included, or None when not timed.
    """

    id: str
    task: str
    question: str
    gold: str
    drafts: tuple[Draft, ...]
    score_name: str
    threshold: float
    accepted: bool
    attempts: int
    chosen: int
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.attempts <= len(self.drafts):
            problems.append(f"attempts is {self.attempts} with {len(self.drafts)} drafts recorded")
        elif not 0 <= self.chosen < self.attempts:
            problems.append(f"chosen is {self.chosen}, outside the {self.attempts} attempts")
        elif (score := self.drafts[self.chosen].scores.get(self.score_name)) is not None:
            if self.accepted != (score >= self.threshold):
                verb = "accepted" if self.accepted else "not accepted"
                problems.append(f"{verb} with {self.score_name} {score} at threshold {self.threshold}")
        elif self.accepted:
            problems.append(f"accepted without a score {self.score_name!r}")
        raise_problems(f"item {self.id}", problems)

    @property
    def first(self) -> Draft:
        """The drafter alone: its first draft."""
        return self.drafts[0]

    @property
    def returned(self) -> Draft:
        """What draft–verify returned."""
        return self.drafts[self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; :meth:`from_dict` reads it back equal."""
        drafts = [{**asdict(replace(draft, scores={})), "scores": dict(draft.scores)} for draft in self.drafts]
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"drafts": drafts}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "item record") -> ItemRecord:
        """Read one line of ``items.jsonl``; missing or unknown fields are a :class:`RsgwmError`."""
        try:
            drafts = tuple(Draft(**draft) for draft in value["drafts"])
            return cls(**{**value, "drafts": drafts})
        except (KeyError, TypeError) as error:
            raise RsgwmError(f"{where}: not an item record ({error})") from None


@dataclass(frozen=True)
class Table:
    """The eight rows of Table 1, and what the paper leaves out. None marks what does not apply or was not timed.

    ``false_accept_rate`` counts every accepted wrong answer over the accepted ones; ``far_halluc`` leaves refusals out
    of the numerator (SPEC 6.1). ``average_latency_ms`` is end to end, the mean over the ``timed_items`` that were run
    one by one; ``items_per_minute`` is by the wall clock when that was given, else 60000 / latency.
    """

    mode: Mode
    n: int
    accuracy: Rate
    hallucination_rate: Rate
    accept_rate: Rate | None
    accepted_and_correct: Rate | None
    false_accept_rate: Rate | None
    average_attempts: float | None
    average_latency_ms: float | None
    items_per_minute: float | None
    timed_items: int
    refusal_rate: Rate
    truncated_rate: Rate
    far_halluc: Rate | None

    def to_dict(self) -> dict[str, Any]:
        """Rates as ``{value, low, high, n}``, the rest as plain JSON values."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value.to_dict() if isinstance(value, Rate) else value for name, value in found.items()}


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
    finals = [record.first if alone else record.returned for record in records]
    times = [record.first.latency_ms if alone else record.latency_ms for record in records]
    timed = [value for value in times if value is not None]
    latency = sum(timed) / len(timed) if timed else None
    seconds = wall_seconds if wall_seconds is not None else (None if latency is None else latency * n / 1000)
    accepted = [record.returned for record in records if record.accepted]
    wrong = [draft for draft in accepted if not draft.correct]
    found = Table(
        mode=mode,
        n=n,
        accuracy=_share(sum(draft.correct for draft in finals), n),
        hallucination_rate=_share(sum(draft.value is not None and not draft.correct for draft in finals), n),
        accept_rate=None if alone else wilson(len(accepted), n),
        accepted_and_correct=None if alone else wilson(len(accepted) - len(wrong), n),
        false_accept_rate=None if alone else wilson(len(wrong), len(accepted)),
        average_attempts=None if alone else sum(record.attempts for record in records) / n,
        average_latency_ms=latency,
        items_per_minute=60 * n / seconds if seconds else None,
        timed_items=len(timed),
        refusal_rate=_share(sum(draft.value is None for draft in finals), n),
        truncated_rate=_share(sum(not draft.finished for draft in finals), n),
        far_halluc=None if alone else wilson(sum(draft.value is not None for draft in wrong), len(accepted)),
    )
    check_identities(found, max_attempts)
    return found


def _share(successes: int, n: int) -> Rate:
    rate = wilson(successes, n)
    assert rate is not None
    return rate


def identity_problems(
    accuracy: float,
    hallucination: float,
    refusal: float,
    accept_rate: float | None = None,
    accepted_and_correct: float | None = None,
    false_accept_rate: float | None = None,
    average_attempts: float | None = None,
    max_attempts: int | None = None,
) -> list[str]:
    """Which identities of SPEC 6 the figures break, with their values; rounding errors below 1e-9 are ignored."""
    tiny, problems = 1e-9, []
    if abs(accuracy + hallucination + refusal - 1) > tiny:
        problems.append(f"accuracy {accuracy} + hallucination {hallucination} + refusal {refusal} is not 1")
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


def check_identities(found: Table, max_attempts: int | None = None) -> None:
    """Raise AssertionError with the values when the rows of a table contradict each other (SPEC 6, Asserts)."""
    problems = identity_problems(
        found.accuracy.value,
        found.hallucination_rate.value,
        found.refusal_rate.value,
        _value(found.accept_rate),
        _value(found.accepted_and_correct),
        _value(found.false_accept_rate),
        found.average_attempts,
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
        draft = record.first if mode == "drafter" else record.returned
        results.setdefault(record.task, []).append(draft.correct)
    return {task: _share(sum(correct), len(correct)) for task, correct in results.items()}


def any_of_k(records: Sequence[ItemRecord], k: int) -> Rate | None:
    """Share of items with a correct draft among the first ``k``: the ceiling for any verifier.

    None when some item has fewer than ``k`` drafts recorded: the drafts an accepting loop never made are unknown.
    """
    if not records or any(len(record.drafts) < k for record in records):
        return None
    return wilson(sum(any(draft.correct for draft in record.drafts[:k]) for record in records), len(records))


def majority_index(drafts: Sequence[Draft]) -> int:
    """Index of the first draft with the commonest answer; refusals do not vote, ties go to the earliest."""
    votes = Counter(canonical(draft.value) for draft in drafts if draft.value is not None)
    if not votes:
        return 0
    winner = max(votes, key=lambda value: votes[value])  # Counter keeps first-seen order, max the first of equals
    return next(i for i, draft in enumerate(drafts) if draft.value is not None and canonical(draft.value) == winner)


def majority_of_k(records: Sequence[ItemRecord], k: int) -> Rate | None:
    """Accuracy of the majority answer among the first ``k`` drafts; None when not all were recorded."""
    if not records or any(len(record.drafts) < k for record in records):
        return None
    return wilson(sum(r.drafts[majority_index(r.drafts[:k])].correct for r in records), len(records))


def gap_closed(accuracy: float, first: float, ceiling: float | None) -> float | None:
    """(accuracy − first draft) / (any-of-K − first draft); None without a ceiling or without a gap. May be negative."""
    return None if ceiling is None or ceiling <= first else (accuracy - first) / (ceiling - first)


def verifier_auroc(records: Sequence[ItemRecord], seed: int = 0) -> dict[str, dict[str, Rate | None]]:
    """For every score: how well it ranks right above wrong among ``all`` recorded drafts and among ``first`` ones.

    Drafts of one item are resampled together. Refusals count as wrong drafts.
    """
    names = list(dict.fromkeys(name for record in records for draft in record.drafts for name in draft.scores))
    found: dict[str, dict[str, Rate | None]] = {}
    for name in names:
        found[name] = {}
        for label, count in (("all", None), ("first", 1)):
            rows = [
                (draft.scores[name], draft.correct, record.id)
                for record in records
                for draft in record.drafts[:count]
                if name in draft.scores
            ]
            scores, correct, ids = zip(*rows, strict=True) if rows else ((), (), ())
            found[name][label] = auroc(scores, correct, groups=ids, seed=seed)
    return found


def compare(records: Sequence[ItemRecord]) -> PairedTest:
    """Exact McNemar test of draft–verify (second) against the drafter alone (first) on the same items."""
    return mcnemar([record.first.correct for record in records], [record.returned.correct for record in records])


def replay(record: ItemRecord, threshold: float, k: int, score_name: str | None = None) -> ItemRecord:
    """The record the loop would have left at another threshold or score, from its recorded drafts; not timed.

    Raises:
        RsgwmError: the loop would have needed a draft or score that was not recorded.
    """
    name = score_name or record.score_name
    scores: list[float] = []
    for draft in record.drafts[:k]:
        if name not in draft.scores:
            raise RsgwmError(f"item {record.id}: draft {len(scores) + 1} has no score {name!r}")
        scores.append(draft.scores[name])
        if scores[-1] >= threshold:
            break
    accepted = scores[-1] >= threshold
    if not accepted and len(scores) < k:
        raise RsgwmError(f"item {record.id}: needs {k} recorded drafts, found {len(record.drafts)}")
    chosen = len(scores) - 1 if accepted else max(range(len(scores)), key=scores.__getitem__)
    return replace(
        record,
        score_name=name,
        threshold=threshold,
        accepted=accepted,
        attempts=len(scores),
        chosen=chosen,
        latency_ms=None,
    )


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
