"""What happened on one item, draft by draft: the lines of ``items.jsonl``, the source of every figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import build
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.json_lines import read_json_lines
from mlx_rsgwm.evaluation.answers import STATUSES
from mlx_rsgwm.inference.draft import SAMPLED
from mlx_rsgwm.inference.policy import accepts, decide

FORMER_STATUSES = {"refusal": "no_answer", "truncated": "cut_off"}  # in files written before they were renamed


@dataclass(frozen=True)
class ExtractedAnswer:
    """What one extractor made of a draft: the answer (None without one), its class, and whether it equals gold."""

    value: str | None
    status: str
    correct: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", FORMER_STATUSES.get(self.status, self.status))


@dataclass(frozen=True)
class DraftRecord:
    """One generated answer as it is written down: a :class:`~mlx_rsgwm.inference.draft.Draft` compared with gold.

    ``value`` is None without an answer, ``status`` then says why (``no_answer``, ``cut_off``); ``finished`` is False
    when the token limit cut the text. ``scores`` holds every verifier score that was computed, in [0, 1], ``verified``
    how many tokens the verifier read for each; ``readings`` what other extractors found. ``tokens`` counts the draft's
    own tokens, ``latency_ms`` is the time to draft it. Where a pool verifies, ``adapters`` holds for every score what
    each adapter gave, ``won`` which gave most. ``false_equation``: the first that it states, where that was looked for.
    ``kind``: ``sampled``, or of which graft.
    """

    text: str
    value: str | None
    correct: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    finished: bool = True
    latency_ms: float | None = None
    status: str = ""
    readings: Mapping[str, ExtractedAnswer] = field(default_factory=dict)
    verified: Mapping[str, int] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    won: Mapping[str, str] = field(default_factory=dict)
    false_equation: str | None = None
    kind: str = SAMPLED

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", FORMER_STATUSES.get(self.status, self.status))
        if not self.status:
            missing = "no_answer" if self.finished else "cut_off"
            object.__setattr__(self, "status", "answer" if self.value is not None else missing)
        if self.correct and self.value is None:
            raise RsgwmError("draft: one without an answer (value None) cannot be correct")
        if self.status not in STATUSES or (self.status == "answer") != (self.value is not None):
            raise RsgwmError(f"draft: status {self.status!r} does not fit the value {self.value!r}")
        if not all(0 <= score <= 1 for score in self.scores.values()):
            raise RsgwmError(f"draft: scores must be in [0, 1], found {dict(self.scores)}")


@dataclass(frozen=True)
class ItemRecord:
    """What happened on one item with one sampling seed.

    ``drafts`` may hold more drafts than the loop used: the oracle needs all K of them, the loop the first
    ``attempts``. ``chosen`` is the index of the returned draft; ``latency_ms`` and ``energy_j`` are end to end,
    verification and retries included, or None when not measured. With ``abstain`` a draft that was not accepted is not
    given as an answer: then there is none. ``check``: with ``arithmetic`` no draft that states a false equation was
    shown to the verifier or accepted.
    """

    id: str
    task: str
    question: str
    gold: str
    drafts: tuple[DraftRecord, ...]
    score_name: str
    threshold: float
    accepted: bool
    attempts: int
    chosen: int
    latency_ms: float | None = None
    seed: int = 0
    energy_j: float | None = None
    abstain: bool = False
    check: str = "none"

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.attempts <= len(self.drafts):
            problems.append(f"attempts is {self.attempts} with {len(self.drafts)} drafts recorded")
        elif not 0 <= self.chosen < self.attempts:
            problems.append(f"chosen is {self.chosen}, outside the {self.attempts} attempts")
        elif (score := self.drafts[self.chosen].scores.get(self.score_name)) is not None:
            if self.accepted != (accepts(score, self.threshold) and not self.refuses(self.drafts[self.chosen])):
                verb = "accepted" if self.accepted else "not accepted"
                problems.append(f"{verb} with {self.score_name} {score} at threshold {self.threshold}")
        elif self.accepted:
            problems.append(f"accepted without a score {self.score_name!r}")
        raise_problems(f"item {self.id}", problems)

    def refuses(self, draft: DraftRecord) -> bool:
        """Whether a draft is not accepted whatever its score."""
        return self.check != "none" and draft.false_equation is not None

    @property
    def sampled(self) -> bool:
        """Whether all drafts are samples, of one distribution."""
        return all(draft.kind == SAMPLED for draft in self.drafts)

    @property
    def first(self) -> DraftRecord:
        """The drafter alone: its first draft."""
        return self.drafts[0]

    @property
    def returned(self) -> DraftRecord:
        """What draft–verify returned; an empty draft without an answer where it abstained."""
        draft = self.drafts[self.chosen]
        if not self.abstain or self.accepted:
            return draft
        return replace(draft, text="", value=None, correct=False, status="no_answer", readings={})

    @property
    def drafted_tokens(self) -> int:
        """Tokens the drafter wrote in the attempts that the loop made."""
        return sum(draft.tokens for draft in self.drafts[: self.attempts])

    @property
    def verified_tokens(self) -> int:
        """Tokens the verifier read in the attempts that the loop made, prompts included."""
        read = (draft for draft in self.drafts[: self.attempts] if not self.refuses(draft))
        return sum(draft.verified.get(self.score_name, 0) for draft in read)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; :meth:`from_dict` reads it back equal. Drafts say their kind where not all are sampled."""
        drafts = []
        for draft in self.drafts:
            plain = asdict(replace(draft, scores={}, readings={}, verified={}, adapters={}, won={}))
            for name in ("adapters", "won"):  # of a pool alone
                if not getattr(draft, name):
                    del plain[name]
                else:
                    plain[name] = dict(getattr(draft, name))
            if draft.false_equation is None:
                del plain["false_equation"]
            if self.sampled:
                del plain["kind"]
            drafts.append(
                {
                    **plain,
                    "scores": dict(draft.scores),
                    "readings": {name: asdict(reading) for name, reading in draft.readings.items()},
                    "verified": dict(draft.verified),
                }
            )
        values = {item.name: getattr(self, item.name) for item in fields(self)} | {"drafts": drafts}
        if self.check == "none":
            del values["check"]
        return values

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "item record") -> ItemRecord:
        """Read one line of ``items.jsonl``; missing or unknown fields are a :class:`RsgwmError`."""
        return build(cls, value, f"{where}: not an item record")


