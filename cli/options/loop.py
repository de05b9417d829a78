"""Options of every command that runs the draft–verify loop, and the pipeline they ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_rsgwm.cli.console import Console
from mlx_rsgwm.cli.options.paths import PATH

if TYPE_CHECKING:
    from mlx_rsgwm.inference.calibration import Calibration
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.policy import LoopConfig
    from mlx_rsgwm.inference.sampling import Sampling

F = TypeVar("F", bound=Callable[..., Any])

DEMO = Path("runs/demo")

# What drafts and what reads; the rest decides.
PIPELINE_OPTIONS = (
    click.option(
        "--base", "base_name", help="Hub id, folder, .gguf or alias.  [default: the one that the adapters record]"
    ),
    click.option("--drafter", type=PATH, help=f"Adapter folder of the drafter.  [default: {DEMO}/drafter]"),
    click.option(
        "--verifier",
        type=PATH,
        help=f"Adapter folder of the verifier; give both or neither.  [default: {DEMO}/verifier]",
    ),
    click.option("--attempts", default=3, show_default=True, help="Drafts in all, the first included."),
    click.option("--temperature", default=0.7, show_default=True),
    click.option("--top-p", default=0.9, show_default=True),
    click.option("--max-tokens", default=256, show_default=True, help="Longest draft."),
    click.option("--verify-template", help="Other words for the verifier, to see what misaligned prompts cost."),
    click.option(
        "--template-mismatch",
        default="refuse",
        show_default=True,
        help="refuse or warn, when an adapter was trained with another template.",
    ),
    click.option("--template", "template_name", help="plain or chat; default: the one the drafter was trained with."),
)
DECISION_OPTIONS = (
    click.option(
        "--score",
        default="auto",
        show_default=True,
        help="yesno, mean_logprob, combined, or auto: by the verifier's calibration.",
    ),
    click.option(
        "--threshold", default="auto", show_default=True, help="In [0, 1]; auto: the verifier's calibration, else 0.7."
    ),
    click.option(
        "--mode",
        default="adaptive",
        show_default=True,
        help="adaptive, parallel or sequential: the same answers in different time.",
    ),
    click.option("--abstain", is_flag=True, help="Say nothing when no draft is accepted, instead of the best one."),
)


def pipeline_options(command: F) -> F:
    """Add the options of :func:`load_pipeline`; the command takes them as keywords and hands them on."""

    @functools.wraps(command)
    def with_pair(*arguments: Any, drafter: Path | None, verifier: Path | None, **options: Any) -> Any:
        drafter, verifier = settle_pair(drafter, verifier)
        return command(*arguments, drafter=drafter, verifier=verifier, **options)

    decorated: Any = with_pair
    for option in reversed(PIPELINE_OPTIONS):
        decorated = option(decorated)
    return decorated


def settle_pair(drafter: Path | None, verifier: Path | None) -> tuple[Path, Path]:
    """Both folders: the demo's when none is given. With one of them the other is never guessed."""
    from mlx_rsgwm.core.errors import RsgwmError

    if drafter is None and verifier is None:
        return DEMO / "drafter", DEMO / "verifier"
    if drafter is not None and verifier is not None:
        return drafter, verifier
    given, missing = ("drafter", "verifier") if verifier is None else ("verifier", "drafter")
    folder = drafter or verifier
    beside = folder.parent / missing if folder is not None else None
    hint = f" (there is {beside})" if beside is not None and beside.is_dir() else ""
    raise RsgwmError(f"--{given} {folder} without --{missing}; give both{hint}")


def loop_options(command: F) -> F:
    """Add all options; the command takes them as keywords and hands them to :func:`build_pipeline`."""
    for option in reversed(DECISION_OPTIONS):
        command = option(command)
    return pipeline_options(command)


