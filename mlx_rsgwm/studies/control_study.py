"""Running every control of one recipe folder: train the two that need training, draft, verify, compare.

A folder that ``rsgwm run`` left holds the pool, its corpora, drafter and verifier. The joint adapter is trained on all
rows of the pool's corpora, the direct verifier on all their verifier pairs, both with the pool's own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files, tables
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import exclusive
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.resume import content_key, stamped
from mlx_rsgwm.data.corpus import Corpus, load_corpus, save_corpus
from mlx_rsgwm.data.questions import Question
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.evaluation.calibration_set import calibrate
from mlx_rsgwm.evaluation.journal import FILE as JOURNAL_FILE
from mlx_rsgwm.evaluation.journal import EvaluationJournal
from mlx_rsgwm.evaluation.records import ItemRecord, write_items
from mlx_rsgwm.evaluation.runner import describe_run, evaluate
from mlx_rsgwm.inference.calibration import (
    UNCALIBRATED_SCORE,
    UNCALIBRATED_THRESHOLD,
    Calibration,
    NothingToTellApart,
    load_calibration,
)
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.scores import SCORES
from mlx_rsgwm.models.adapter import is_complete
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.studies.controls import (
    LoopRule,
    System,
    control_notes,
    control_rows,
    paper_systems,
    summarise_controls,
    systems_on_drafts,
)
from mlx_rsgwm.studies.judges import judge_rows, judge_scores
from mlx_rsgwm.training.checkpoints import Saving, drop_state
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train

CONTROLS_FILE = "controls.json"
PAPER = {"paper drafter": "drafter", "paper verifier": "verifier"}  # slot to folder below the run's ``paper``
JUDGES = {"verifier": "merged verifier", "self": "drafter itself", "direct": "directly trained verifier"}
TRAINED = {"joint": None, "direct": "verify"}  # name: role of the rows it learns, None for all


@dataclass(frozen=True)
class ControlPlan:
    """What to compare. ``questions`` are test items, ``calibration`` held-out ones for scores and thresholds.

    ``attempts`` is K, ``drafts`` how many are recorded per item (more than K lets votes spend what verification
    costs), ``seeds`` the sampling seeds. ``check``: of :class:`~mlx_rsgwm.inference.policy.LoopConfig`, adds systems.
    """

    run: Path
    out: Path
    questions: tuple[Question, ...]
    calibration: tuple[Question, ...]
    attempts: int = 3
    drafts: int = 6
    seeds: tuple[int, ...] = (42, 43, 44)
    sampling: Sampling = field(default_factory=Sampling)
    batch_rows: int = 32
    calibration_seed: int = 42
    check: str = "auto"

    def __post_init__(self) -> None:
        if self.drafts < self.attempts:
            raise RsgwmError(f"drafts must be at least the {self.attempts} attempts, found {self.drafts}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise RsgwmError(f"sampling seeds must be distinct and at least one, found {self.seeds}")


def corpora(run: Path) -> dict[str, Corpus]:
    """The corpora of a recipe folder by task.

    Raises:
        RsgwmError: not a recipe folder, or one that was not finished.
    """
    missing = [name for name in ("drafter", "verifier") if not is_complete(run / name)]
    by_task = {folder.name: load_corpus(folder) for folder in sorted((run / "data").glob("*")) if folder.is_dir()}
    missing += [f"pool/{name}" for name in by_task if not is_complete(run / "pool" / name)]
    if missing or not by_task:
        raise RsgwmError(f"{run} lacks {', '.join(missing or ['data'])}; give the folder of a finished rsgwm run")
    return by_task


def train_controls(base: Base, run: Path, out: Path, progress: Progress = SILENT) -> dict[str, Path]:
    """Train the joint adapter and the direct verifier below ``out`` unless they are there; returns their folders."""
    by_task = corpora(run)
    manifest = files.read_json_object(run / "pool" / next(iter(by_task)) / "manifest.json")
    config = TrainConfig.from_mapping(manifest["config"])
    template = next(iter(by_task.values())).template
    folders = {}
    for name, role in TRAINED.items():
        rows = [row for corpus in by_task.values() for row in corpus.rows if role in (None, row.role)]
        if not rows:
            continue  # a pool without verifier pairs has no direct verifier
        folders[name] = out / name
        source = {"controls": name, "sources": {task: corpus.hash for task, corpus in by_task.items()}}
        corpus = save_corpus(out / "data" / name, rows, template, source)
        with exclusive(folders[name]):  # also what a process left that was killed at its very end goes
            if _is_trained_on(folders[name], corpus):
                drop_state(folders[name])
                continue
            saving = Saving(folders[name], resume="replace")
            adapter = train(base, corpus, config, label=f"train {name}", progress=progress, saving=saving)
            finish(adapter, saving)
    return folders


def _is_trained_on(folder: Path, corpus: Corpus) -> bool:
    """Whether a finished adapter is in ``folder`` that was trained on these rows."""
    if not is_complete(folder):
        return False
    data = files.read_json_object(folder / "manifest.json").get("data") or {}
    return bool(data.get("hash") == corpus.hash)


def run_controls(base: Base, plan: ControlPlan, progress: Progress = SILENT) -> dict[str, Any]:
    """Train, draft, verify and compare; writes ``controls.json``, ``controls.md`` and every item below ``plan.out``.

    Run again after a crash it goes on with the item it had reached.
    """
    tasks = corpora(plan.run)
    template = next(iter(tasks.values())).template
    extra = train_controls(base, plan.run, plan.out, progress)
    folders = {name: plan.run / name for name in ("drafter", "verifier")} | extra
    folders |= {f"pool/{task}": plan.run / "pool" / task for task in tasks} | paper_pair(plan.run)
    slots = slots_of(base, folders)
    rules = _rules(slots, template, plan, "direct" in extra, progress)
    pipeline = _pipeline(slots, template, "drafter", "verifier", plan, rules["verifier"])
    hashes = {name: slots.adapter(name).files_hash() for name in folders}
    about = describe_run(
        pipeline, plan.questions, plan.batch_rows, drafts=plan.drafts, seeds=plan.seeds, adapters_used=hashes
    )
    journal = EvaluationJournal(plan.out / JOURNAL_FILE, about)
    beside = {
        name: _pipeline(slots, template, "drafter", {"self": "drafter", "direct": "direct"}[name], plan, rule)
        for name, rule in rules.items()
        if name != "verifier"
    }
    records = evaluate(
        pipeline, plan.questions, 0, plan.batch_rows, progress,
        seeds=plan.seeds, drafts=plan.drafts, beside=beside, journal=journal, part="merged",
    )  # fmt: skip
    named = {
        name: rule if name == "verifier" else replace(rule, score=f"{name}:{rule.score}")
        for name, rule in rules.items()
    }
    systems = systems_on_drafts(records, plan.attempts, named, plan.check)
    write_items(plan.out / "items-merged.jsonl", records)
    if set(PAPER) <= set(folders):
        systems += _paper_systems(slots, template, plan, journal, progress)
    alone: list[tuple[str, str | None, str]] = [("joint adapter", "joint", "trained on all tasks' rows (the ceiling)")]
    alone += [(f"source adapter {task}", f"pool/{task}", "one of the pool, alone") for task in tasks]
    alone += [("base", None, "no adapter")]
    for label, slot, note in alone:
        rows = _drafts_alone(slots, template, slot, plan, journal, progress)
        write_items(plan.out / f"items-{(slot or 'base').replace('/', '-')}.jsonl", rows)
        systems.append(System(label, note, tuple(rows), "drafter"))
    summary = summarise_controls(systems, plan.attempts, plan.calibration_seed)
    summary["rules"] = {name: asdict(rule) for name, rule in rules.items()}
    scores = {JUDGES[name]: rule.score for name, rule in named.items()}
    summary["judges"] = judge_scores(records, plan.attempts, scores, plan.check, plan.calibration_seed)
    summary["metadata"] = about
    sections = [("", control_rows(summary)), ("Verifiers on the same drafts", judge_rows(summary["judges"]))]
    tables.write_page(plan.out / "controls.md", "Controls", sections, control_notes(summary))
    files.write_json(plan.out / CONTROLS_FILE, summary)
    return summary


def _pipeline(
    slots: AdapterSlots,
    template: Template,
    drafter: str | None,
    verifier: str | None,
    plan: ControlPlan,
    rule: LoopRule,
) -> DraftVerify:
    config = LoopConfig(plan.attempts, rule.threshold, rule.score, plan.sampling)
    return DraftVerify(slots, template, drafter, verifier, config)


def paper_pair(run: Path) -> dict[str, Path]:
    """The folders by slot of the second merge that a recipe's section ``paper`` made; none where it made none."""
    folders = {slot: run / "paper" / name for slot, name in PAPER.items()}
    return folders if all(is_complete(folder) for folder in folders.values()) else {}


