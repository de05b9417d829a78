"""What a run tells of its course: one line a step, one a held-out score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepLoss:
    """One line of the loss history: mean loss in nats per trained token of the step's rows."""

    step: int
    role: str
    loss: float
    trained_tokens: int


@dataclass(frozen=True)
class Score:
    """Held-out loss in nats per trained token after a step, over all rows and by role."""

    step: int
    loss: float
    by_role: dict[str, float]


def mean_loss(steps: Sequence[StepLoss]) -> float | None:
    """Mean loss in nats per trained token over ``steps``; None without any."""
    tokens = sum(step.trained_tokens for step in steps)
    return sum(step.loss * step.trained_tokens for step in steps) / tokens if tokens else None
