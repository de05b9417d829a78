"""The paper's three tables as printed, and the arithmetic that they violate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_rsgwm.evaluation.metrics import identity_problems


@dataclass(frozen=True)
class PaperRow:
    """One column of Table 1 or one row of Tables 2 and 3; None for what the paper does not print.

    ``n`` items; ``latency_ms`` the mean; ``items_per_minute`` as printed.
    """

    name: str
    n: int
    accuracy: float
    accept_rate: float
    average_attempts: float
    latency_ms: float
    hallucination_rate: float | None = None
    accepted_and_correct: float | None = None
    false_accept_rate: float | None = None
    items_per_minute: float | None = None


TABLES: Mapping[int, tuple[PaperRow, ...]] = {
    1: (
        PaperRow("Single-GWM", 100, 0.72, 0.82, 1.42, 2104.87, 0.18, 0.70, 0.0244, 27.43),
        PaperRow("GWM-DV-V2", 100, 0.84, 0.87, 1.61, 3284.51, 0.10, 0.82, 0.0115, 17.59),
    ),
    2: (
        PaperRow("τ 0.7 (default)", 20, 0.80, 0.85, 1.50, 3050.18, false_accept_rate=0.0),
        PaperRow("τ 0.5 (smoke)", 20, 0.80, 0.95, 1.20, 2502.42, false_accept_rate=0.1579),
        PaperRow("τ 0.5 (aligned prompts)", 20, 0.85, 0.95, 1.20, 2418.73, false_accept_rate=0.1053),
    ),
    3: (
        PaperRow("default", 20, 0.80, 0.85, 1.50, 3050.18, hallucination_rate=0.10),
        PaperRow("balanced", 20, 0.80, 0.85, 1.55, 3120.48, hallucination_rate=0.10),
        PaperRow("phase-2 prompts", 20, 0.85, 0.90, 1.45, 2987.21, hallucination_rate=0.10),
    ),
}

TITLES = {
    1: "Table 1: the drafter by itself and draft–verify",
    2: "Table 2: threshold and prompt alignment",
    3: "Table 3: training mixture and prompts",
}

ROUNDING = 0.005  # the paper prints rates to two digits


def arithmetic_problems(row: PaperRow) -> list[str]:
    """What cannot be true of a printed row, each as one sentence with the figures."""
    problems = []
    if row.accepted_and_correct is not None and row.false_accept_rate is not None:
        expected = 1 - row.accepted_and_correct / row.accept_rate
        if identity_problems(
            row.accuracy,
            row.hallucination_rate or 0.0,
            1 - row.accuracy - (row.hallucination_rate or 0.0),
            row.accept_rate,
            row.accepted_and_correct,
            row.false_accept_rate,
        ):
            accepted, right = row.n * row.accept_rate, row.n * row.accepted_and_correct
            problems.append(
                f"{row.name}: by the paper's own definition the false-accept rate is 1 - "
                f"{row.accepted_and_correct:.2f}/{row.accept_rate:.2f} = {expected:.4f}; "
                f"{row.false_accept_rate:.4f} is {row.false_accept_rate * accepted:.0f} of {accepted:.0f}, and "
                f"{accepted - right:.0f} accepted answers were wrong (possible only if refusals are left out of the "
                "numerator)"
            )
    if row.false_accept_rate is not None and row.accepted_and_correct is None:
        least = row.accept_rate * (1 - row.false_accept_rate)
        if row.accuracy < least - ROUNDING:
            problems.append(
                f"{row.name}: an accept rate of {row.accept_rate:.2f} with {row.false_accept_rate:.4f} false accepts "
                f"makes at least {least:.2f} of the answers right, more than the {row.accuracy:.2f} printed "
                "(possible only for medians over seeds taken row by row)"
            )
    if row.items_per_minute is not None:
        implied = 60000 / row.latency_ms
        if abs(implied - row.items_per_minute) / implied > 0.01:
            problems.append(
                f"{row.name}: 60000 / {row.latency_ms} ms is {implied:.2f} items/min, not {row.items_per_minute}"
            )
    if row.hallucination_rate is not None:
        refused = 1 - row.accuracy - row.hallucination_rate
        if refused > ROUNDING:
            problems.append(
                f"{row.name}: accuracy and hallucination rate leave {refused:.2f} for refusals, which the paper "
                "does not define"
            )
    return problems


def _corrected(row: PaperRow) -> float:
    return 1 - (row.accepted_and_correct or 0.0) / row.accept_rate


def footnotes(table: int) -> list[str]:
    """Every violated identity of a table, and what its comparison of rows gets wrong."""
    notes = [problem for row in TABLES[table] for problem in arithmetic_problems(row)]
    if table == 1:
        single, pair = TABLES[1]
        drop = 1 - _corrected(pair) / _corrected(single)
        notes.append(
            f"with the corrected rates false accepts fall by {drop:.0%}, not by the 53 % the paper states; "
            "eight rows stand in the table, the text says seven"
        )
        notes.append(
            "Single-GWM has an accept rate and 1.42 attempts, so it is no drafter alone: read here as the drafter that "
            "verifies itself in the same loop"
        )
    if table == 2:
        notes.append(
            "the largest swing of the false-accept rate is the threshold's (0.158), not that of prompt alignment "
            "(0.053)"
        )
    n = TABLES[table][0].n
    notes.append(f"n = {n}: the paper prints no interval; those beside its accuracies are Wilson's, 95 %")
    return notes
