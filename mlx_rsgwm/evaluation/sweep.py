"""One pool merged in many ways, every way measured on the same held-out items.

A candidate is a merge (two of them where a method knows roles: one to draft, one to verify), an adapter of the pool,
any other adapter, or the bare base. Each drafts every item greedily, is scored on the gold completions, and scores one
fixed set of labelled answers. What was measured is kept in one JSON file a candidate, under a hash of everything it
depends on, so that a sweep that was cut off goes on, and a longer one measures only what is new.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from mlx_rsgwm import files
from mlx_rsgwm.adapter import CONFIG_FILE, Adapter, versions
from mlx_rsgwm.base import Base
from mlx_rsgwm.data.negatives import perturb
from mlx_rsgwm.data.sources import Question
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.errors import RsgwmError, raise_problems
from mlx_rsgwm.evaluation.harness import judge
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.methods import METHODS, resolved
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.pipeline.loop import Drafted, DraftVerify, LoopConfig
from mlx_rsgwm.pipeline.sampling import Sampling
from mlx_rsgwm.progress import SILENT, Progress
from mlx_rsgwm.slots import AdapterSlots

FORMAT_VERSION = 1
ITEMS_FILE = "items.json"
FOLDER = "measured"
ROLES = ("draft", "verify")
JUDGED_BY = ("mean_logprob", "yesno")  # the scores that need no fitting
# Every method, and beside rsgwm's default its other readings.
DEFAULT_METHODS = (
    "all",
    "rsgwm:space=factor/product,signal=per_role/shared",
    "rsgwm:tau=0.3/0.5/0.8",
    "rsgwm:normalise=none/rank",
)


@dataclass(frozen=True)
class Variant:
    """A method with some of its parameters set, for both roles."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``rsgwm:space=product,tau=0.5``: what :func:`parse_variants` reads."""
        pairs = ",".join(f"{name}={_shown(value)}" for name, value in self.parameters.items())
        return f"{self.method}:{pairs}" if pairs else self.method


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """Variants as a user writes them: ``linear,ties:density=0.2/0.5,rsgwm:space=product,tau=0.3/0.5``.

    Values with / between them make one variant each, several such parameters every combination; ``all`` is every
    method but the imitations (``peft:…``), with its defaults. Variants that come to the same merge are kept once,
    under the first name.

    Raises:
        RsgwmError: unknown methods and parameters, values out of range; all in one error.
    """
    found: list[Variant] = []
    for piece in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        left, equals, value = piece.partition("=")
        # Names of methods may hold a colon themselves, names of parameters not.
        method, colon, name = left.rpartition(":") if equals else (left, ":", "")
        if method == "all" and not equals:
            found += [Variant(known) for known in METHODS if ":" not in known]
        elif colon:
            found.append(Variant(method))
        if equals:
            if not found or not name:
                raise RsgwmError(f"--methods: expected METHOD:NAME=VALUE, found {piece!r}")
            found[-1] = replace(found[-1], parameters={**found[-1].parameters, name: value})
    return _distinct([one for variant in found for one in _expanded(variant)])


def _expanded(variant: Variant) -> list[Variant]:
    choices = [[_value(value) for value in str(text).split("/")] for text in variant.parameters.values()]
    return [replace(variant, parameters=dict(zip(variant.parameters, row, strict=True))) for row in product(*choices)]


def _distinct(variants: Sequence[Variant]) -> list[Variant]:
    kept: dict[Any, Variant] = {}
    problems = []
    for variant in variants:
        try:
            merges = [resolved(MergeOptions(variant.method, role, variant.parameters)) for role in ROLES]
        except RsgwmError as error:
            problems.append(str(error).removeprefix("merge options: "))
        else:
            method = METHODS[variant.method]
            kept.setdefault((method.merge, method.rank, json.dumps(merges, default=str)), variant)
    raise_problems("--methods", problems)
    return list(kept.values())


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