def load_pipeline(
    console: Console, options: Mapping[str, Any], config: LoopConfig, calibration: Calibration | None
) -> DraftVerify:
    """Load base and adapters once they are known to belong together.

    What is odd about the pair, and what the verifier's calibration was not made for, is told.
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.data.template import Template, find_template
    from mlx_rsgwm.evaluation.calibration_set import identity
    from mlx_rsgwm.inference.loop import DraftVerify
    from mlx_rsgwm.inference.pairing import check_pair, load_base_for
    from mlx_rsgwm.models.adapter import Adapter
    from mlx_rsgwm.models.slots import AdapterSlots

    asked_in = find_template(options["verify_template"]) if options["verify_template"] else None
    mismatch = options["template_mismatch"]
    drafter, verifier = Adapter.load(options["drafter"]), Adapter.load(options["verifier"])
    for doubt in check_pair(drafter, verifier):
        console.warn(doubt)
    if options["template_name"]:
        template = find_template(options["template_name"])
    elif drafter.manifest.get("template"):
        template = Template.from_description(drafter.manifest["template"])
    else:
        raise RsgwmError(
            f"{options['drafter']} does not say which prompt template it was trained with; give --template"
        )
    slots = AdapterSlots(load_base_for((drafter, verifier), options["base_name"], console.progress))
    slots.load("drafter", drafter)
    slots.load("verifier", verifier)
    pipeline = DraftVerify(slots, template, "drafter", "verifier", config, asked_in, mismatch, calibration)
    for warning in pipeline.warnings:
        console.warn(warning)
    changed = calibration.differences(identity(pipeline)) if calibration else []
    if changed:
        console.warn(
            f"the verifier was calibrated with another {', '.join(changed)}; its threshold and what its scores mean "
            "may not hold here; calibrate again with: rsgwm calibrate"
        )
    if calibration and not calibration.made_for:
        console.warn("the verifier's calibration does not say which pair it was made for; see rsgwm calibrate")
    return pipeline


def build_pipeline(
    console: Console,
    options: Mapping[str, Any],
    calibrate: Callable[[DraftVerify], Calibration] | None = None,
) -> DraftVerify:
    """Load base and adapters and settle score and threshold.

    ``auto`` takes what was stored beside the verifier; without that, ``calibrate`` decides on held-out questions, and
    where there are none the literal reading of the paper (mean_logprob, 0.7) is used and said so.
    """
    from dataclasses import replace

    from mlx_rsgwm.inference.calibration import (
        UNCALIBRATED_SCORE,
        UNCALIBRATED_THRESHOLD,
        NothingToTellApart,
        load_calibration,
    )
    from mlx_rsgwm.inference.policy import LoopConfig

    score, threshold = options["score"], _threshold(options["threshold"])
    provisional = UNCALIBRATED_SCORE if score == "auto" else score
    config = LoopConfig(
        attempts=options["attempts"],
        threshold=UNCALIBRATED_THRESHOLD if threshold is None else threshold,
        score=provisional,
        sampling=sampling_of(console, options),
        mode=options["mode"],
        abstain=options["abstain"],
    )
    calibration = load_calibration(options["verifier"])
    if calibration is not None and "auto" in (score, options["threshold"]):
        calibration.require_both_classes(options["verifier"])
    pipeline = load_pipeline(console, options, config, calibration)
    if score == "auto" and calibration is None and calibrate is not None:
        try:
            pipeline.calibration = calibration = calibrate(pipeline)
        except NothingToTellApart as error:
            console.progress.message(f"warning: {error}")
    if score == "auto":
        score = calibration.score if calibration else UNCALIBRATED_SCORE
        if calibration is None:
            console.progress.message(f"the verifier is not calibrated: its score is {UNCALIBRATED_SCORE}")
    if threshold is None:
        matching = calibration is not None and calibration.score == score
        threshold = calibration.threshold if calibration is not None and matching else UNCALIBRATED_THRESHOLD
    pipeline.config = replace(config, threshold=threshold, score=score)
    return pipeline


def sampling_of(console: Console, options: Mapping[str, Any]) -> Sampling:
    """The sampling that the options ask for."""
    from mlx_rsgwm.inference.sampling import Sampling

    return Sampling(options["temperature"], options["top_p"], options["max_tokens"], console.seed)


def _threshold(text: str) -> float | None:
    from mlx_rsgwm.core.errors import RsgwmError

    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise RsgwmError(f"--threshold must be auto or a number in [0, 1], found {text!r}") from None
