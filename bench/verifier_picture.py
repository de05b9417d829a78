"""The picture of ``verifier_study.py``: verifiers compared, the best one's reliability, its risk bounds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.evaluation.report.figures import spread_of, write_figure
from mlx_rsgwm.evaluation.verifier_quality import reliability
from mlx_rsgwm.inference.calibration_fit import Judged, fit
from mlx_rsgwm.inference.scores import SCORES


def plot(summary: Mapping[str, Any], calibration: Judged, test: Judged, path: Path) -> None:
    """AUROC of every verifier and score; reliability before and after; realised false accepts against the target.

    ``calibration`` and ``test``: what the best verifier reads of the drafts to fit on, and of the others.
    """
    write_figure(path, partial(_draw, summary=summary, drafts=calibration, test=test), (14, 4))


def _draw(figure: Any, summary: Mapping[str, Any], drafts: Judged, test: Judged) -> None:
    left, middle, right = figure.subplots(1, 3)
    names = list(summary["verifiers"])
    for shift, score in enumerate(SCORES):
        rates = [summary["verifiers"][name]["scores"][score]["auroc"] for name in names]
        places = [index + (shift - 1) * 0.27 for index in range(len(names))]
        left.bar(places, [r["value"] for r in rates], 0.27, yerr=spread_of(rates), capsize=3, label=score)
    left.axhline(0.5, color="grey", linewidth=0.8)
    left.axhline(0.9, color="grey", linestyle=":")
    left.set_xticks(range(len(names)), names)
    left.set(ylim=(0.3, 1), ylabel="AUROC on own drafts", title=f"Verifiers ({summary['questions']} questions, K = 3)")
    left.legend(loc="lower right")
    best = summary["best"]["verifier"]
    calibration = fit(drafts, score=summary["best"]["score"])
    signals, labels, _ = test.flat
    raw = calibration.scorer(calibration.score).values(signals)
    after = calibration.curves[calibration.score].probabilities(raw)
    for values, label in ((raw, "before"), (after, "after")):
        filled = [level for level in reliability(values, labels) if level.n >= 5]
        rates = [level.correct.to_dict() for level in filled]
        x = [level.mean_score for level in filled]
        middle.errorbar(x, [r["value"] for r in rates], yerr=spread_of(rates), marker="o", capsize=2, label=label)
    middle.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    middle.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="share right", title=f"{best}, {calibration.score}")
    middle.legend()
    for far, bound in summary["risk_bounds"].items():
        if bound["realised_mean"] is not None:
            mean, (low, high) = bound["realised_mean"], bound["realised_spread"]
            # Where few divisions hold a bound, rounding is all the spread there is.
            errors = [[max(mean - low, 0)], [max(high - mean, 0)]]
            right.errorbar([float(far)], [mean], yerr=errors, marker="s", color="C0", capsize=3)
        rate = bound["once"].get("realised")
        if rate:
            right.errorbar([float(far) + 0.006], [rate["value"]], spread_of([rate]), marker="o", color="C1", capsize=3)
    right.plot([0, 0.25], [0, 0.25], color="grey", linewidth=0.8)
    right.set(
        xlim=(0, 0.25), ylim=(0, 0.35), xlabel="bound on the false-accept rate", ylabel="realised on unseen items",
        title="Risk bounds (orange: the command)",
    )  # fmt: skip