@dataclass(frozen=True)
class Plan:
    """What is compared on what.

    ``pool``: folders of the adapters to merge. ``variants``: the merges. ``extras``: other adapters by name, measured
    beside them. ``questions``: held-out items of any tasks. ``judged``: how many of each task's questions get labelled
    answers. ``max_tokens``: of a draft; None for twice the longest gold completion. ``seed``: of random merges, of the
    perturbed answers and of the reference drafts. ``reference``: the merge whose drafts are among the labelled answers.
    """

    pool: tuple[Path, ...]
    variants: tuple[Variant, ...]
    questions: tuple[Question, ...]
    template: Template
    extras: Mapping[str, Path] = field(default_factory=dict)
    judged: int = 1_000_000
    max_tokens: int | None = None
    weights: tuple[float, ...] = ()
    rank: int | None = None
    seed: int = 42
    batch_rows: int = 32
    reference: Variant = Variant("linear")

    def __post_init__(self) -> None:
        problems = []
        names = [folder.name for folder in self.pool] + list(self.extras)
        if double := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"adapters need names of their own, several are called {', '.join(double)}")
        if not self.questions:
            problems.append("there are no questions to evaluate on")
        if self.judged < 1 or self.batch_rows < 1:
            problems.append(f"judged and batch_rows must be at least 1, found {self.judged} and {self.batch_rows}")
        raise_problems("merge sweep", problems)

    def options(self, variant: Variant, role: str) -> MergeOptions:
        """The merge of a variant for a role."""
        return MergeOptions(variant.method, role, variant.parameters, self.weights, self.rank, self.seed)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(dict.fromkeys(question.task for question in self.questions))


@dataclass(frozen=True)
class Candidate:
    """One row of the comparison: a merge by ``variant``, or the adapter in ``folder``, or neither for the base."""

    name: str
    kind: str
    variant: Variant | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Labelled:
    """An answer to judge: index of its question, where it comes from (gold, perturbed, draft), whether it is right."""

    question: int
    kind: str
    text: str
    tokens: tuple[int, ...]
    finished: bool
    correct: bool


@dataclass(frozen=True)
class Outcome:
    """What one candidate did.

    ``kind``: merge, adapter (of the pool), extra, base. ``task``: of an adapter of the pool, what it was trained on.
    ``refused``: why the merge was not made; the rest is empty then. ``drafts``: per question the text and whether it is
    right. ``gold``: per question nats and tokens of the gold completion by the drafter. ``scores``: per score one
    number for every labelled answer. ``diagnosis``: per role the merge's overall one.
    """

    name: str
    kind: str
    task: str = ""
    refused: str = ""
    drafts: tuple[tuple[str, bool], ...] = ()
    gold: tuple[tuple[float, int], ...] = ()
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    diagnosis: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Outcome:
        """Read what ``asdict`` wrote."""
        return cls(
            **{
                **value,
                "drafts": tuple((str(text), bool(correct)) for text, correct in value["drafts"]),
                "gold": tuple((float(nats), int(count)) for nats, count in value["gold"]),
                "scores": {name: tuple(found) for name, found in value["scores"].items()},
            }
        )


