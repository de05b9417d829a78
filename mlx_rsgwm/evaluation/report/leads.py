"""The sentence that stands above each table of the report's page: what to see in it, in the run's own figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Summary = Mapping[str, Any]


def lead(title: str, summary: Summary) -> str:
    """The sentence for the table of this title (of sampling seeds: whichever they are)."""
    return LEADS[title.split(" seeds ")[0]](summary)


def _share(rate: Mapping[str, float] | None) -> str:
    return "an unknown share" if rate is None else f"{100 * rate['value']:.0f} %"


def _main(summary: Summary) -> str:
    alone, checked = (_share(summary[mode]["accuracy"]) for mode in ("drafter", "draft_verify"))
    return (
        f"Of {summary['n']} questions the drafter alone answers {alone} right, with checking {checked}; the brackets "
        "here and below are 95 % intervals."
    )


def _arithmetic(summary: Summary) -> str:
    checked, alone = (_share(summary[name]["accuracy"]) for name in ("draft_verify_arithmetic", "calculator"))
    return (
        f"Where drafts that state a false equation are rejected, too, {checked} are right; with such a calculator and "
        f"no verifier {alone}."
    )


def _beside(summary: Summary) -> str:
    about = summary["metadata"]["beside"]
    this, other = (_share(report["draft_verify"]["accuracy"]) for report in (summary, about["report"]))
    return (
        f"{about['this'].capitalize()}: {this} right; {about['other']}: {other}. No other table here has its figures."
    )


def _families(summary: Summary) -> str:
    def gap(task: str) -> float:
        rates = summary["by_task"][task]
        return float(rates["draft_verify"]["value"] - rates["drafter"]["value"])

    task = max(summary["by_task"], key=lambda name: abs(gap(name)))
    rates = summary["by_task"][task]
    return (
        f"The largest difference is on {task}: {_share(rates['drafter'])} right before checking, "
        f"{_share(rates['draft_verify'])} after, of {rates['drafter']['n']} questions."
    )


def _verifier(summary: Summary) -> str:
    area = summary["verifier"][summary["score"]]["all"]["auroc"]
    if area is None:
        return f"How well {summary['score']} tells right drafts from wrong ones cannot be said: all are alike."
    return (
        f"Of a right and a wrong draft, {summary['score']} scores the right one higher in {_share(area)} of all pairs "
        "(AUROC of all drafts); guessing does in 50 %."
    )


def _ceiling(summary: Summary) -> str:
    oracle, k = summary["oracle"], summary["k"]
    if oracle["any_of_k"] is None:
        return f"What a perfect verifier could reach is not known: not every question has {k} drafts."
    return (
        f"A verifier that never errs would reach {_share(oracle['any_of_k'])}, for so often one of {k} drafts is "
        f"right; a majority vote over them reaches {_share(oracle['majority_of_k'])}."
    )


def _calculator(summary: Summary) -> str:
    told = summary["calculator_passed"]
    return (
        f"A calculator passes {_share(told['passing_wrong'])} of the wrong drafts and "
        f"{_share(told['passing_right'])} of the right ones; the rows below choose among what it passes."
    )


def _readings(summary: Summary) -> str:
    shares = sorted(modes["draft_verify"]["accuracy"]["value"] for modes in summary["readings"].values())
    if shares[0] == shares[-1]:
        return "However the answer is read out of a draft, as many are right after checking."
    low, high = (f"{100 * value:.0f} %" for value in (shares[0], shares[-1]))
    return f"By how the answer is read out of a draft, {low} to {high} are right after checking."


def _several(summary: Summary) -> str:
    rates = list(summary["pass_at_k"].values())
    return f"One draft is right in {_share(rates[0])} of cases, at least one of {len(rates)} in {_share(rates[-1])}."


def _seeds(summary: Summary) -> str:
    shares = sorted(summary["seeds"]["draft_verify"]["accuracy"]["values"])
    low, high = (f"{100 * value:.0f} %" for value in (shares[0], shares[-1]))
    return f"With other random numbers the same questions come out at {low} to {high} right after checking."


LEADS: Mapping[str, Callable[[Summary], str]] = {
    "Draft–verify against the drafter alone": _main,
    "With arithmetic checked": _arithmetic,
    "With and without more training": _beside,
    "Families": _families,
    "Verifier": _verifier,
    "Ceiling": _ceiling,
    "Drafts without a false equation (passed by a calculator)": _calculator,
    "The same drafts by other extractors": _readings,
    "Several drafts": _several,
    "Sampling": _seeds,
}