def replay(
    record: ItemRecord, threshold: float, k: int, score_name: str | None = None, check: str = "none"
) -> ItemRecord:
    """The record the loop would have left at another threshold, score or check, from its recorded drafts; not timed.

    Raises:
        RsgwmError: the loop would have needed a draft or score that was not recorded.
    """
    name = score_name or record.score_name
    scores: list[float | None] = []
    for draft in record.drafts[:k]:
        if check != "none" and draft.false_equation is not None:
            scores.append(None)
            continue
        if name not in draft.scores:
            raise RsgwmError(f"item {record.id}: draft {len(scores) + 1} has no score {name!r}")
        scores.append(draft.scores[name])
        if accepts(draft.scores[name], threshold):
            break
    decision = decide(scores, threshold)
    if not decision.accepted and len(scores) < k:
        raise RsgwmError(f"item {record.id}: needs {k} recorded drafts, found {len(record.drafts)}")
    return replace(
        record,
        score_name=name,
        threshold=threshold,
        accepted=decision.accepted,
        attempts=decision.attempts,
        chosen=decision.chosen,
        latency_ms=None,
        energy_j=None,
        check=check,
    )


def read_with(record: ItemRecord, extractor: str) -> ItemRecord:
    """The record with every draft's answer as another extractor read it.

    Raises:
        RsgwmError: the extractor was not run on these drafts.
    """
    if any(extractor not in draft.readings for draft in record.drafts):
        raise RsgwmError(f"item {record.id}: its drafts were not read with {extractor!r}")
    drafts = tuple(replace(draft, **asdict(draft.readings[extractor])) for draft in record.drafts)
    return replace(record, drafts=drafts)


def write_items(path: Path, records: Sequence[ItemRecord]) -> None:
    """One record a line."""
    files.write_text(path, items_text(records))


def items_text(records: Sequence[ItemRecord]) -> str:
    """The file that :func:`write_items` writes."""
    lines = [json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False) for record in records]
    return "\n".join(lines) + "\n"


def read_items(path: Path) -> list[ItemRecord]:
    """Read ``items.jsonl`` back.

    Raises:
        RsgwmError: a file or line that cannot be read (with its number), an item twice with one seed.
    """
    records: list[ItemRecord] = []
    seen: dict[tuple[str, int], int] = {}
    for number, value in read_json_lines(path):
        if isinstance(value, ValueError):
            raise RsgwmError(f"{path} line {number}: {value}")
        if not isinstance(value, dict):
            raise RsgwmError(f"{path} line {number}: expected a JSON object, found {type(value).__name__}")
        record = ItemRecord.from_dict(value, f"{path} line {number}")
        key = (record.id, record.seed)
        if key in seen:
            raise RsgwmError(f"{path} line {number}: item {record.id!r} is already in line {seen[key]}")
        seen[key] = number
        records.append(record)
    if not records:
        raise RsgwmError(f"{path} holds no items")
    return records


def by_seed(records: Sequence[ItemRecord]) -> dict[int, list[ItemRecord]]:
    """Records of each sampling seed, in order of first appearance.

    Raises:
        RsgwmError: the seeds were not run on the same items.
    """
    seeds: dict[int, list[ItemRecord]] = {}
    for record in records:
        seeds.setdefault(record.seed, []).append(record)
    names = {seed: [record.id for record in rows] for seed, rows in seeds.items()}
    first = next(iter(names.values()), [])
    if any(sorted(rows) != sorted(first) for rows in names.values()):
        raise RsgwmError(f"the sampling seeds {', '.join(map(str, names))} were not run on the same items")
    return seeds


def by_item(records: Sequence[ItemRecord]) -> dict[str, list[ItemRecord]]:
    """Records of each item, one for each sampling seed, in order of first appearance."""
    items: dict[str, list[ItemRecord]] = {}
    for record in records:
        items.setdefault(record.id, []).append(record)
    return items
