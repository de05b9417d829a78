"""What came out, for a reader with ten seconds: figures and sentences from the object that report.json holds.

A sentence claims what an exact test or two disjoint 95 % intervals carry, and otherwise says that it can be chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_rsgwm.evaluation.stats.intervals import Rate, share, wilson

LEVEL = 0.05


@dataclass(frozen=True)
class Outcome:
    """One evaluation: answers right ``before`` and ``after`` checking, and what checking did to which.

    ``mended`` and ``spoiled`` are answers right after alone and before alone; ``p_value`` is of McNemar's exact test on
    them. ``accepted`` and ``others`` are the shares right among the answers that were and were not accepted, None where
    there are none. ``time_ratio``: mean time with checking over that of the drafter alone, on ``timed`` questions.
    """

    before: Rate
    after: Rate
    mended: int
    spoiled: int
    p_value: float
    accepted: Rate | None
    others: Rate | None
    drafts: float
    time_ratio: float | None
    timed: int
    abstains: bool  # what was not accepted was not answered

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Outcome:
        """From the object that report.json holds."""
        n, alone, checked, paired = report["n"], report["drafter"], report["draft_verify"], report["paired"]
        rates = (alone["accuracy"], checked["accuracy"], checked["accept_rate"], checked["accepted_and_correct"])
        before, after, accepted, accepted_right = (round(rate["value"] * n) for rate in rates)
        times = [mode["average_latency_ms"] for mode in (alone, checked)]
        return cls(
            share(before, n),
            share(after, n),
            paired["only_second"],
            paired["only_first"],
            paired["p_value"],
            wilson(accepted_right, accepted),
            wilson(after - accepted_right, n - accepted),
            checked["average_attempts"],
            times[1] / times[0] if all(times) else None,
            checked["timed_items"],
            bool((report["metadata"].get("loop") or {}).get("abstain")),
        )

    @property
    def is_shown(self) -> bool:
        """Whether the difference between before and after is more than chance explains."""
        return self.p_value < LEVEL


def verdict(outcome: Outcome) -> str:
    """Whether checking helped: one sentence of at most 80 characters."""
    mended, spoiled = outcome.mended, outcome.spoiled
    lost = "withheld" if outcome.abstains else "spoiled"
    if not mended and not spoiled:
        return "Checking changed nothing: no answer became right, and none became wrong."
    chance = f"p {p_shown(outcome.p_value)}"
    if not outcome.is_shown:
        return f"Checking mended {answers(mended)} and {lost} {spoiled}: that can be chance ({chance})."
    if mended > spoiled:
        return f"Checking helps: it mended {answers(mended)} and {lost} {spoiled} ({chance})."
    return f"Checking costs right answers here: it {lost} {spoiled} and mended {mended} ({chance})."


def acceptance(outcome: Outcome) -> str:
    """What it tells that an answer was accepted: one sentence of at most 80 characters."""
    accepted, others = outcome.accepted, outcome.others
    if accepted is None:
        return "No answer was accepted: every score is below the threshold."
    if others is None:
        return f"All {answers(accepted.n)} were accepted; {percent(accepted)} of them are right."
    if outcome.abstains:
        return f"Of {accepted.n} accepted, {percent(accepted)} are right; {others.n} were left unanswered."
    told = f"right are {percent(accepted)} of {accepted.n} accepted answers, {percent(others)} of {others.n} others"
    if accepted.low > others.high:
        return f"Acceptance tells: {told}."
    if accepted.high < others.low:
        return f"Acceptance misleads: {told}."
    return f"{told.capitalize()}: that can be chance."


def cost(outcome: Outcome) -> str:
    """What checking costs: one sentence of at most 80 characters."""
    drafts = f"{outcome.drafts:.2f} drafts a question"
    if outcome.time_ratio is None:
        return f"Checking took {drafts}; time was not measured."
    return f"Checking took {outcome.time_ratio:.2f} × the time, {drafts} ({outcome.timed} timed)."


def percent(rate: Rate) -> str:
    """``64 %``."""
    return f"{100 * rate.value:.0f} %"


def answers(count: int) -> str:
    """``1 answer``, ``4 answers``."""
    return f"{count} answer{'' if count == 1 else 's'}"


def p_shown(value: float) -> str:
    """``= 0.013`` or ``< 0.001``."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
