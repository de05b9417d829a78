"""Two systems on the same items: exact tests, intervals of differences, corrections, and what n items can show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.evaluation.stats.bootstrap import percentile_interval, resampled

RESAMPLES = 9999
POWER, LEVEL = 0.8, 0.05


@dataclass(frozen=True)
class PairedTest:
    """Two systems on the same items: how often only one of them is right, and the exact two-sided p-value."""

    n: int
    only_first: int
    only_second: int
    difference: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values by field."""
        return asdict(self)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Exact McNemar test; ``difference`` is the accuracy of ``second`` minus that of ``first``.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    from scipy.stats import binomtest

    if len(first) != len(second) or not first:
        raise ValueError(f"paired results must have one length above 0, found {len(first)} and {len(second)}")
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return PairedTest(len(first), only_first, only_second, (only_second - only_first) / len(first), p_value)


@dataclass(frozen=True)
class Difference:
    """A difference (second minus first) with its 95 % interval over items and, where one was made, a p-value."""

    value: float
    low: float
    high: float
    n: int
    p_value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values by field."""
        return asdict(self)


def paired_bootstrap(
    first: Sequence[Any],
    second: Sequence[Any],
    statistic: Callable[[Sequence[Any]], float | None],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Difference | None:
    """Difference of any statistic of two systems, resampling items: both always see the same ones.

    For what McNemar's test cannot compare, such as false-accept rates, whose denominators differ. None where the
    statistic is None for either system.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired results must have one length above 0, found {len(first)} and {len(second)}")

    def of(chosen: np.ndarray) -> float:
        values = [statistic([rows[index] for index in chosen]) for rows in (first, second)]
        return float("nan") if values[0] is None or values[1] is None else values[1] - values[0]

    everything = np.arange(len(first))
    estimate = of(everything)
    if math.isnan(estimate):
        return None
    if len(first) < 2:
        return Difference(estimate, -1.0, 1.0, len(first))
    return Difference(estimate, *percentile_interval(resampled(of, len(first), seed, resamples)), len(first))


def mean_difference(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> Difference:
    """Mean paired difference of per-item values (several seeds averaged): bootstrap interval, sign-flip permutation p.

    Args:
        first, second: (items,) or (items, seeds), float64; seeds are averaged within an item, which stays one unit.
    """
    from scipy.stats import bootstrap, permutation_test

    first, second = (np.asarray(rows, dtype=np.float64) for rows in (first, second))
    gaps = (second - first).reshape(len(first), -1).mean(axis=1)
    estimate = float(gaps.mean())
    if len(gaps) < 2 or not gaps.any():
        return Difference(estimate, min(estimate, 0.0), max(estimate, 0.0), len(gaps), 1.0)
    interval = bootstrap(
        (gaps,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    p_value = permutation_test(
        (gaps,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    ).pvalue
    return Difference(estimate, float(interval.low), float(interval.high), len(gaps), float(p_value))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) of several p-values, in their order: the i-th smallest of m, times m - i + 1.

    None falls below a smaller one's, nor rises above 1.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    return [float(value) for value in corrected]


def smallest_difference(n: int, discordant_share: float) -> float | None:
    """The smallest accuracy difference that McNemar's test shows at 5 % with 80 % power on ``n`` items.

    By Connor (1987): sqrt(n) d = z_(1-a/2) sqrt(q) + z_power sqrt(q - d²) with q the share of items on which the two
    systems differ. None where even a difference as large as q would not be shown.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    level, power, share = norm.ppf(1 - LEVEL / 2), norm.ppf(POWER), discordant_share

    def short(gap: float) -> float:
        return float(math.sqrt(n) * gap - level * math.sqrt(share) - power * math.sqrt(max(share - gap * gap, 0.0)))

    if share <= 0 or short(share) < 0:
        return None
    return float(brentq(short, 0.0, share))


def fewest_discordant() -> int:
    """How many items, all in one system's favour, the exact test needs for p < .05 whatever n is."""
    return next(count for count in range(1, 64) if 2 * 0.5**count < LEVEL)
