"""Weights of a run's checkpoints for their average, from losses or steps (MWA, arXiv 2504.18580; docs/methods.md).

The paper's formula of the loss is p^rank / loss; ``power`` generalises it, and that of the steps is read likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_rsgwm.core.errors import raise_problems, range_problems

METRICS = ("loss", "train-loss", "validation-loss", "steps")
SPACES = ("factor", "product")
SMALLEST_LOSS = 1e-8  # a loss of 0 would have all the weight there is
FEW_EFFECTIVE = 2.0


@dataclass(frozen=True)
class AverageOptions:
    """What is averaged and how: ``penalty`` is p in (0, 1], ``power`` q from 0; p = 1 and q = 0 are the uniform mean.

    ``metric`` loss is the validation loss where every checkpoint has it, else the training loss since the checkpoint
    before. ``last`` takes the newest so many, 0 all. ``space``: the mean of the factors, or of the products.
    """

    metric: str = "loss"
    penalty: float = 0.7
    power: float = 1.0
    last: int = 0
    space: str = "factor"

    def __post_init__(self) -> None:
        rules = {
            "metric": (self.metric in METRICS, f"of {', '.join(METRICS)}"),
            "penalty": (0 < self.penalty <= 1, "in (0, 1]"),
            "power": (0 <= self.power < float("inf"), "a finite number from 0"),
            "last": (self.last == 0 or self.last >= 2, "0 (all) or at least 2"),
            "space": (self.space in SPACES, f"of {', '.join(SPACES)}"),
        }
        raise_problems("average", range_problems(self, rules))


def average_ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """0-based ranks from the lowest value, (n,) float64; equal values share the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    equal = (array[None, :] == array[:, None]).sum(axis=1)
    return np.asarray(below + (equal - 1) / 2)


def loss_weights(losses: Sequence[float], penalty: float, power: float) -> np.ndarray:
    """w_x ∝ p^rank(ℓ_x) · (1 / ℓ_x)^q, (n,) float64 that sum to 1; the lowest loss has rank 0."""
    floored = np.maximum(np.asarray(losses, dtype=np.float64), SMALLEST_LOSS)
    # Divided by the least loss, which changes no share: a large q would leave the range of numbers.
    return _shares(_factors(losses, penalty) * (floored.min() / floored) ** power)


def step_weights(steps: Sequence[int], penalty: float, power: float) -> np.ndarray:
    """w_x ∝ p^rank · (s_x / s_max)^q, (n,) float64 that sum to 1; the latest step has rank 0."""
    array = np.asarray(steps, dtype=np.float64)
    return _shares(_factors(-array, penalty) * (array / array.max()) ** power)


def effective_count(weights: np.ndarray) -> float:
    """(Σ w)² / Σ w²: of how many equally weighted checkpoints the average is worth."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def _factors(values: Sequence[float] | np.ndarray, penalty: float) -> np.ndarray:
    """p^rank, from the least rank, which changes no share: ties at the best and a tiny p would all be 0."""
    ranks = average_ranks(values)
    return np.asarray(penalty ** (ranks - ranks.min()))


def _shares(weights: np.ndarray) -> np.ndarray:
    return np.asarray(weights / weights.sum())
