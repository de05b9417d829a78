"""``rsgwm calibrate``: what a verifier's scores mean, and a threshold, perhaps with a bound on its risk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import INSIDE, PATH, OneOf
from mlx_rsgwm.cli.options.loop import build_pipeline, check_option, load_pair, pipeline_options, score_option
from mlx_rsgwm.inference.scores import CURVE_METHODS

if TYPE_CHECKING:
    from mlx_rsgwm.inference.calibration import Calibration


@click.command()
@shared.task()
@shared.items(50, "held-out ones")
@score_option("the best of them")
@click.option(
    "--curve",
    "method",
    type=OneOf(["auto", "none", *CURVE_METHODS]),
    default="auto",
    show_default=True,
    help="From a score to a probability; auto is the best of them.",
)
@click.option("--target-far", type=INSIDE, help="Risk bound: at most this share of what is accepted is wrong.")
@click.option("--confidence", type=INSIDE, default=0.9, show_default=True, help="Confidence of the risk bound.")
@check_option()
@click.option("--drafts-file", "file", type=PATH, help="Keep the held-out drafts here, and use them if there.")
@shared.questions()
@shared.split("calibration, and of a data set train")
@shared.allow_overlap()
@shared.batch_rows()
@pipeline_options
@common_options
def calibrate(
    console: Console,
    tasks: tuple[str, ...],
    items: int,
    score: str,
    method: str,
    target_far: float | None,
    confidence: float,
    file: Path | None,
    folder: Path | None,
    split: str | None,
    allow_overlap: bool,
    batch_rows: int,
    **options: object,
) -> None:
    """Decide on held-out questions which score to use, what it means and where to accept; kept beside the verifier.

    The drafter drafts, the verifier reads, gold decides. Scores are compared by AUROC and mapped to the probability of
    being right. Without --target-far the threshold has the best balanced accuracy. With it, half of the items fits all
    this and the other half tests thresholds: with the given confidence, P(wrong | accepted) is at most the target, for
    questions like these and the same adapters, sampling, attempts and --check. Where the items cannot hold that bound,
    the exit code is 3, the reason is told and the verifier stays as it was.

    Example: rsgwm calibrate --task change --task groups --items 100 --target-far 0.1 --drafts-file held.jsonl
    """
    from mlx_rsgwm.evaluation.calibration_set import calibrate as fit_calibration
    from mlx_rsgwm.evaluation.contamination import draw_calibration, rows_trained_on
    from mlx_rsgwm.inference.calibration import (
        UNCALIBRATED_SCORE,
        UNCALIBRATED_THRESHOLD,
        calibration_folder,
        save_calibration,
    )
    from mlx_rsgwm.inference.pair import roles_of
    from mlx_rsgwm.inference.risk_control import Target

    target = None if target_far is None else Target(target_far, confidence)
    drafter, verifier = load_pair(console, options)
    base_name: Any = options["base_name"]
    trained = rows_trained_on({"drafter": drafter, **roles_of(verifier)}, base_name, console.progress)
    drawn = draw_calibration(tasks, items, console.seed, folder, trained, allow_overlap, split=split)
    for note in drawn.notes:
        console.progress.message(note)
    uncalibrated = {"score": UNCALIBRATED_SCORE, "threshold": UNCALIBRATED_THRESHOLD}
    pipeline = build_pipeline(
        console, {**options, "drafter": drafter, "verifier": verifier, **uncalibrated}, calibration=None
    )
    fitted = fit_calibration(
        pipeline, drawn.questions, console.seed, batch_rows, console.progress,
        score=score, method=method, target=target, file=file, record=drawn.record,
    )  # fmt: skip
    kept_in = calibration_folder(verifier, pipeline.combine)
    save_calibration(kept_in, fitted)
    console.line(render(fitted))
    console.line(f"calibration: {kept_in}")
    console.result({"out": str(kept_in), **fitted.to_dict(), "overlap": drawn.overlap.headline("NOT HELD OUT")})


def render(calibration: Calibration) -> str:
    """The text a person reads."""
    from mlx_rsgwm.core.tables import aligned, show

    rows = [["score", "AUROC", "on perturbed gold", "calibration", "ECE before → after"]]
    for name, auroc in calibration.auroc.items():
        reliable = calibration.reliability.get(name)
        method = calibration.curves[name].method if name in calibration.curves else "none"
        errors = f"{reliable.ece_before:.3f} → {reliable.ece_after:.3f}" if reliable else show(None)
        rows.append([name, _three(auroc), _three(calibration.perturbed_auroc[name]), method, errors])
    lines = [f"{calibration.drafts} drafts of {calibration.items} items, {calibration.correct} right", aligned(rows)]
    lines.append(f"in use: {calibration.score}, accepted from {calibration.threshold:.3f} on")
    if calibration.risk_bound is not None:
        lines.append(f"risk bound: {calibration.risk_bound}")
    return "\n".join(lines)


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
