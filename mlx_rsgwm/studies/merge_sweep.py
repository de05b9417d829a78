"""One pool merged in many ways, every way measured on the same held-out items.

A candidate is a merge (two of them where a method knows roles: one to draft, one to verify), an adapter of the pool,
any other adapter, or the bare base. Each drafts every item greedily, is scored on the gold completions, and scores one
fixed set of labelled answers. What was measured is kept in one JSON file a candidate, under a hash of everything it
depends on, so that a sweep that was cut off goes on, and a longer one measures only what is new.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.folders import make_folder
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.core.resume import content_key, json_values, stamped
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.perturb import perturb
from mlx_rsgwm.data.public_sets import SOURCES
from mlx_rsgwm.data.question_files import is_question_file
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.synthetic import FAMILIES
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.evaluation.judging import judge
from mlx_rsgwm.inference.draft import Draft
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.methods import find_method, needs_directions, resolved, weight_problems
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import CONFIG_FILE, DIRECTIONS_FILE, PROMPT_STATES_FILE, Adapter
from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.studies.sweep_meter import LabelledAnswer, Meter
from mlx_rsgwm.studies.sweep_variants import ROLES, Variant

FORMAT_VERSION = 2
ITEMS_FILE = "items.json"
FOLDER = "measured"
REFERENCE = Variant("linear")

FolderOrAdapter = Path | Adapter


@dataclass(frozen=True)
class Plan:
    """What is compared on what.

    ``pool``: the adapters to merge, folders or, of other sources, loaded. ``variants``: the merges. ``extras``:
    other adapters by name, measured beside them. ``questions``: held-out items of any tasks. ``judged``: how many
    of each task's questions get labelled answers. ``max_tokens``: of a draft; None for twice the longest gold
    completion. ``seed``: of random merges, of the perturbed answers and of the reference drafts. ``reference``: the
    merge whose drafts are among the labelled answers. ``alone``: whether the base and every adapter of the pool are
    measured, too.
    """

    pool: tuple[FolderOrAdapter, ...]
    variants: tuple[Variant, ...]
    questions: tuple[Question, ...]
    template: Template
    extras: Mapping[str, FolderOrAdapter] = field(default_factory=dict)
    judged: int = 1_000_000
    max_tokens: int | None = None
    weights: tuple[float, ...] = ()
    rank: int | None = None
    seed: int = DEFAULT_SEED
    batch_rows: int = 32
    reference: Variant = REFERENCE
    alone: bool = True

    def __post_init__(self) -> None:
        problems = []
        names = [source.name for source in self.pool] + list(self.extras)
        if double := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"adapters need names of their own, several are called {', '.join(double)}")
        if not self.questions:
            problems.append("there are no questions to evaluate on")
        if self.judged < 1 or self.batch_rows < 1:
            problems.append(f"judged and batch_rows must be at least 1, found {self.judged} and {self.batch_rows}")
        problems += weight_problems(self.options(self.reference, "draft"), len(self.pool))
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
    """One row of the comparison: a merge by ``variant``, or the adapter ``source``, or neither for the base."""

    name: str
    kind: str
    variant: Variant | None = None
    source: FolderOrAdapter | None = None


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
        """Read what ``asdict`` wrote, under a key or not."""
        return cls(
            **{
                **{name: value[name] for name in value if name != "key"},
                "drafts": tuple((str(text), bool(correct)) for text, correct in value["drafts"]),
                "gold": tuple((float(nats), int(count)) for nats, count in value["gold"]),
                "scores": {name: tuple(values) for name, values in value["scores"].items()},
            }
        )


@dataclass(frozen=True)
class Measured:
    """A whole sweep: the questions, the labelled answers, and every candidate's outcome on them."""

    questions: tuple[Question, ...]
    answers: tuple[LabelledAnswer, ...]
    outcomes: tuple[Outcome, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


class Sweep:
    """One plan on one base in one folder."""

    def __init__(
        self, base: Base, plan: Plan, out: Path, progress: Progress = SILENT, processes: Processes = ALONE
    ) -> None:
        self.processes = processes
        self.base = base
        self.plan = plan
        self.out = out
        self.progress = progress
        self.meter = Meter(AdapterSlots(base), plan.questions, plan.template, plan.max_tokens or 0, plan.batch_rows)
        self._identities = {source.name: adapter_hashes(source) for source in plan.pool}
        self._identities |= {name: adapter_hashes(source) for name, source in plan.extras.items()}
        self._about = {
            "format_version": FORMAT_VERSION,
            "version": versions()["mlx-rsgwm"],
            "base": base.fingerprint,
            "template": plan.template.hash,
            "questions": files.sha256_json([asdict(question) for question in plan.questions]),
            "max_tokens": self.meter.max_tokens,
            "seed": plan.seed,
        }

    def execute(self) -> Measured:
        """Measure every candidate that was not measured before; of several processes each takes every size-th one.

        Raises:
            RsgwmError: adapters that cannot be loaded or were trained with another template or for another base. A
                merge that its own rules refuse is an outcome, not an error.
        """
        make_folder(self.out / FOLDER)
        if not self.processes.writes:
            self.processes.wait()
        answers = self.labelled_answers()
        if self.processes.writes:
            self.processes.wait()
        digest = files.sha256_json([asdict(answer) for answer in answers])
        candidates = self._candidates()
        paths = []
        with self.progress.task("merge sweep", len(candidates)) as advance:
            for number, candidate in enumerate(candidates):
                key = content_key([self._about, digest, self._depends_on(candidate)], version=FORMAT_VERSION)
                slug = re.sub(r"[^a-z0-9.]+", "-", candidate.name.lower())
                paths.append(self.out / FOLDER / f"{slug}-{key[:16]}.json")
                mine = number % self.processes.size == self.processes.rank
                if mine:
                    stamped(paths[-1], key, lambda: asdict(self._outcome(candidate, answers)))  # noqa: B023
                advance(1, candidate.name if mine else "")
        self.processes.wait()
        outcomes = tuple(Outcome.from_dict(files.read_json_object(path)) for path in paths)
        return Measured(self.plan.questions, answers, outcomes, self.describe())

    def describe(self) -> dict[str, Any]:
        """Where the numbers come from."""
        plan = self.plan
        return {
            "base": self.base.describe(),
            "template": plan.template.name,
            "pool": [source.name for source in plan.pool],
            "extras": list(plan.extras),
            "tasks": {task: sum(question.task == task for question in plan.questions) for task in plan.tasks},
            "max_tokens": self.meter.max_tokens,
            "reference": plan.reference.label,
            "weights": list(plan.weights),
            "rank": plan.rank,
            "seed": plan.seed,
            "versions": versions(),
        }

    def labelled_answers(self) -> tuple[LabelledAnswer, ...]:
        """Gold, perturbed gold, and a draft of the reference merge, for the first questions of every task.

        Made once and kept, for every candidate must judge the same answers. Drafts are labelled by gold.
        """
        merges = [json_values(vars(self.plan.options(self.plan.reference, role))) for role in ROLES]
        pool = [self._identities[source.name] for source in self.plan.pool]
        key = content_key([self._about, pool, merges, self.plan.judged], version=FORMAT_VERSION)
        questions = [asdict(question) for question in self.plan.questions]
        stamp = stamped(
            self.out / ITEMS_FILE,
            key,
            lambda: {"questions": questions, "answers": [asdict(answer) for answer in self._label_answers()]},
        )
        return tuple(LabelledAnswer(**{**row, "tokens": tuple(row["tokens"])}) for row in stamp["answers"])

    def _label_answers(self) -> list[LabelledAnswer]:
        reference = self.plan.options(self.plan.reference, "draft")
        self.meter.load("drafter", merge(self.plan.pool, reference, self.progress))
        chosen = self._first_of_each_task()
        sampling = Sampling(0.7, 0.9, self.meter.max_tokens, self.plan.seed)
        drafted = self.meter.written("drafter", {index: self.meter.prompts[index] for index in chosen}, sampling)
        end = (self.meter.tokenizer.eos_token_id,)
        rng = random.Random(f"sweep/{self.plan.seed}")
        answers = []
        for index in chosen:
            question = self.plan.questions[index]
            answers.append(LabelledAnswer(index, "gold", question.answer, self.meter.completions[index], True))
            if negative := perturb(question, rng):
                completion = tuple(self.plan.template.completion(self.meter.tokenizer, negative.answer))
                answers.append(LabelledAnswer(index, "perturbed", negative.answer, completion, False))
            draft = drafted[index]
            text, correct = self._judged(index, draft)
            answers.append(
                LabelledAnswer(index, "draft", text, draft.tokens + (end if draft.finished else ()), correct)
            )
        return answers

    def _first_of_each_task(self) -> list[int]:
        chosen: dict[str, list[int]] = {}
        for index, question in enumerate(self.plan.questions):
            chosen.setdefault(question.task, []).append(index)
        return [index for indices in chosen.values() for index in indices[: self.plan.judged]]

    def _candidates(self) -> list[Candidate]:
        plan = self.plan
        adapters = [Candidate("base", "base")]
        adapters += [Candidate(source.name, "adapter", source=source) for source in plan.pool]
        extras = [Candidate(name, "extra", source=source) for name, source in plan.extras.items()]
        merges = [Candidate(variant.label, "merge", variant) for variant in plan.variants]
        return [*(adapters if plan.alone else []), *extras, *merges]

    def _depends_on(self, candidate: Candidate) -> Any:
        """What a candidate's outcome depends on beyond the plan's items and the labelled answers."""
        if candidate.variant is not None:
            options = [
                json_values({**vars(merge_options), "parameters": resolved(merge_options)})
                for merge_options in self._both(candidate.variant)
            ]
            sources = [self._identities[source.name] for source in self.plan.pool]
            if self._reads_directions(candidate.variant):
                grams = [source / DIRECTIONS_FILE for source in self.plan.pool if isinstance(source, Path)]
                return [sources, options, [files.sha256_file(path) if path.is_file() else "" for path in grams]]
            return [sources, options]
        return [candidate.kind, self._identities[candidate.name] if candidate.source else None]

    def _outcome(self, candidate: Candidate, answers: Sequence[LabelledAnswer]) -> Outcome:
        if candidate.variant is not None:
            return self._merge(candidate.variant, answers)
        if candidate.source is None:
            return self._measure(Outcome(candidate.name, candidate.kind), None, None, answers)
        adapter = load_adapter(candidate.source)
        self.meter.load("drafter", adapter)
        task = task_of(candidate.name, adapter.manifest) if candidate.kind == "adapter" else ""
        return self._measure(Outcome(candidate.name, candidate.kind, task), "drafter", "drafter", answers)

    def _reads_directions(self, variant: Variant) -> bool:
        return any(needs_directions(find_method(variant.method), resolved(options)) for options in self._both(variant))

    def _both(self, variant: Variant) -> list[MergeOptions]:
        return [self.plan.options(variant, role) for role in ROLES]

    def _merge(self, variant: Variant, answers: Sequence[LabelledAnswer]) -> Outcome:
        draft, verify = self._both(variant)
        # Of the same settings each role's directions make another merge.
        same = resolved(draft) == resolved(verify) and not self._reads_directions(variant)
        diagnosis = {}
        try:
            for role, slot, options in (("draft", "drafter", draft), ("verify", "verifier", verify)):
                if role == "verify" and same:
                    continue
                merged = merge(self.plan.pool, options)
                self.meter.load(slot, merged)
                diagnosis[role] = merged.manifest["merge"]["diagnosis"]["overall"]
        except RsgwmError as error:
            return Outcome(variant.label, "merge", refused=str(error))
        outcome = Outcome(variant.label, "merge", diagnosis=diagnosis)
        return self._measure(outcome, "drafter", "drafter" if same else "verifier", answers)

    def _measure(
        self, outcome: Outcome, drafter: str | None, verifier: str | None, answers: Sequence[LabelledAnswer]
    ) -> Outcome:
        """``outcome`` filled in, for the slots that draft and verify."""
        drafts, nats = self.meter.drafts(drafter)
        return replace(
            outcome,
            drafts=tuple(self._judged(index, draft) for index, draft in enumerate(drafts)),
            gold=tuple((loss, len(tokens)) for loss, tokens in zip(nats, self.meter.completions, strict=True)),
            scores=self.meter.scores(verifier, answers),
        )

    def _judged(self, index: int, draft: Draft) -> tuple[str, bool]:
        """The text of a draft, and whether its answer is right."""
        text = self.meter.tokenizer.decode(list(draft.tokens))
        return text, judge(self.plan.questions[index], replace(draft, text=text), {}).correct


def adapter_hashes(source: FolderOrAdapter) -> dict[str, str]:
    """Hashes of the files of an adapter folder that merges read, but for the directions, which few need.

    Of an adapter of another source, that of its content.
    """
    if isinstance(source, Adapter):
        return {"content": source.content_hash()}
    unread = (DIRECTIONS_FILE, PROMPT_STATES_FILE)
    names = [CONFIG_FILE, *sorted(path.name for path in source.glob("*.safetensors") if path.name not in unread)]
    return {name: files.sha256_file(source / name) for name in names if (source / name).is_file()}


def task_of(name: str, manifest: Mapping[str, Any]) -> str:
    """What an adapter says it was trained on; its own ``name`` when it says nothing."""
    return Path(str(manifest.get("task") or name)).stem


def tasks_of_pool(adapters: Sequence[Adapter]) -> list[str]:
    """The tasks that a pool's adapters say they were trained on, each once.

    Raises:
        RsgwmError: one of which no held-out questions are known here.
    """
    tasks = [str(adapter.manifest.get("task") or adapter.name) for adapter in adapters]
    unknown = [task for task in tasks if not is_question_file(task) and task not in FAMILIES and task not in SOURCES]
    if unknown:
        raise RsgwmError(f"there are no held-out items for {', '.join(unknown)}; say what to evaluate on with --task")
    return list(dict.fromkeys(tasks))
