"""A whole job as one YAML: data → pool → merge → calibrate → evaluate → export, in stages that resume.

Run again, a stage is skipped when it was done with the same settings and inputs and its files are as it left them; a
changed setting, base or file runs it and what follows it anew (:mod:`mlx_rsgwm.recipes.stages`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.converters.peft.convert import to_peft
from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import CheckFailed, RsgwmError
from mlx_rsgwm.core.folders import exclusive, make_folder
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.template import find_template
from mlx_rsgwm.evaluation.calculator_systems import SYSTEMS
from mlx_rsgwm.evaluation.calibration_set import calibrate
from mlx_rsgwm.evaluation.contamination import (
    check_overlap,
    contamination,
    rows_seen,
    rows_trained_on,
    training_questions,
)
from mlx_rsgwm.evaluation.journal import FILE as JOURNAL_FILE
from mlx_rsgwm.evaluation.report.folder import REPORT_FILE
from mlx_rsgwm.evaluation.reported_run import report_run
from mlx_rsgwm.evaluation.runner import describe_run
from mlx_rsgwm.inference.calibration import FILE as CALIBRATION_FILE
from mlx_rsgwm.inference.calibration import (
    NothingToTellApart,
    calibration_folder,
    load_calibration,
    save_calibration,
    score_and_threshold,
)
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.inference.scores import SCORES
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.models.adapter import Adapter, is_complete
from mlx_rsgwm.models.base import Base, load_base, resolve_base
from mlx_rsgwm.models.base_folder import fingerprint_of
from mlx_rsgwm.recipes import own_mistakes
from mlx_rsgwm.recipes.pair import MergedPair
from mlx_rsgwm.recipes.questions import asked, check_questions, draw_to_calibrate, draw_to_test
from mlx_rsgwm.recipes.schema import MERGED, Recipe, folder_name, load_recipe, shipped_recipes
from mlx_rsgwm.recipes.stage_bars import StageBars
from mlx_rsgwm.recipes.stages import Stage, Stages
from mlx_rsgwm.recipes.train_stages import train_stages
from mlx_rsgwm.training.checkpoints import require_pool_place
from mlx_rsgwm.training.loop import check_layers

__all__ = ["Recipe", "RecipeRun", "load_recipe", "run_recipe", "shipped_recipes"]


class RecipeRun:
    """One recipe in one folder. The base is loaded only when a stage that needs it runs."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress = SILENT, details: bool = False) -> None:
        self.recipe = recipe
        self.out = out
        self.progress = StageBars(progress, details)
        self.template = find_template(recipe.template)
        self.stages = Stages(out, self.progress)
        alone = self.adapter(recipe.data.tasks[0]) if len(recipe.data.tasks) == 1 else None
        self.pair = MergedPair(out, recipe.merge, verifiers=recipe.verifiers, adapter=alone)
        self.paper = MergedPair(out / "paper", recipe.paper, "-paper") if recipe.paper else None
        self.own_mistakes = own_mistakes.pair_of(self)
        self._base: Base | None = None
        self._fingerprint = ""

    @property
    def base(self) -> Base:
        """The base, loaded when it is first needed."""
        if self._base is None:
            self._base = load_base(self.recipe.base, progress=self.progress)
        return self._base

    @property
    def peft_folders(self) -> dict[str, Path]:
        """Where drafter and verifier are exported to."""
        return {role: self.out / "export" / f"{role}-peft" for role in ("drafter", "verifier")}

    def stages_ahead(self) -> dict[str, bool]:
        """The stages in their order, and whether each is done already; what uses a stage that is not is not either."""
        self._fingerprint = fingerprint_of(resolve_base(self.recipe.base, self.progress))
        ahead: dict[str, bool] = {}
        for stage in self._plan():
            alone = stage.name.startswith(("data-", "train-"))  # of other tasks
            ahead[stage.name] = self.stages.is_done(stage) and (alone or all(ahead.values()))
        return ahead

    def execute(self) -> dict[str, Any]:
        """Run every stage that is not up to date and return the summary that ``summary.json`` holds.

        Raises:
            CheckFailed: parity with torch was asked for and does not hold; everything is kept.
        """
        started = time.monotonic()
        make_folder(self.out)
        self._fingerprint = fingerprint_of(resolve_base(self.recipe.base, self.progress))
        plan = self._plan()
        if not all(
            self.stages.is_done(stage) for stage in plan if stage.name.startswith(("train-", own_mistakes.DRAFT))
        ):
            check_questions(self.recipe)
            check_layers(self.base.model, self.recipe.train)
        for number, stage in enumerate(plan, 1):
            work = partial(self._shown, stage, f"{number}/{len(plan)} {stage.name}")
            self.stages.run(replace(stage, work=work))
        return self._summary(time.monotonic() - started)

    def _shown(self, stage: Stage, label: str) -> None:
        with self.progress.stage(label, stage.pieces):
            stage.work()

    def _plan(self) -> list[Stage]:
        """The stages in their order: all data before all training, so that too few questions are told at once."""
        recipe = self.recipe
        return [
            *train_stages(self),
            *(stage for pair in (self.pair, self.paper, self.own_mistakes) if pair for stage in self._stages_of(pair)),
            Stage(
                "export",
                {**asdict(recipe.export), "base": recipe.base, "fingerprint": self._fingerprint},
                tuple(self.pair.roles.values()),
                (self.out / "export",),
                self._export,
                (CALIBRATION_FILE,),
            ),
        ]

    def _stages_of(self, pair: MergedPair) -> list[Stage]:
        """Make, calibrate and evaluate one pair."""
        recipe, tasks, roles = self.recipe, self.recipe.data.tasks, tuple(pair.roles.values())
        read = tuple({**pair.roles, **pair.asked}.values())
        judged = () if pair.calibration.parent in roles else (pair.calibration,)
        beside = (self.pair.report / REPORT_FILE,) if pair is self.own_mistakes else ()
        tested = recipe.evaluate.tasks or tasks
        asked = {
            **self.shared(),
            "loop": recipe.loop.describe(),
            "batch_rows": recipe.evaluate.batch_rows,
            "folder": recipe.data.folder,
        }
        return [
            *(own_mistakes.making(self) if pair is self.own_mistakes else self._merging(pair)),
            Stage(
                f"calibrate{pair.suffix}",
                {**asked, "tasks": tasks, "items": recipe.data.calibration_items, "files": self.hashes(tasks)},
                read,
                (pair.calibration,),
                partial(self._calibrate, pair),
                (CALIBRATION_FILE,),
                pieces=3,
            ),
            Stage(
                f"evaluate{pair.suffix}",
                {
                    **asked,
                    **({"check": recipe.loop.check} if recipe.loop.check != "auto" else {}),
                    "name": recipe.name,
                    "tasks": tested,
                    "trained": tasks,
                    **asdict(recipe.evaluate),
                    "files": self.hashes(tested),
                },
                (*(self.corpus(task) for task in tasks), *read, *judged, *beside),
                (pair.report,),
                partial(self._evaluate, pair),
                resumed=(JOURNAL_FILE,),
                pieces=2 if recipe.evaluate.timed else 1,
            ),
        ]

    def _merging(self, pair: MergedPair) -> list[Stage]:
        """One adapter alone is not merged."""
        if pair.adapter:
            return []
        stage = Stage(
            f"merge{pair.suffix}",
            {"tasks": self.recipe.data.tasks, "seed": self.recipe.seed, **asdict(pair.section)},
            tuple(self.adapter(task) for task in self.recipe.data.tasks),
            tuple(pair.roles.values()),
            partial(self._merge, pair),
            (CALIBRATION_FILE,),
            pieces=2,
        )
        return [stage]

    def shared(self) -> dict[str, Any]:
        """What every stage before the export depends on."""
        return {"base": self._fingerprint, "template": self.template.hash, "seed": self.recipe.seed}

    def hashes(self, tasks: Sequence[str]) -> dict[str, dict[str, str]]:
        """The bytes of the files that questions of ``tasks`` may come from."""
        data = self.recipe.data
        return {task: {path.name: files.sha256_file(path) for path in data.files_of(task)} for task in tasks}

    def _merge(self, pair: MergedPair) -> None:
        pool = [self.adapter(task) for task in self.recipe.data.tasks]
        for role, folder in zip(("draft", "verify"), pair.roles.values(), strict=True):
            options = replace(pair.section.options(role), seed=self.recipe.seed)
            if self.recipe.train.grows and options.rank is None:  # adapters of a higher rank than was asked for
                options = replace(options, rank=self.recipe.train.rank)
            merged = merge(pool, options, self.progress)
            merged.save(folder)
            for warning in merged.manifest["merge"]["warnings"]:
                self.progress.detail(f"warning: {folder.relative_to(self.out)}: {warning}")
        self.progress.detail(f"merged {len(pool)} adapters into {' and '.join(map(str, pair.roles.values()))}")

    def _pipeline(self, pair: MergedPair, score: str, threshold: float) -> DraftVerify:
        slots = slots_of(self.base, pair.asked)
        config = self.recipe.loop.config(score, threshold, self.recipe.seed)
        return DraftVerify(
            slots, self.template, "drafter", pair.verifiers, config,
            calibration=load_calibration(pair.calibration.parent),
            combine=self.recipe.loop.combine if len(pair.verifiers) > 1 else "max",
        )  # fmt: skip

    def _calibrate(self, pair: MergedPair) -> None:
        pair.calibration.unlink(missing_ok=True)
        if self.recipe.data.calibration_items == 0:
            return
        pipeline = self._pipeline(pair, SCORES[0], 0.5)
        drawn = draw_to_calibrate(self.recipe, rows_trained_on(pair.asked, self.recipe.base))
        for note in drawn.notes:
            self.progress.message(note)
        try:
            calibration = calibrate(
                pipeline, drawn.questions, self.recipe.seed, self.recipe.evaluate.batch_rows, self.progress,
                score=self.recipe.loop.score, record=drawn.record,
            )  # fmt: skip
        except NothingToTellApart as error:
            self.progress.warning(f"warning: not calibrated: {error}")
        else:
            save_calibration(pair.calibration.parent, calibration)
            if len(pair.verifiers) > 1:  # where rsgwm ask looks for that of a pool
                adapters = [pipeline.slots.adapter(name) for name in pipeline.verifiers]
                save_calibration(calibration_folder(adapters, pipeline.combine), calibration)

    def _evaluate(self, pair: MergedPair) -> None:
        section = self.recipe.evaluate
        calibration = load_calibration(pair.calibration.parent)
        loop = self.recipe.loop
        score, threshold = score_and_threshold(loop.score, loop.threshold, calibration)
        pipeline = self._pipeline(pair, score, threshold)
        seen = rows_seen(pair.asked, self.recipe.base, pool_folder=pair.calibration.parent)
        chosen = draw_to_test(self.recipe, seen)
        questions = asked(chosen)
        overlap = check_overlap(questions, seen, section.allow_overlap, "test")
        about = describe_run(pipeline, questions, section.batch_rows, timed=section.timed)
        trained_on = training_questions(self.corpus(task) for task in self.recipe.data.tasks)
        report_run(
            pipeline, questions, about, overlap, pair.report, timed=section.timed,
            batch_rows=section.batch_rows, seed=self.recipe.seed, replace=True, progress=self.progress,
            metadata={
                "recipe": self.recipe.name,
                "calibration": calibration.to_dict() if calibration else None,
                "merge": pair.merge_record(),
                "contamination": contamination(questions, trained_on),
                "tasks": [
                    {
                        "task": task,
                        "split": selection.split,
                        "items": len(selection.questions),
                        "note": selection.note(task),
                    }
                    for task, selection in chosen.items()
                ],
                **(own_mistakes.beside(self) if pair is self.own_mistakes else {}),
            },
        )  # fmt: skip

    def _export(self) -> None:
        section = self.recipe.export
        for role, folder in self.peft_folders.items():
            shutil.rmtree(folder, ignore_errors=True)
            if section.peft:
                to_peft(Adapter.load(self.pair.roles[role]), self.recipe.base, folder)
        (self.out / "export" / "parity.json").unlink(missing_ok=True)
        if section.parity:
            from mlx_rsgwm.converters.parity.check import check_parity

            self._base = None
            peft = self.peft_folders["drafter"] if section.peft else None
            result = check_parity(
                self.pair.roles["drafter"],
                self.recipe.base,
                peft_folder=peft,
                tolerance=section.tolerance,
                progress=self.progress,
            )
            make_folder(self.out / "export")
            files.write_json(self.out / "export" / "parity.json", result)
            if not result["passed"]:
                raise CheckFailed(f"the drafter differs between MLX and torch: {'; '.join(result['failures'])}")

    def _summary(self, seconds: float) -> dict[str, Any]:
        report = files.read_json_object(self.pair.report / REPORT_FILE)
        parity = self.out / "export" / "parity.json"
        summary = {
            "recipe": self.recipe.name,
            "out": str(self.out),
            "base": {"name": self.recipe.base, "fingerprint": self._fingerprint},
            "tasks": list(self.recipe.data.tasks),
            "drafter": report["drafter"],
            "draft_verify": report["draft_verify"],
            **{key: report[key] for key in (*SYSTEMS, "arithmetic") if key in report},
            **({"draft_verify_paper": self._paper(self.paper)} if self.paper else {}),
            **(own_mistakes.summary(self) if self.own_mistakes else {}),
            "verifier_auroc": report["verifier_auroc"][report["score"]]["all"],
            "verifier": report["verifier_auroc"],
            "calibration": report["metadata"].get("calibration"),
            "oracle": report["oracle"],
            "by_task": report["by_task"],
            "score": report["score"],
            "threshold": report["threshold"],
            "parity": files.read_json_object(parity) if parity.is_file() else None,
            "adapters": {role: str(folder) for role, folder in self.pair.roles.items()},
            **({} if self.pair.verifiers == (MERGED,) else {"verifiers": list(self.pair.verifiers)}),
            "peft": {name: str(folder) for name, folder in self.peft_folders.items() if folder.is_dir()},
            "report": str(self.pair.report),
            "executed": self.stages.executed,
            "stage_seconds": self.stages.seconds,
            "seconds": round(seconds, 3),
        }
        files.write_json(self.out / "summary.json", summary)
        return summary

    def _paper(self, pair: MergedPair) -> dict[str, Any]:
        """What came out of the paper's pair on the same questions."""
        report = files.read_json_object(pair.report / REPORT_FILE)
        return {**report["draft_verify"], "drafter": report["drafter"]}

    def corpus(self, task: str) -> Path:
        """The folder of a task's corpus."""
        return self.out / "data" / folder_name(task)

    def adapter(self, task: str) -> Path:
        """The folder of a task's adapter in the pool."""
        return self.out / "pool" / folder_name(task)


def run_recipe(recipe: Recipe, out: Path, progress: Progress = SILENT, details: bool = False) -> dict[str, Any]:
    """Run or resume a recipe in ``out``, with the details of every stage or without; returns the summary."""
    if is_complete(out):
        raise RsgwmError(f"{out} is an adapter folder; give a recipe a folder of its own")
    require_pool_place(out)
    with exclusive(out):
        return RecipeRun(recipe, out, progress, details).execute()
