"""A recipe: its sections, where it comes from, and every check of its values that needs no run.

A wrong value is found here, before the first stage, and not after an hour of training.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import build, parse_yaml, read_yaml, written_texts
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.nearest import advice, nearest_path
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.public_sets import SOURCES
from mlx_rsgwm.data.question_files import is_question_file
from mlx_rsgwm.data.select import unknown_task
from mlx_rsgwm.data.synthetic import FAMILIES
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.pool import check_rule
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.scores import SCORES
from mlx_rsgwm.merging.methods import ROLE_TAU, find_method, needs_directions, resolved, weight_problems
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.merging.round_merge import check_rounds
from mlx_rsgwm.models.adapter import SIGNALS
from mlx_rsgwm.recipes.sections import AverageSection, EvaluateSection, ExportSection, OwnMistakesSection
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.rounds import FREEZE_A

FOLDER = Path(__file__).parent  # of the shipped recipes
LARGEST_SEED = 2**32 - 1
MERGED = "verifier"  # what the merge of a run makes to verify


@dataclass(frozen=True)
class DataSection:
    """``rows`` is the whole training budget, split evenly over ``tasks``; ``verify_share`` of it are verifier pairs.

    ``folder`` is laid out ``<folder>/<task>/<split>.jsonl``; without one, public data sets come from the Hub.
    ``calibration_items`` are questions per task for choosing score and threshold.
    """

    tasks: tuple[str, ...]
    rows: int = 810
    verify_share: float = 0.5
    folder: str | None = None
    calibration_items: int = 12

    def __post_init__(self) -> None:
        problems = []
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            problems.append(f"tasks must name at least one task, each once, found {', '.join(self.tasks) or 'none'}")
        # Names that differ in case or in how an accent is written are one folder on a Mac.
        elif len({normalize("NFC", folder_name(task)).casefold() for task in self.tasks}) != len(self.tasks):
            problems.append(f"tasks must differ in their file names, found {', '.join(self.tasks)}")
        if hidden := [task for task in self.tasks if folder_name(task).startswith(".")]:
            problems.append(f"file names of tasks must not begin with a dot, found {', '.join(hidden)}")
        if self.rows < 2 * len(self.tasks):
            problems.append(f"rows must be at least two per task, found {self.rows}")
        if not 0 <= self.verify_share < 1:
            problems.append(f"verify_share must be in [0, 1), found {self.verify_share}")
        if self.calibration_items < 0:
            problems.append(f"calibration_items must be 0 or more, found {self.calibration_items}")
        problems += [problem for task in self.tasks if (problem := self.problem_of(task))]
        if self.path is not None and not self.path.is_dir():
            problems.append(f"folder {self.path} {'is not a folder' if self.path.exists() else 'does not exist'}")
        raise_problems("recipe, data", problems)

    @property
    def path(self) -> Path | None:
        """``folder`` with a leading ``~`` written out."""
        return None if self.folder is None else files.expanded(self.folder)

    def problem_of(self, task: str) -> str | None:
        """Why there can be no questions of ``task``; None when there may be."""
        if is_question_file(task):
            return None if Path(task).is_file() else f"{task} does not exist"
        if task in FAMILIES:
            return None
        if task not in SOURCES:
            return unknown_task(task)
        if self.path is not None and self.path.is_dir() and not (self.path / task).is_dir():
            return f"folder {self.path} holds no folder {task}"
        return None

    def files_of(self, task: str) -> list[Path]:
        """The files that questions of ``task`` may come from; none for an embedded family and for the Hub."""
        if is_question_file(task):
            return [Path(task)]
        return sorted((self.path / task).glob("*.jsonl")) if self.path is not None else []

    def budget(self, task: str) -> tuple[int, int]:
        """(draft rows, verify rows) of one task; verify rows are even, for they come in pairs."""
        position = self.tasks.index(task)
        share = self.rows // len(self.tasks) + (position < self.rows % len(self.tasks))
        verify = 2 * round(share * self.verify_share / 2)
        return share - verify, verify


@dataclass(frozen=True)
class MergeSection:
    """How both roles are merged; ``parameters`` are the method's own (``rsgwm merge --list`` shows them)."""

    method: str = "regmean"
    tau_draft: float = ROLE_TAU["draft"]
    tau_verify: float = ROLE_TAU["verify"]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    rank: int | None = None

    def options(self, role: str) -> MergeOptions:
        """The merge for a role, ``draft`` or ``verify``; the role's tau where the method has one."""
        tau = self.tau_draft if role == "draft" else self.tau_verify
        return MergeOptions(
            method=self.method,
            role=role,
            parameters={"tau": tau, **self.parameters}
            if "tau" in find_method(self.method).parameters
            else self.parameters,
            weights=self.weights,
            rank=self.rank,
        )

    def __post_init__(self) -> None:
        for role in ("draft", "verify"):
            resolved(self.options(role))

    @property
    def needs_directions(self) -> bool:
        """Whether the merge reads the second moments of the layers' inputs."""
        return needs_directions(find_method(self.method), resolved(self.options("draft")))

    def problems_with(self, data: DataSection) -> list[str]:
        """What would stop the merge of a pool trained on ``data``; one task makes one adapter, which is not merged."""
        count, method = len(data.tasks), find_method(self.method)
        if count == 1:
            return []
        problems = [f"merge: {problem}" for problem in weight_problems(self.options("draft"), count)]
        if self.method == "slerp" and count != 2:
            problems.append(
                f"slerp merges exactly two adapters, and data.tasks names {count}; use multislerp or karcher"
            )
        signals = {resolved(self.options(role)).get("signal") for role in ("draft", "verify")}
        if unknown := sorted(str(signal) for signal in signals - {None, *SIGNALS}):
            problems.append(f"merge: no signal {', '.join(unknown)} is recorded; there are {', '.join(SIGNALS)}")
        if "importance" in method.needs:
            for signal, rows in (("draft", 0), ("verify", 1)):
                without = [task for task in data.tasks if not data.budget(task)[rows]]
                if signal in signals and without:
                    problems.append(
                        f"{self.method} needs importance for {signal!r}, and there are no rows that teach to {signal} "
                        f"for {', '.join(without)}; change data.rows or data.verify_share, or use signal shared"
                    )
        if self.needs_directions and (without := [task for task in data.tasks if 0 in data.budget(task)]):
            problems.append(
                f"{self.method} needs directions of both roles, and there are no rows of one for {', '.join(without)}; "
                "change data.rows or data.verify_share"
            )
        return problems


