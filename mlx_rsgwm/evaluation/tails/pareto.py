"""The generalised Pareto distribution of excesses over a threshold: many fits at once, their goodness, power.

``P(Y > y) = (1 + ξ y / σ)^(−1/ξ)``, exp(−y / σ) at ξ = 0 (Pickands 1975; Balkema and de Haan 1974). Maximum likelihood
by its profile in θ = ξ / σ (Grimshaw 1993): for every θ the best ξ is the mean of log(1 + θ y), so that one number is
searched and resamples are rows of one array. ``scipy.stats.genpareto.fit`` finds the same, one sample at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Below this |ξ| the distribution counts as the exponential.
NEAR_ZERO = 1e-6
# ξ is searched above −1: below it the likelihood has no maximum.
GRID, REFINEMENTS = 40, 36
CHUNK = 1 << 22  # entries of one block of samples
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class ParetoFits:
    """Of B samples the shapes ξ and scales σ, (B,) float64 each; NaN where a sample has no spread."""

    shapes: np.ndarray
    scales: np.ndarray


def fit(excesses: np.ndarray) -> ParetoFits:
    """Maximum-likelihood fits of samples (B, n), all values ≥ 0."""
    rows = max(1, CHUNK // max(excesses.shape[1], 1))
    parts = [_fit(excesses[start : start + rows]) for start in range(0, len(excesses), rows)]
    return ParetoFits(*(np.concatenate([part[index] for part in parts]) for index in range(2)))


def _fit(excesses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    medians, means = np.median(excesses, axis=1), excesses.mean(axis=1)
    usable = means > 0
    # By the median: of a heavy tail the mean may be anything.
    units = np.where(medians > 0, medians, np.where(usable, means, 1.0))
    scaled = np.where(usable[:, None], excesses / units[:, None], 1.0)
    largest, mean = scaled.max(axis=1), scaled.mean(axis=1)
    exponential = -np.log(mean) - 1  # the likelihood at θ = 0

    def theta(place: np.ndarray) -> np.ndarray:
        """θ of a place in [0, 1]: −1 / largest at 0, 0 at one half, far up at 1."""
        below = -(1 - 2 * place) / largest
        return np.where(place < 0.5, below, (2 * place - 1) / np.maximum(2 - 2 * place, 1e-9))

    def likelihood(place: np.ndarray) -> np.ndarray:
        at = theta(place)
        shape = np.log1p(np.maximum(at[:, None] * scaled, -1 + 1e-12)).mean(axis=1)
        near = np.abs(at) < NEAR_ZERO
        safe = np.where(near, 1.0, at)
        value = np.where(near, exponential, -np.log(np.where(near, 1.0, shape / safe)) - shape - 1)
        return np.where(shape > -1, value, -np.inf)

    grid = np.linspace(1e-3, 1 - 1e-3, GRID)
    values = np.stack([likelihood(np.full(len(scaled), place)) for place in grid], axis=1)
    best = np.clip(values.argmax(axis=1), 1, GRID - 2)
    low, high = grid[best - 1], grid[best + 1]
    for _ in range(REFINEMENTS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        above = likelihood(left) >= likelihood(right)
        low, high = np.where(above, low, left), np.where(above, right, high)
    at = theta((low + high) / 2)
    shapes = np.log1p(np.maximum(at[:, None] * scaled, -1 + 1e-12)).mean(axis=1)
    near = np.abs(at) < NEAR_ZERO
    scales = np.where(near, mean, shapes / np.where(near, 1.0, at)) * units
    return np.where(usable, np.where(near, 0.0, shapes), np.nan), np.where(usable, scales, np.nan)


def standard_error(shape: float, count: int) -> float:
    """Of a fitted ξ from ``count`` excesses, (1 + ξ) / √n (Smith 1987); what it is at ξ > −1/2."""
    return (1 + max(shape, -0.5)) / math.sqrt(count)


def needed(effect: float, shape: float = 0.0, level: float = 0.05, power: float = 0.8) -> int:
    """Excesses of each of two arms with which a difference of ``effect`` in ξ is found with ``power`` at ``level``:
    2 (z₁₋α/₂ + z_power)² (1 + ξ)² / effect².
    """
    from scipy.stats import norm

    sum_of_quantiles = norm.ppf(1 - level / 2) + norm.ppf(power)
    return math.ceil(2 * (sum_of_quantiles * (1 + shape) / effect) ** 2)


def draw(shape: float, scale: float, size: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Excesses from the distribution."""
    exponential = random.exponential(size=size)
    return scale * (exponential if abs(shape) < NEAR_ZERO else np.expm1(shape * exponential) / shape)


def distribution(excesses: np.ndarray, shapes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """P(Y ≤ y) of samples (B, n) under their fits (B,)."""
    shape, ratio = shapes[:, None], excesses / scales[:, None]
    near = np.abs(shape) < NEAR_ZERO
    safe = np.where(near, 1.0, shape)
    inside = np.maximum(1 + safe * ratio, 1e-300)
    return np.where(near, -np.expm1(-ratio), -np.expm1(-np.log(inside) / safe))


def distances(excesses: np.ndarray, fits: ParetoFits) -> tuple[np.ndarray, np.ndarray]:
    """Anderson–Darling's A² and Cramér–von Mises' W² of samples (B, n) to their fits, (B,) each."""
    count = excesses.shape[1]
    chances = np.sort(distribution(excesses, fits.shapes, fits.scales), axis=1)
    chances = np.clip(chances, 1e-12, 1 - 1e-12)
    ranks = (2 * np.arange(1, count + 1) - 1) / (2 * count)
    darling = -count - 2 * (ranks * (np.log(chances) + np.log1p(-chances[:, ::-1]))).sum(axis=1)
    mises = 1 / (12 * count) + ((chances - ranks) ** 2).sum(axis=1)
    return darling, mises


@dataclass(frozen=True)
class GoodnessOfFit:
    """p-values of the two distances: the share of samples drawn from the fit, and fitted anew, that are as far off."""

    anderson_darling: float
    cramer_von_mises: float


def goodness_of_fit(excesses: np.ndarray, seed: int, resamples: int) -> GoodnessOfFit:
    """Of one sample (n,), by parametric bootstrap with refit (Choulakian and Stephens 2001 tabulate the same)."""
    first = fit(excesses[None])
    random = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(excesses))
    farther = np.ones(2)
    observed = np.array(distances(excesses[None], first))
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), len(excesses))
        drawn = draw(float(first.shapes[0]), float(first.scales[0]), size, random)
        farther += (np.array(distances(drawn, fit(drawn))) >= observed).sum(axis=1)
    return GoodnessOfFit(*(farther / (resamples + 1)))
