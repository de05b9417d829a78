"""A whole job as one YAML: data → pool → merge → calibrate → evaluate → export, in stages that resume.

A stage leaves a stamp with the hash of everything it depended on. Run again, a stage whose stamp still matches is
skipped; a changed setting, base or earlier stage runs it and what follows it anew.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_rsgwm import files
from mlx_rsgwm.adapter import Adapter, is_complete
from mlx_rsgwm.base import Base, load_base, resolve_base
from mlx_rsgwm.converters.peft import to_peft
from mlx_rsgwm.data.corpus import load_corpus, make_rows, save_corpus
from mlx_rsgwm.data.sources import Question
from mlx_rsgwm.data.tasks import questions_for
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.errors import CheckFailed, RsgwmError, raise_problems
from mlx_rsgwm.evaluation.contamination import contamination, training_questions
from mlx_rsgwm.evaluation.harness import calibrate, describe_run, evaluate
from mlx_rsgwm.evaluation.journal import FILE as JOURNAL_FILE
from mlx_rsgwm.evaluation.journal import Journal
from mlx_rsgwm.evaluation.report import write_report
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.methods import find_method, resolved
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.model_folder import fingerprint_of
from mlx_rsgwm.pipeline.calibration import FILE as CALIBRATION_FILE
from mlx_rsgwm.pipeline.calibration import load_calibration, save_calibration
from mlx_rsgwm.pipeline.decisions import LoopConfig
from mlx_rsgwm.pipeline.loop import DraftVerify
from mlx_rsgwm.pipeline.sampling import Sampling
from mlx_rsgwm.pipeline.verifying import SCORES
from mlx_rsgwm.progress import SILENT, Progress
from mlx_rsgwm.settings import build, parse_yaml, read_yaml
from mlx_rsgwm.slots import AdapterSlots
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train


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
        elif len({_folder_name(task) for task in self.tasks}) != len(self.tasks):
            problems.append(f"tasks must differ in their file names, found {', '.join(self.tasks)}")
        if self.rows < 2 * len(self.tasks):
            problems.append(f"rows must be at least two per task, found {self.rows}")
        if not 0 <= self.verify_share < 1:
            problems.append(f"verify_share must be in [0, 1), found {self.verify_share}")
        if self.calibration_items < 0:
            problems.append(f"calibration_items must be 0 or more, found {self.calibration_items}")
        raise_problems("recipe, data", problems)

    def budget(self, task: str) -> tuple[int, int]:
        """(draft rows, verify rows) of one task; verify rows are even, for they come in pairs."""
        position = self.tasks.index(task)
        share = self.rows // len(self.tasks) + (position < self.rows % len(self.tasks))
        verify = 2 * round(share * self.verify_share / 2)
        return share - verify, verify


@dataclass(frozen=True)
class MergeSection:
    """How both roles are merged; ``parameters`` are the method's own (``rsgwm merge --list`` shows them)."""

    method: str = "rsgwm"
    tau_draft: float = 0.30
    tau_verify: float = 0.50
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    rank: int | None = None

    def options(self, role: str) -> MergeOptions:
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


@dataclass(frozen=True)
class LoopSection:
    """The draft–verify loop. ``score`` and ``threshold`` may be ``auto``: decided on the calibration items."""

    attempts: int = 3
    score: str = "auto"
    threshold: float | str = 0.7
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 256

    def __post_init__(self) -> None:
        problems = []
        if self.score not in ("auto", *SCORES):
            problems.append(f"score must be auto or one of {', '.join(SCORES)}, found {self.score!r}")
        if isinstance(self.threshold, str) and self.threshold != "auto":
            problems.append(f"threshold must be auto or a number in [0, 1], found {self.threshold!r}")
        raise_problems("recipe, loop", problems)

    def config(self, score: str, threshold: float, seed: int) -> LoopConfig:
        return LoopConfig(
            self.attempts, threshold, score, Sampling(self.temperature, self.top_p, self.max_tokens, seed)
        )