def _paper_systems(
    slots: AdapterSlots, template: Template, plan: ControlPlan, journal: EvaluationJournal, progress: Progress
) -> list[System]:
    """The paper's merge of the same pool, with drafts of its own drafter and the threshold of its own calibration."""
    stored = load_calibration(plan.run / "paper" / "verifier")
    rule = LoopRule(UNCALIBRATED_SCORE, UNCALIBRATED_THRESHOLD)
    if stored is None:
        progress.message(f"warning: the paper's pair is not calibrated: {rule.score} ≥ {rule.threshold}")
    else:
        rule = LoopRule(stored.score, stored.threshold)
    drafter, verifier = PAPER
    rows = evaluate(
        _pipeline(slots, template, drafter, verifier, plan, rule), plan.questions, 0, plan.batch_rows, progress,
        seeds=plan.seeds, drafts=plan.attempts, journal=journal, part="paper",
    )  # fmt: skip
    write_items(plan.out / "items-paper.jsonl", rows)
    return paper_systems(rows, plan.attempts, rule)


def _drafts_alone(
    slots: AdapterSlots,
    template: Template,
    slot: str | None,
    plan: ControlPlan,
    journal: EvaluationJournal,
    progress: Progress,
) -> list[ItemRecord]:
    config = LoopConfig(1, 1.0, SCORES[0], plan.sampling)
    pipeline = DraftVerify(slots, template, slot, slot, config)
    return evaluate(
        pipeline, plan.questions, 0, plan.batch_rows, progress,
        seeds=plan.seeds, scores=(), journal=journal, part=slot or "base",
    )  # fmt: skip


