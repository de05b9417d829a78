"""The bootstrap of every interval here: SciPy's resampling, percentile limits, items that are resampled together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import numpy as np


def resampled(statistic: Callable[[np.ndarray], float], n: int, seed: int, resamples: int) -> np.ndarray:
    """The bootstrap distribution of a statistic of ``n`` positions: (resamples,) float64, but where it is NaN."""
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample without one of the classes is foreseen
        drawn: np.ndarray = bootstrap(
            (np.arange(n),),
            statistic,
            n_resamples=resamples,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    return drawn[~np.isnan(drawn)]


def percentile_interval(drawn: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values (resamples,): its lower and upper end."""
    low, high = np.quantile(np.asarray(drawn), [0.025, 0.975])
    return float(low), float(high)


def gatherer(blocks: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A function from drawn blocks (n,) to the positions of their members (m,), block by block; both integers."""
    if len({len(block) for block in blocks}) == 1:  # as many drafts of each item: one look-up, twenty times faster
        table = np.stack(blocks)
        return lambda drawn: table[drawn].reshape(-1)
    return lambda drawn: np.concatenate([blocks[index] for index in drawn])


def blocks_of(groups: Sequence[Hashable]) -> list[np.ndarray]:
    """Positions (m,) of each group's members, in order of first appearance: what is resampled together."""
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(groups):
        members.setdefault(key, []).append(index)
    return [np.asarray(block) for block in members.values()]
