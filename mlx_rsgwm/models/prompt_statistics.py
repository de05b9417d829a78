"""``prompt_states.safetensors``: mean and covariance of a task's prompt states, by which a pool is routed without rows.

Training keeps them of a sample of the questions that it was given. The file has no row and no state of any single
question; float32::

    mean    (dims,)       of the states (:mod:`~.prompt_states`)
    factor  (rank, dims)  the leading part of their covariance is factorᵀ factor
    rest    (dims,)       what that lacks of each variance

``shrinkage`` in the metadata is the share of the covariance that gives way to its diagonal (Ledoit and Wolf, 2004), for
which all states are needed. ``questions`` counts these; ``layer``, ``base`` and ``template`` say what made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.models.adapter import PROMPT_STATES_FILE, Adapter

FORMAT = "mlx-rsgwm/prompt-states"
LEAST = 5  # questions of a task, as a router takes
MOST_RANK = 32


@dataclass(frozen=True)
class PromptStatistics:
    """``mean`` and ``rest`` (dims,), ``factor`` (rank, dims), float64; see the module."""

    mean: np.ndarray
    factor: np.ndarray
    rest: np.ndarray
    shrinkage: float
    questions: int
    layer: int
    base: str
    template: str

    @classmethod
    def of_states(
        cls, states: np.ndarray, layer: int, base: str, template: str, most_rank: int | None = None
    ) -> PromptStatistics:
        """Those of states (n, dims) after ``layer`` layers of the base with fingerprint ``base``.

        The rank is at most ``most_rank``; without one 32 and half of n, as from all n directions the states themselves
        could be had back, but for a rotation.

        Raises:
            RsgwmError: fewer than 5 states, or values that are not finite.
        """
        count = len(states)
        if count < LEAST:
            raise RsgwmError(f"prompt states are kept of at least {LEAST} questions, found {count}")
        if not np.isfinite(states).all():
            raise RsgwmError("the states of these prompts are not finite")
        rank = min(MOST_RANK, count // 2) if most_rank is None else min(most_rank, count)
        mean, scales = states.mean(axis=0), states.std(axis=0)
        # Leading in units of each dimension's own spread: a few dimensions are a hundred times as wide as others.
        standard = (states - mean) / np.where(scales > 0, scales, 1.0)
        _, vectors = np.linalg.eigh(standard @ standard.T)
        factor = vectors[:, ::-1][:, :rank].T @ standard * scales / count**0.5
        rest = np.maximum(scales**2 - (factor**2).sum(axis=0), 0.0)
        return cls(mean, factor, rest, ledoit_wolf(standard), count, layer, base, template)

    def covariance(self) -> np.ndarray:
        """(dims, dims): shrunk towards its diagonal, which stays."""
        leading = (1 - self.shrinkage) * self.factor.T @ self.factor
        leading[np.diag_indices_from(leading)] = self.rest + (self.factor**2).sum(axis=0)
        return leading

    def arrays(self) -> dict[str, mx.array]:
        """What the file holds."""
        arrays = {"mean": self.mean, "factor": self.factor, "rest": self.rest}
        return {name: mx.array(value.astype(np.float32)) for name, value in arrays.items()}

    def metadata(self) -> dict[str, str]:
        """What the file says of them."""
        told = {"questions": self.questions, "layer": self.layer, "shrinkage": self.shrinkage}
        about = {"kind": FORMAT, "base": self.base, "template": self.template}
        return about | {name: str(value) for name, value in told.items()}


def statistics_of_pool(adapters: Sequence[Adapter]) -> dict[str, PromptStatistics]:
    """What each adapter has beside its weights, by the adapters' names.

    Raises:
        AdapterError: it is damaged, or of another base than the adapter's.
        RsgwmError: adapters that have none (says which).
    """
    without = ", ".join(adapter.name for adapter in adapters if not adapter.prompt_states)
    if without:
        raise RsgwmError(f"no prompt states beside {without}; training on a corpus keeps them now; give --corpus")
    pool = {}
    for adapter in adapters:
        statistics = _read(adapter.prompt_states, adapter.prompt_states_metadata, adapter.where)
        if adapter.base_fingerprint not in (None, statistics.base):
            raise AdapterError(f"{adapter.where}: its {PROMPT_STATES_FILE} is of another base than the adapter's")
        pool[adapter.name] = statistics
    return pool


def _read(arrays: Mapping[str, mx.array], metadata: Mapping[str, str], where: str) -> PromptStatistics:
    """Raises AdapterError where the arrays cannot be a mean and a covariance, or the metadata is damaged."""
    try:
        if set(arrays) != {"mean", "factor", "rest"} or metadata["kind"] != FORMAT:
            raise ValueError
        mean, factor, rest = (np.array(arrays[name]).astype(np.float64) for name in ("mean", "factor", "rest"))
        statistics = PromptStatistics(
            mean,
            factor,
            rest,
            float(metadata["shrinkage"]),
            int(metadata["questions"]),
            int(metadata["layer"]),
            metadata["base"],
            metadata["template"],
        )
    except (KeyError, ValueError):
        raise AdapterError(f"{where}: its {PROMPT_STATES_FILE} is damaged") from None
    shaped = mean.ndim == 1 and len(mean) and factor.ndim == 2 and factor.shape[1:] == rest.shape == mean.shape
    finite = shaped and bool(np.isfinite(mean).all() and np.isfinite(factor).all() and np.isfinite(rest).all())
    finite = finite and all(array.dtype == mx.float32 for array in arrays.values())
    counted = 0 <= statistics.shrinkage <= 1 and statistics.questions >= LEAST and statistics.layer >= 1
    if not (finite and counted and rest.min() >= 0):
        raise AdapterError(f"{where}: its {PROMPT_STATES_FILE} is damaged: no mean and covariance of prompt states")
    return statistics


def ledoit_wolf(standard: np.ndarray) -> float:
    """The share of the covariance of centred rows (n, dims) that shrinks to a multiple of the identity, in [0, 1].

    As scikit-learn's ``ledoit_wolf_shrinkage``, from the (n, n) products of rows alone.
    """
    count, dims = standard.shape
    products = standard @ standard.T
    mean_variance = np.trace(products) / (count * dims)
    squared = (products**2).sum() / count**2
    noise = ((np.diag(products) ** 2).sum() / count - squared) / (count * dims)
    distance = (squared - dims * mean_variance**2) / dims
    return float(min(noise, distance) / distance) if min(noise, distance) > 0 else 0.0