@dataclass(frozen=True)
class LoopSection:
    """The draft–verify loop. ``score`` and ``threshold`` may be ``auto``: decided on the calibration items.

    ``verifier``: folders of the run, ``verifier`` (the merged one), ``pool/change`` or patterns as ``pool/*``; several
    read each draft together, by the rule ``combine``. ``check``: as in
    :class:`~mlx_rsgwm.inference.policy.LoopConfig`; it adds rows to the report and changes none.
    ``drafts``, ``layer``: as there; what is calibrated and what is evaluated are drafts of that kind.
    """

    attempts: int = 3
    score: str = "auto"
    threshold: float | str = 0.7
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 256
    verifier: str | tuple[str, ...] = MERGED
    combine: str = "max"
    check: str = "auto"
    drafts: str = LoopConfig.drafts
    layer: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.score not in ("auto", *SCORES):
            problems.append(f"score must be auto or one of {', '.join(SCORES)}, found {self.score!r}")
        if isinstance(self.threshold, str) and self.threshold != "auto":
            problems.append(f"threshold must be auto or a number in [0, 1], found {self.threshold!r}")
        raise_problems("recipe, loop", problems)
        self.config(SCORES[0], 0.5 if isinstance(self.threshold, str) else self.threshold, 0)

    def describe(self) -> dict[str, Any]:
        """The settings as a stage's key has them: of what came later nothing where it is the default.

        Nor of the check, which only the report depends on.
        """
        settings = asdict(self)
        del settings["check"]
        for name in ("verifier", "combine", "drafts", "layer"):
            if settings[name] == LoopSection.__dataclass_fields__[name].default:
                del settings[name]
        return settings

    def verifiers_of(self, pool: Sequence[str]) -> tuple[str, ...]:
        """The folders of the run that verify, where its pool's are ``pool``.

        Raises:
            RsgwmError: a name or pattern that none of them has, a rule for several where there is one.
        """
        known = (MERGED, *pool)
        named: list[str] = []
        for pattern in [self.verifier] if isinstance(self.verifier, str) else self.verifier:
            matched = fnmatch.filter(known, "pool/*" if pattern.rstrip("/") == "pool" else pattern)
            if not matched:
                raise RsgwmError(f"loop.verifier: {pattern!r} matches none of {', '.join(known)}")
            named += matched
        if not named:
            raise RsgwmError("loop.verifier is a list without a name")
        check_rule(self.combine, len(set(named)))
        return tuple(dict.fromkeys(named))

    def config(self, score: str, threshold: float, seed: int) -> LoopConfig:
        """The loop with score and threshold settled."""
        return LoopConfig(
            self.attempts,
            threshold,
            score,
            self.sampling(seed),
            check=self.check,
            drafts=self.drafts,
            layer=self.layer,
        )

    def sampling(self, seed: int) -> Sampling:
        """How drafts are drawn."""
        return Sampling(self.temperature, self.top_p, self.max_tokens, seed)