@dataclass(frozen=True)
class EvaluateSection:
    """What to evaluate on: ``items`` test questions of each task (default: the trained ones), ``timed`` one by one."""

    tasks: tuple[str, ...] = ()
    items: int = 25
    timed: int = 12
    batch_rows: int = 32


@dataclass(frozen=True)
class ExportSection:
    """``peft``: write both adapters in PEFT's format. ``parity``: compare the drafter with torch + PEFT."""

    peft: bool = True
    parity: bool = True
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Recipe:
    """A job. Every section but ``data`` has defaults; ``train`` is a :class:`TrainConfig`."""

    name: str
    data: DataSection
    base: str = "smollm2-135m"
    template: str = "plain"
    seed: int = 42
    train: TrainConfig = field(default_factory=TrainConfig)
    merge: MergeSection = field(default_factory=MergeSection)
    loop: LoopSection = field(default_factory=LoopSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    export: ExportSection = field(default_factory=ExportSection)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        Path(entry.name).stem
        for entry in resources.files("mlx_rsgwm.recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(source: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by shipped name or path, with ``key=value`` settings laid over it (``train.epochs=3``).

    Raises:
        RsgwmError: no such recipe, bad YAML, an unknown key (with the nearest known one), a value out of range.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RsgwmError(f"recipe {path} does not exist")
        text = files.read_text(path)
    elif source in shipped_recipes():
        text = (resources.files("mlx_rsgwm.recipes") / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise RsgwmError(f"no recipe {source!r}; shipped are {', '.join(shipped_recipes())}, or give a .yaml file")
    values = read_yaml(text, f"recipe {source}")
    for setting in settings:
        _apply_setting(values, setting)
    return build(Recipe, values, f"recipe {source}")


def _apply_setting(values: dict[str, Any], setting: str) -> None:
    name, separator, text = setting.partition("=")
    if not separator:
        raise RsgwmError(f"--set {setting}: expected key=value, for example train.epochs=3")
    *parents, leaf = name.split(".")
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RsgwmError(f"--set {setting}: {parent} is not a section")
        target = inner
    target[leaf] = parse_yaml(text, f"--set {setting}")


class Run:
    """One recipe in one folder. The base is loaded only when a stage that needs it runs."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress = SILENT) -> None:
        self.recipe = recipe
        self.out = out
        self.progress = progress
        self.template = find_template(recipe.template)
        self.executed: list[str] = []
        self._base: Base | None = None
        self._keys: dict[str, str] = {}
        self._fingerprint = ""

    @property
    def base(self) -> Base:
        if self._base is None:
            self._base = load_base(self.recipe.base, progress=self.progress)
        return self._base

    @property
    def peft_folders(self) -> dict[str, Path]:
        return {role: self.out / "export" / f"{role}-peft" for role in ("drafter", "verifier")}

    def execute(self) -> dict[str, Any]:
        """Run every stage that is not up to date and return the summary that ``summary.json`` holds.

        Raises:
            CheckFailed: parity with torch was asked for and does not hold; everything is kept.
        """
        started = time.monotonic()
        files.make_folder(self.out)
        self._fingerprint = fingerprint_of(resolve_base(self.recipe.base, self.progress))
        recipe = self.recipe
        shared = {"base": self._fingerprint, "template": self.template.hash, "seed": recipe.seed}
        for task in recipe.data.tasks:
            self._stage(
                f"data-{_folder_name(task)}",
                {**shared, **_data_inputs(recipe.data, task)},
                (),
                partial(self._data, task),
            )
            train = {**shared, "config": recipe.train.describe()}
            self._stage(
                f"train-{_folder_name(task)}", train, (f"data-{_folder_name(task)}",), partial(self._train, task)
            )
        self._stage(
            "merge", asdict(recipe.merge), [f"train-{_folder_name(task)}" for task in recipe.data.tasks], self._merge
        )
        loop = {**shared, **asdict(recipe.loop), "items": recipe.data.calibration_items}
        self._stage("calibrate", loop, ("merge",), self._calibrate)
        self._stage("evaluate", asdict(recipe.evaluate), ("calibrate",), self._evaluate)
        self._stage("export", asdict(recipe.export), ("merge",), self._export)
        return self._summary(time.monotonic() - started)

    def _stage(self, name: str, inputs: Mapping[str, Any], after: Sequence[str], work: Callable[[], None]) -> None:
        key = files.sha256_json([inputs, [self._keys[stage] for stage in after]])
        self._keys[name] = key
        stamp = self.out / "stages" / f"{name}.json"
        if stamp.is_file() and files.read_json_object(stamp).get("key") == key:
            return
        started = time.monotonic()
        work()
        files.make_folder(stamp.parent)
        files.write_json(stamp, {"key": key, "seconds": round(time.monotonic() - started, 3)})
        self.executed.append(name)

    def _data(self, task: str) -> None:
        data, seed = self.recipe.data, self.recipe.seed
        draft_rows, verify_rows = data.budget(task)
        folder = Path(data.folder) if data.folder else None
        # Not every solution can be perturbed, so verify rows may need more questions than there are rows.
        wanted = max(draft_rows, 2 * verify_rows)
        questions = questions_for(task, "train", wanted, seed, folder)
        rows = make_rows(questions, draft_rows, verify_rows, seed)
        save_corpus(self._corpus(task), rows, self.template, {"seed": seed, "task": task, "split": "train"})

    def _train(self, task: str) -> None:
        corpus = load_corpus(self._corpus(task))
        # An adapter that is whole here belongs to other settings, or this stage would have been skipped.
        saving = Saving(self._adapter(task), resume="replace")
        adapter = train(
            self.base, corpus, self.recipe.train, label=f"train {task}", progress=self.progress, saving=saving
        )
        adapter.manifest["task"] = task
        finish(adapter, saving)

    def _merge(self) -> None:
        pool = [self._adapter(task) for task in self.recipe.data.tasks]
        for role, folder in (("draft", "drafter"), ("verify", "verifier")):
            merge(pool, self.recipe.merge.options(role), self.progress).save(self.out / folder)
        self.progress.message(f"merged {len(pool)} adapters into {self.out / 'drafter'} and {self.out / 'verifier'}")

    def _pipeline(self, score: str, threshold: float) -> DraftVerify:
        slots = AdapterSlots(self.base)
        for name in ("drafter", "verifier"):
            slots.load(name, Adapter.load(self.out / name))
        config = self.recipe.loop.config(score, threshold, self.recipe.seed)
        return DraftVerify(slots, self.template, "drafter", "verifier", config)

    def _questions(self, tasks: Sequence[str], purpose: str, count: int) -> list[Question]:
        folder = Path(self.recipe.data.folder) if self.recipe.data.folder else None
        return [
            question for task in tasks for question in questions_for(task, purpose, count, self.recipe.seed, folder)
        ]

    def _calibrate(self) -> None:
        loop, data = self.recipe.loop, self.recipe.data
        (self.out / "verifier" / CALIBRATION_FILE).unlink(missing_ok=True)
        if data.calibration_items == 0:
            if loop.score == "auto" or loop.threshold == "auto":
                raise RsgwmError("score or threshold is auto, so data.calibration_items must be at least 1")
            return
        pipeline = self._pipeline(SCORES[0], 0.5)
        questions = self._questions(data.tasks, "calibration", data.calibration_items)
        calibration = calibrate(pipeline, questions, self.recipe.seed, self.recipe.evaluate.batch_rows, self.progress)
        save_calibration(self.out / "verifier", calibration)

    def _loop(self) -> tuple[str, float]:
        calibration = load_calibration(self.out / "verifier")
        score, threshold = self.recipe.loop.score, self.recipe.loop.threshold
        if calibration is not None:
            score = calibration.score if score == "auto" else score
            threshold = calibration.threshold if threshold == "auto" else threshold
        return score, float(threshold)

    def _evaluate(self) -> None:
        section = self.recipe.evaluate
        score, threshold = self._loop()
        pipeline = self._pipeline(score, threshold)
        questions = self._questions(section.tasks or self.recipe.data.tasks, "test", section.items)
        about = describe_run(pipeline, questions, section.batch_rows, timed=section.timed)
        journal = Journal(self.out / "report" / JOURNAL_FILE, about, replace=True)
        records = evaluate(pipeline, questions, section.timed, section.batch_rows, self.progress, journal=journal)
        calibration = load_calibration(self.out / "verifier")
        trained_on = training_questions(self._corpus(task) for task in self.recipe.data.tasks)
        metadata: dict[str, Any] = {
            **about,
            "recipe": self.recipe.name,
            "base": self.base.describe(),
            "seed": self.recipe.seed,
            "calibration": calibration.to_dict() if calibration else None,
            "contamination": contamination(questions, trained_on),
        }
        write_report(
            self.out / "report",
            records,
            pipeline.config.attempts,
            metadata,
            seed=self.recipe.seed,
            progress=self.progress,
        )

    def _export(self) -> None:
        section = self.recipe.export
        if section.peft:
            for role, folder in self.peft_folders.items():
                shutil.rmtree(folder, ignore_errors=True)
                to_peft(Adapter.load(self.out / role), self.recipe.base, folder)
        (self.out / "export" / "parity.json").unlink(missing_ok=True)
        if section.parity:
            from mlx_rsgwm.converters.parity import check_parity

            self._base = None
            peft = self.peft_folders["drafter"] if section.peft else None
            result = check_parity(
                self.out / "drafter",
                self.recipe.base,
                peft_folder=peft,
                tolerance=section.tolerance,
                progress=self.progress,
            )
            files.make_folder(self.out / "export")
            files.write_json(self.out / "export" / "parity.json", result)
            if not result["passed"]:
                raise CheckFailed(f"the drafter differs between MLX and torch: {'; '.join(result['failures'])}")

    def _summary(self, seconds: float) -> dict[str, Any]:
        report = files.read_json_object(self.out / "report" / "report.json")
        parity = self.out / "export" / "parity.json"
        stamps = {
            stage: files.read_json_object(self.out / "stages" / f"{stage}.json")["seconds"] for stage in self._keys
        }
        summary = {
            "recipe": self.recipe.name,
            "out": str(self.out),
            "base": {"name": self.recipe.base, "fingerprint": self._fingerprint},
            "drafter": report["drafter"],
            "draft_verify": report["draft_verify"],
            "verifier_auroc": report["verifier_auroc"][report["score"]]["all"],
            "verifier": report["verifier_auroc"],
            "calibration": report["metadata"].get("calibration"),
            "oracle": report["oracle"],
            "by_task": report["by_task"],
            "score": report["score"],
            "threshold": report["threshold"],
            "parity": files.read_json_object(parity) if parity.is_file() else None,
            "adapters": {name: str(self.out / name) for name in ("drafter", "verifier")},
            "peft": {name: str(folder) for name, folder in self.peft_folders.items() if folder.is_dir()},
            "report": str(self.out / "report"),
            "executed": self.executed,
            "stage_seconds": stamps,
            "seconds": round(seconds, 3),
        }
        files.write_json(self.out / "summary.json", summary)
        return summary

    def _corpus(self, task: str) -> Path:
        return self.out / "data" / _folder_name(task)

    def _adapter(self, task: str) -> Path:
        return self.out / "pool" / _folder_name(task)


def run_recipe(recipe: Recipe, out: Path, progress: Progress = SILENT) -> dict[str, Any]:
    """Run or resume a recipe in ``out``; returns the summary."""
    if is_complete(out):
        raise RsgwmError(f"{out} is an adapter folder; give a recipe a folder of its own")
    with files.exclusive(out):
        return Run(recipe, out, progress).execute()


def _data_inputs(data: DataSection, task: str) -> dict[str, Any]:
    """What the rows of a task depend on: its budget, and the bytes of the files they may come from."""
    local = [Path(task)] if task.endswith(".jsonl") else []
    if data.folder and not local:
        local = sorted((Path(data.folder) / task).glob("*.jsonl"))
    hashes = {path.name: files.sha256_file(path) for path in local if path.is_file()}
    return {"task": task, "budget": data.budget(task), "folder": data.folder, "files": hashes}


def _folder_name(task: str) -> str:
    return Path(task).stem if task.endswith(".jsonl") else task
