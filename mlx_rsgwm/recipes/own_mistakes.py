"""A verifier trained on the drafter's own mistakes: its stages, and what is told of it beside the pair without.

The drafter drafts on training questions, gold says which drafts are right, and the run's verifier is trained on with
pairs of a right and a wrong one: it begins with that verifier's weights. Calibrated and evaluated it is a pair of its
own (:class:`~mlx_rsgwm.recipes.pair.MergedPair`) with the same drafter, in ``own-mistakes`` below the run's folder.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.corpus import load_corpus, save_corpus
from mlx_rsgwm.evaluation.own_mistakes import MistakePlan, mistake_rows, mistakes_about, texts_of
from mlx_rsgwm.evaluation.report.folder import REPORT_FILE
from mlx_rsgwm.inference.calibration import FILE as CALIBRATION_FILE
from mlx_rsgwm.inference.loop import DraftVerify
from mlx_rsgwm.inference.open import slots_of
from mlx_rsgwm.inference.policy import LoopConfig
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.slots import unwrap
from mlx_rsgwm.recipes.pair import MergedPair
from mlx_rsgwm.recipes.questions import mistake_questions
from mlx_rsgwm.recipes.sections import OwnMistakesSection
from mlx_rsgwm.recipes.stages import Stage
from mlx_rsgwm.training.checkpoints import Saving
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.loop import finish, train
from mlx_rsgwm.training.warm_start import WarmStart

if TYPE_CHECKING:
    from mlx_rsgwm.recipes.run import RecipeRun

SUFFIX = "-own-mistakes"  # of the stages' names
DRAFT = f"draft{SUFFIX}"
TRAIN = f"verifier{SUFFIX}"
LABEL = "verifier trained on the drafter's own mistakes"


def pair_of(run: RecipeRun) -> MergedPair | None:
    """The run's drafter with the verifier that is to be trained; None where the recipe asks for none."""
    if run.recipe.own_mistakes is None:
        return None
    return MergedPair(run.out / "own-mistakes", run.recipe.merge, SUFFIX, drafter=run.pair.roles["drafter"])


def making(run: RecipeRun) -> list[Stage]:
    """The stages that draft, and that train the verifier."""
    recipe, (pair, section) = run.recipe, _of(run)
    drafting = {name: value for name, value in asdict(section).items() if name != "epochs"}
    sampling = {name: getattr(recipe.loop, name) for name in ("temperature", "top_p", "max_tokens")}
    asked = {
        "tasks": recipe.data.tasks,
        "budget": [recipe.data.budget(task) for task in recipe.data.tasks],
        "batch_rows": recipe.evaluate.batch_rows,
        "folder": recipe.data.folder,
        "files": run.hashes(recipe.data.tasks),
    }
    return [
        Stage(
            DRAFT,
            {**run.shared(), **asked, **drafting, **sampling},
            (pair.roles["drafter"],),
            (_corpus(pair),),
            partial(_draft, run),
            (CALIBRATION_FILE,),
            pieces=len(recipe.data.tasks),
        ),
        Stage(
            TRAIN,
            {**run.shared(), "config": recipe.train.describe(), "epochs": section.epochs},
            (_corpus(pair), run.pair.roles["verifier"]),
            (pair.roles["verifier"],),
            partial(_train, run),
            (CALIBRATION_FILE,),
        ),
    ]


def _of(run: RecipeRun) -> tuple[MergedPair, OwnMistakesSection]:
    """The pair and its section, where the recipe has them."""
    assert run.own_mistakes is not None
    assert run.recipe.own_mistakes is not None
    return run.own_mistakes, run.recipe.own_mistakes


def _corpus(pair: MergedPair) -> Path:
    return pair.folder / "data"


def _draft(run: RecipeRun) -> None:
    recipe, (pair, section) = run.recipe, _of(run)
    asked = {task: mistake_questions(recipe, task) for task in recipe.data.tasks}
    chosen = {task: selection for task, (selection, _) in asked.items()}
    for task, (selection, again) in asked.items():
        if again:
            run.progress.message(f"{task}: of {len(selection.questions)} questions drafted on {again} were trained on")
    sampling = recipe.loop.sampling(recipe.seed)
    plan = MistakePlan(
        recipe.data.tasks, section.rows, items=section.items, attempts=section.attempts, sampling=sampling,
        batch_rows=recipe.evaluate.batch_rows, seed=recipe.seed, true_equations=section.true_equations, at_most=True,
    )  # fmt: skip
    slots = slots_of(run.base, {"drafter": pair.roles["drafter"]})
    drafter = DraftVerify(slots, run.template, "drafter", None, LoopConfig(plan.attempts, sampling=sampling))
    rows, counts = mistake_rows([drafter], chosen, plan, run.progress.message, run.progress)
    if not rows:
        raise RsgwmError("own_mistakes: no draft is wrong, and no gold answer can be made so; leave the section out")
    about = mistakes_about(plan, [slots.adapter("drafter")], counts)
    about["negatives"]["trained_on"] = {task: again for task, (_, again) in asked.items()}
    save_corpus(_corpus(pair), rows, run.template, about, texts_of(chosen))


def _train(run: RecipeRun) -> None:
    pair, section = _of(run)
    start = run.pair.roles["verifier"]
    config = _config(run.recipe.train, Adapter.load(start), section.epochs)
    saving = Saving(pair.roles["verifier"], resume="replace")
    unwrap(run.base.model)  # of the adapters that have drafted on it
    adapter = train(
        run.base, load_corpus(_corpus(pair)), config, label="train on own mistakes", progress=run.progress,
        saving=saving, warm_start=WarmStart.load(start),
    )  # fmt: skip
    finish(adapter, saving)


def _config(config: TrainConfig, start: Adapter, epochs: int) -> TrainConfig:
    """The recipe's settings in the shapes of ``start``: a merge may have another rank and reach other layers."""
    spec = start.spec
    return replace(
        config, epochs=epochs, steps=0, rounds=None, rank=spec.rank, alpha=spec.rank * spec.scale, keys=spec.keys,
        num_layers=spec.num_layers,
    )  # fmt: skip


def beside(run: RecipeRun) -> dict[str, Any]:
    """For the report of the pair: what was trained, and the pair without it on the same questions. JSON values."""
    pair, _ = _of(run)
    corpus = load_corpus(_corpus(pair))
    without = files.read_json_object(run.pair.report / REPORT_FILE)
    told = {name: without[name] for name in ("draft_verify", "score", "threshold", "verifier_auroc")}
    return {
        "more_training": {"of": "verifier", "rows": len(corpus.rows), **corpus.manifest["negatives"]},
        "beside": {"this": LABEL, "other": "without more training", "report": told},
    }


def summary(run: RecipeRun) -> dict[str, Any]:
    """What came out of the pair on the same questions, for the run's summary."""
    pair, _ = _of(run)
    report = files.read_json_object(pair.report / REPORT_FILE)
    return {
        "draft_verify_own_mistakes": {
            **report["draft_verify"],
            "verifier_auroc": report["verifier_auroc"][report["score"]]["all"],
            "rows": report["metadata"]["more_training"]["rows"],
            "verifier": str(pair.roles["verifier"]),
            "report": str(pair.report),
        }
    }