@dataclass(frozen=True)
class Measured:
    """A whole sweep: the questions, the labelled answers, and every candidate's outcome on them."""

    questions: tuple[Question, ...]
    answers: tuple[Labelled, ...]
    outcomes: tuple[Outcome, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


class Sweep:
    """One plan on one base in one folder."""

    def __init__(self, base: Base, plan: Plan, out: Path, progress: Progress = SILENT) -> None:
        self.base = base
        self.plan = plan
        self.out = out
        self.progress = progress
        self.slots = AdapterSlots(base)
        self.texts = [question.question for question in plan.questions]
        tokenizer = base.tokenizer
        self.completions = [plan.template.completion(tokenizer, question.answer) for question in plan.questions]
        self.max_tokens = plan.max_tokens or 2 * max(map(len, self.completions))
        self._identities = {folder: identity(folder) for folder in (*plan.pool, *plan.extras.values())}
        self._about = {
            "format_version": FORMAT_VERSION,
            "version": versions()["mlx-rsgwm"],
            "base": base.fingerprint,
            "template": plan.template.hash,
            "questions": files.sha256_json([asdict(question) for question in plan.questions]),
            "max_tokens": self.max_tokens,
            "seed": plan.seed,
        }

    def execute(self) -> Measured:
        """Measure every candidate that was not measured before.

        Raises:
            RsgwmError: adapters that cannot be loaded or were trained with another template or for another base. A
                merge that its own rules refuse is an outcome, not an error.
        """
        files.make_folder(self.out / FOLDER)
        answers = self.labelled_answers()
        digest = files.sha256_json([asdict(answer) for answer in answers])
        candidates = self._candidates()
        outcomes = []
        with self.progress.task("merge sweep", len(candidates)) as advance:
            for candidate in candidates:
                key = files.sha256_json([self._about, digest, self._depends_on(candidate)])
                slug = re.sub(r"[^a-z0-9.]+", "-", candidate.name.lower())
                path = self.out / FOLDER / f"{slug}-{key[:16]}.json"
                if not path.is_file():
                    files.write_json(path, asdict(self._outcome(candidate, answers)))
                outcomes.append(Outcome.from_dict(files.read_json_object(path)))
                advance(1, candidate.name)
        return Measured(self.plan.questions, answers, tuple(outcomes), self.describe())

    def describe(self) -> dict[str, Any]:
        """Where the numbers come from."""
        plan = self.plan
        return {
            "base": self.base.describe(),
            "template": plan.template.name,
            "pool": [folder.name for folder in plan.pool],
            "extras": list(plan.extras),
            "tasks": {task: sum(question.task == task for question in plan.questions) for task in plan.tasks},
            "max_tokens": self.max_tokens,
            "reference": plan.reference.label,
            "weights": list(plan.weights),
            "rank": plan.rank,
            "seed": plan.seed,
            "versions": versions(),
        }

    def labelled_answers(self) -> tuple[Labelled, ...]:
        """Gold, perturbed gold, and a draft of the reference merge, for the first questions of every task.

        Made once and kept, for every candidate must judge the same answers. Drafts are labelled by gold.
        """
        merges = [_plain(vars(self.plan.options(self.plan.reference, role))) for role in ROLES]
        pool = [self._identities[folder] for folder in self.plan.pool]
        key = files.sha256_json([self._about, pool, merges, self.plan.judged])
        path = self.out / ITEMS_FILE
        if path.is_file() and (found := files.read_json_object(path)).get("key") == key:
            return tuple(Labelled(**{**row, "tokens": tuple(row["tokens"])}) for row in found["answers"])
        self.slots.load(
            "drafter", merge(self.plan.pool, self.plan.options(self.plan.reference, "draft"), self.progress)
        )
        pipeline = self._pipeline("drafter", "drafter", Sampling(0.7, 0.9, self.max_tokens, self.plan.seed))
        chosen = self._judged()
        drafted = pipeline.draft_many([self.texts[index] for index in chosen], 1, self.plan.batch_rows, self.progress)
        rng = random.Random(f"sweep/{self.plan.seed}")
        answers = []
        for index, (draft,) in zip(chosen, drafted, strict=True):
            question = self.plan.questions[index]
            answers.append(_labelled(index, "gold", pipeline.as_draft(question.answer), True))
            if negative := perturb(question, rng):
                answers.append(_labelled(index, "perturbed", pipeline.as_draft(negative.answer), False))
            answers.append(_labelled(index, "draft", draft, judge(question, draft, {}).correct))
        questions = [asdict(question) for question in self.plan.questions]
        files.write_json(path, {"key": key, "questions": questions, "answers": [asdict(answer) for answer in answers]})
        return tuple(answers)

    def _judged(self) -> list[int]:
        chosen: dict[str, list[int]] = {}
        for index, question in enumerate(self.plan.questions):
            chosen.setdefault(question.task, []).append(index)
        return [index for indices in chosen.values() for index in indices[: self.plan.judged]]

    def _candidates(self) -> list[Candidate]:
        plan = self.plan
        adapters = [Candidate(folder.name, "adapter", folder=folder) for folder in plan.pool]
        extras = [Candidate(name, "extra", folder=folder) for name, folder in plan.extras.items()]
        merges = [Candidate(variant.label, "merge", variant) for variant in plan.variants]
        return [Candidate("base", "base"), *adapters, *extras, *merges]

    def _depends_on(self, candidate: Candidate) -> Any:
        """What a candidate's outcome depends on beyond the plan's items and the labelled answers."""
        if candidate.variant is not None:
            options = [_plain({**vars(one), "parameters": resolved(one)}) for one in self._both(candidate.variant)]
            return [[self._identities[folder] for folder in self.plan.pool], options]
        return [candidate.kind, self._identities.get(candidate.folder)]

    def _outcome(self, candidate: Candidate, answers: Sequence[Labelled]) -> Outcome:
        if candidate.variant is not None:
            return self._merge(candidate.variant, answers)
        if candidate.folder is None:
            return self._measure(Outcome(candidate.name, candidate.kind), None, None, answers)
        adapter = Adapter.load(candidate.folder)
        self.slots.load("drafter", adapter)
        task = task_of(candidate.folder, adapter.manifest) if candidate.kind == "adapter" else ""
        return self._measure(Outcome(candidate.name, candidate.kind, task), "drafter", "drafter", answers)

    def _both(self, variant: Variant) -> list[MergeOptions]:
        return [self.plan.options(variant, role) for role in ROLES]

    def _merge(self, variant: Variant, answers: Sequence[Labelled]) -> Outcome:
        draft, verify = self._both(variant)
        same = resolved(draft) == resolved(verify)
        diagnosis = {}
        try:
            for role, slot, options in (("draft", "drafter", draft), ("verify", "verifier", verify)):
                if role == "verify" and same:
                    continue
                merged = merge(self.plan.pool, options)
                self.slots.load(slot, merged)
                diagnosis[role] = merged.manifest["merge"]["diagnosis"]["overall"]
        except RsgwmError as error:
            return Outcome(variant.label, "merge", refused=str(error))
        outcome = Outcome(variant.label, "merge", diagnosis=diagnosis)
        return self._measure(outcome, "drafter", "drafter" if same else "verifier", answers)

    def _measure(
        self, outcome: Outcome, drafter: str | None, verifier: str | None, answers: Sequence[Labelled]
    ) -> Outcome:
        """``outcome`` filled in, for the slots that draft and verify."""
        plan, greedy = self.plan, Sampling(0.0, 1.0, self.max_tokens, self.plan.seed)
        alone = self._pipeline(drafter, drafter, greedy)
        drafted = alone.draft_many(self.texts, 1, plan.batch_rows)
        drafts = [judge(question, row[0], {}) for question, row in zip(plan.questions, drafted, strict=True)]
        gold = alone.score_many(
            self.texts,
            [alone.as_draft(question.answer) for question in plan.questions],
            "mean_logprob",
            plan.batch_rows,
        )
        checked = alone if drafter == verifier else self._pipeline(drafter, verifier, greedy)
        owners = [self.texts[answer.question] for answer in answers]
        shown = [Drafted(0, answer.text, answer.tokens, answer.finished) for answer in answers]
        scores = {score: tuple(checked.score_many(owners, shown, score, plan.batch_rows)) for score in JUDGED_BY}
        return replace(
            outcome,
            drafts=tuple((draft.text, draft.correct) for draft in drafts),
            gold=tuple(
                (-math.log(max(score, 1e-38)) * len(completion), len(completion))
                for score, completion in zip(gold, self.completions, strict=True)
            ),
            scores=scores,
        )

    def _pipeline(self, drafter: str | None, verifier: str | None, sampling: Sampling) -> DraftVerify:
        return DraftVerify(
            self.slots, self.plan.template, drafter, verifier, LoopConfig(1, 0.5, JUDGED_BY[0], sampling)
        )


def identity(folder: Path) -> dict[str, str]:
    """Hashes of the files of an adapter folder that a merge may read."""
    names = sorted(path.name for path in folder.glob("*.safetensors")) + [CONFIG_FILE]
    return {name: files.sha256_file(folder / name) for name in names if (folder / name).is_file()}


def task_of(folder: Path, manifest: Mapping[str, Any]) -> str:
    """What an adapter says it was trained on; its folder's name when it says nothing."""
    return Path(str(manifest.get("task") or folder.name)).stem


def _labelled(question: int, kind: str, draft: Drafted, correct: bool) -> Labelled:
    return Labelled(question, kind, draft.text, draft.tokens, draft.finished, correct)
