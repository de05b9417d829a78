"""The learning rates of an ``lr_schedule`` of mlx-lm, step for step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_rsgwm.core.errors import raise_problems

# Numbers that each of MLX's schedules takes: fewest and most.
SCHEDULES = {"cosine_decay": (2, 3), "linear_schedule": (3, 3), "exponential_decay": (2, 2), "step_decay": (3, 3)}


@dataclass(frozen=True)
class RateSchedule:
    """One of MLX's schedules with its arguments, after a linear warm-up of ``warmup`` steps from ``warmup_init``.

    ``cosine_decay`` takes (rate, steps, end), ``linear_schedule`` (rate, end, steps), ``exponential_decay`` (rate,
    factor), ``step_decay`` (rate, factor, steps). A schedule shorter than the run stays at its end; of a longer one the
    run sees the beginning.
    """

    name: str
    arguments: tuple[float, ...]
    warmup: int = 0
    warmup_init: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.name not in SCHEDULES:
            problems.append(f"name {self.name!r} is unknown; there are {', '.join(SCHEDULES)}")
        else:
            fewest, most = SCHEDULES[self.name]
            if not fewest <= len(self.arguments) <= most:
                problems.append(f"{self.name} takes {fewest} to {most} arguments, found {len(self.arguments)}")
            elif not all(0 <= number < math.inf for number in self.arguments) or not 0 <= self.arguments[0] < 1:
                problems.append(f"arguments {list(self.arguments)} are out of range")
            elif self.name != "exponential_decay" and (self.length < 1 or self.length % 1):
                problems.append(f"{self.name} lasts {self.length:g} steps; it must be a whole number from 1")
        if self.warmup < 0:
            problems.append(f"warmup is {self.warmup}; it must be 0 or more")
        if not 0 <= self.warmup_init < 1:
            problems.append(f"warmup_init is {self.warmup_init}; it must be a rate")
        raise_problems("lr_schedule", problems)

    @property
    def length(self) -> float:
        """Steps that the decay takes (a stage of it, for ``step_decay``)."""
        return self.arguments[1 if self.name == "cosine_decay" else 2]

    def rate(self, step: int) -> float:
        """Learning rate of 0-based ``step``; as mlx_lm.lora, the decay begins one step after the warm-up has ended."""
        rate = self.arguments[0]
        if self.warmup and step <= self.warmup:
            return self.warmup_init + step * (rate - self.warmup_init) / self.warmup
        step -= self.warmup + 1 if self.warmup else 0
        if self.name == "cosine_decay":
            end = self.arguments[2] if len(self.arguments) == 3 else 0.0
            share = min(step, self.length) / self.length
            return end + 0.5 * (1 + math.cos(math.pi * share)) * (rate - end)
        if self.name == "linear_schedule":
            return rate + min(step, self.length) * (self.arguments[1] - rate) / self.length
        if self.name == "step_decay":
            return float(rate * self.arguments[1] ** (step // self.length))
        return float(rate * self.arguments[1] ** step)