def _rules(
    slots: AdapterSlots, template: Template, plan: ControlPlan, direct: bool, progress: Progress
) -> dict[str, LoopRule]:
    """Score and threshold of every verifier, chosen alike on the same calibration questions; kept in a file."""
    verifiers = {"verifier": "verifier", "self": "drafter", **({"direct": "direct"} if direct else {})}
    stored = load_calibration(plan.run / "verifier")
    key = content_key(
        [
            [asdict(question) for question in plan.calibration],
            {n: slots.adapter(slot).files_hash() for n, slot in verifiers.items()},
            asdict(stored) if stored else None,
            asdict(plan.sampling),
            plan.attempts,
        ]
    )
    stamp = stamped(
        plan.out / "rules.json",
        key,
        lambda: {
            "rules": {
                name: asdict(rule)
                for name, rule in _fitted_rules(slots, template, plan, verifiers, stored, progress).items()
            }
        },
    )
    return {name: LoopRule(**rule) for name, rule in stamp["rules"].items()}


def _fitted_rules(
    slots: AdapterSlots,
    template: Template,
    plan: ControlPlan,
    verifiers: Mapping[str, str],
    stored: Calibration | None,
    progress: Progress,
) -> dict[str, LoopRule]:
    rules = {"verifier": LoopRule(stored.score, stored.threshold)} if stored else {}
    for name, slot in verifiers.items():
        if name not in rules:
            if not plan.calibration:
                raise RsgwmError("there are no calibration questions to choose the verifiers' thresholds on")
            pipeline = _pipeline(slots, template, "drafter", slot, plan, LoopRule(SCORES[0], 0.5))
            try:
                fitted = calibrate(
                    pipeline, plan.calibration, plan.calibration_seed, plan.batch_rows, progress, scores=SCORES[:2]
                )
                rules[name] = LoopRule(fitted.score, fitted.threshold)
            except NothingToTellApart as error:
                progress.message(f"warning: {name} is not calibrated: {error}")
                rules[name] = LoopRule(UNCALIBRATED_SCORE, UNCALIBRATED_THRESHOLD)
    return rules