@dataclass(frozen=True)
class Recipe:
    """A job. Every section but ``data`` has defaults; ``train`` is a :class:`TrainConfig`; ``name`` is the file's.

    With one task its adapter drafts and verifies, and nothing is merged. ``average`` puts an average of each run's
    checkpoints in the place of its last weights; ``train.rounds`` trains all tasks in rounds.

    ``paper``: another merge of the same pool, calibrated and evaluated beside ``merge`` on the same questions;
    ``own_mistakes``: so is the drafter with a verifier that was trained on its mistakes.
    """

    name: str
    data: DataSection
    base: str = "smollm2-135m"
    template: str = "plain"
    seed: int = DEFAULT_SEED
    train: TrainConfig = field(default_factory=TrainConfig)
    average: AverageSection | None = None
    merge: MergeSection = field(default_factory=MergeSection)
    paper: MergeSection | None = None
    own_mistakes: OwnMistakesSection | None = None
    loop: LoopSection = field(default_factory=LoopSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    export: ExportSection = field(default_factory=ExportSection)

    def __post_init__(self) -> None:
        find_template(self.template)
        problems = []
        if not 0 <= self.seed <= LARGEST_SEED:
            problems.append(f"seed must be in [0, {LARGEST_SEED}], found {self.seed}")
        if self.train.validate_every:
            problems.append("train.validate_every needs held-out rows, which a recipe does not set aside; leave it out")
        if self.train.fine_tune_type != "lora":
            problems.append(f"train.fine_tune_type is {self.train.fine_tune_type}; only lora adapters can be merged")
        problems += self._problems_of_rounds()
        for section in (self.merge, self.paper):
            problems += section.problems_with(self.data) if section else []
            if section and len(self.data.tasks) > 1 and section.needs_directions and not self.train.directions:
                problems.append(f"{section.method} needs directions, and train.directions is 0")
        if self.paper and len(self.data.tasks) == 1:
            problems.append("paper is another merge of a pool, and data.tasks names one task; leave it out")
        problems += [
            f"evaluate.tasks: {problem}" for task in self.evaluate.tasks if (problem := self.data.problem_of(task))
        ]
        for name, text in (("name", self.name), ("base", self.base)):
            if not text.strip() or not text.isprintable():
                problems.append(f"{name} must be a name, found {text!r}")
        if self.data.calibration_items == 0 and ({"auto", "combined"} & {self.loop.score, self.loop.threshold}):
            problems.append(
                "loop.score or loop.threshold is auto or combined, so data.calibration_items must be at least 1"
            )
        if self.loop.combine == "learned" and self.data.calibration_items == 0:
            problems.append("loop.combine is learned, so data.calibration_items must be at least 1")
        try:
            _ = self.verifiers
        except RsgwmError as error:
            problems.append(str(error))
        raise_problems("recipe", problems)

    def _problems_of_rounds(self) -> list[str]:
        """What would stop training in rounds, or the merges of what it leaves."""
        if self.train.rounds is None:
            return []
        problems = []
        if len(self.data.tasks) < 2:
            problems.append("train.rounds merges a pool, and data.tasks names one task; leave it out")
        if self.average:
            problems.append("train.rounds leaves no checkpoints to average; leave out average or train.rounds")
        if self.train.rounds.number:
            problems.append("train.rounds.number is which round a run is; a recipe trains all of them, so leave it out")
        for name in sorted({"rounds", "merged"} & set(map(folder_name, self.data.tasks))):
            problems.append(f"with train.rounds no task can be called {name}, which is a folder of the pool")
        for name, section in (("merge", self.merge), ("paper", self.paper)):
            factors = section is not None and resolved(section.options("draft")).get("space") == "factor"
            if factors and self.train.rounds.mode != FREEZE_A:
                problems.append(f"{name}: adapters of rounds share no initialisation; set parameters.space product")
        check_rounds(self.train, len(self.data.tasks))
        return problems

    @property
    def verifiers(self) -> tuple[str, ...]:
        """The folders of the run that verify."""
        return self.loop.verifiers_of([f"pool/{folder_name(task)}" for task in self.data.tasks])


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(source: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by shipped name or path, with ``key=value`` settings laid over it (``train.epochs=3``).

    Raises:
        RsgwmError: no such recipe, bad YAML, an unknown key (with the nearest known one), a value out of range.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not files.is_present(path):
            raise RsgwmError(f"{path} does not exist{nearest_path(path)}")
        text = files.read_text(path, files.LARGEST_YAML)
    elif source in shipped_recipes():
        text = files.read_text(FOLDER / f"{source}.yaml")
    else:
        written = f"rsgwm recipe init {source} writes one" if is_question_file(source) else ""
        raise RsgwmError(f"no recipe {source!r}; {written or advice(source, shipped_recipes())}")
    return parse_recipe(text, source, settings)


def parse_recipe(text: str, source: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe that a text holds which is, or will be, in the file ``source``; raises as :func:`load_recipe`."""
    values = read_yaml(text, f"recipe {source}")
    written = written_texts(text)
    texts: dict[str, Any] = {key: written[key] for key in ("name", "base", "template") if key in written}
    values = {"name": Path(source).stem, **values, **texts}
    for setting in settings:
        _apply_setting(values, setting)
    _write_out_tasks(values)
    return build(Recipe, values, f"recipe {source}")


def _apply_setting(values: dict[str, Any], setting: str) -> None:
    name, separator, text = setting.partition("=")
    if not separator:
        raise RsgwmError(f"--set {setting}: expected key=value, for example train.epochs=3")
    *parents, leaf = name.split(".")
    target = values
    for parent in parents:
        inner = target[parent] = {} if target.get(parent) is None else target[parent]
        if not isinstance(inner, dict):
            raise RsgwmError(f"--set {setting}: {parent} is not a section")
        target = inner
    target[leaf] = parse_yaml(text, f"--set {setting}")


def _write_out_tasks(values: Mapping[str, Any]) -> None:
    """Write out a leading ``~`` of files that are tasks, which no shell has seen."""
    for section in (values.get("data"), values.get("evaluate")):
        tasks = section.get("tasks") if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(tasks, list):
            section["tasks"] = [
                str(files.expanded(task)) if isinstance(task, str) and task.startswith("~") else task for task in tasks
            ]


def folder_name(task: str) -> str:
    """What a task's folders below the run's are called."""
    return Path(task).stem if is_question_file(task) else task
