"""Two adapters module by module: do they write to the same directions, the same way, at the same size?

After "From Diagnosis to Guarded Repair" and gradience 0.11 (``merge/spectral_compat.py``), in float64. gradience's
left singular vectors, of a weight stored as (out, in), are here the ``outputs`` of a weight stored as (in, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, log, sqrt
from typing import Any

import numpy as np

from mlx_rsgwm.audit.verdicts import CONFLICTING, Thresholds, Verdict, verdict_of, worst
from mlx_rsgwm.linalg.spectrum import Decomposed, energy_rank, principal_cosines, random_overlap

ENERGY = 0.90
# Norms up to this are no update (gradience's eps).
NOTHING = 1e-12


@dataclass(frozen=True)
class ModulePair:
    """What two adapters, a and b, do to one module.

    ``cosines``: of the principal angles between their output subspaces, each cut to ``energy_ranks`` directions;
    ``mean_input_overlap`` the same of their inputs. ``agreement``: the cosine between a's singular values and what b
    does along a's singular directions, in [−1, 1]; ``agreement_back``: with a and b exchanged. ``cosine``: between the
    updates. ``random``: the overlap of random subspaces of these dimensions.
    """

    name: str
    ranks: tuple[int, int]
    energy_ranks: tuple[int, int]
    norms: tuple[float, float]
    largest: tuple[float, float]
    stable_ranks: tuple[float, float]
    cosines: tuple[float, ...]
    mean_input_overlap: float
    agreement: float
    agreement_back: float
    cosine: float
    random: float
    verdict: Verdict

    @property
    def mean_overlap(self) -> float:
        """Mean of ``cosines``, in [0, 1]."""
        return sum(self.cosines) / len(self.cosines)

    @property
    def max_overlap(self) -> float:
        """Largest of ``cosines``."""
        return max(self.cosines)

    @property
    def mean_agreement(self) -> float:
        """Agreement both ways."""
        return (self.agreement + self.agreement_back) / 2

    @property
    def magnitude_ratio(self) -> float:
        """Of the largest singular values, the larger over the smaller."""
        return _ratio(self.largest)

    @property
    def frobenius_ratio(self) -> float:
        """Of the norms, the larger over the smaller."""
        return _ratio(self.norms)

    def conflicts(self, thresholds: Thresholds) -> int:
        """Shared directions of a module whose adapters oppose each other; 0 of any other."""
        if self.verdict.name != CONFLICTING:
            return 0
        return sum(cosine > thresholds.high for cosine in self.cosines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "verdict": self.verdict.name,
            "confidence": self.verdict.confidence,
            "risk": self.verdict.risk,
            "mean_overlap": self.mean_overlap,
            "max_overlap": self.max_overlap,
            "random_overlap": self.random,
            "mean_input_overlap": self.mean_input_overlap,
            "agreement": self.agreement,
            "agreement_back": self.agreement_back,
            "mean_agreement": self.mean_agreement,
            "cosine": self.cosine,
            "magnitude_ratio": _finite(self.magnitude_ratio),
            "magnitude_bounded_ratio": _bounded(self.largest),
            "magnitude_log_ratio": _log_ratio(self.largest),
            "frobenius_ratio": _finite(self.frobenius_ratio),
            "frobenius_bounded_ratio": _bounded(self.norms),
            "frobenius_log_ratio": _log_ratio(self.norms),
            "norms": list(self.norms),
            "ranks": list(self.ranks),
            "energy_ranks": list(self.energy_ranks),
            "stable_ranks": list(self.stable_ranks),
            "principal_cosines": list(self.cosines),
        }


@dataclass(frozen=True)
class PairAudit:
    """Two adapters of a pool, by their positions, and the modules that both adapt; ``norms``: over all of those."""

    first: int
    second: int
    modules: tuple[ModulePair, ...]

    @cached_property
    def verdict(self) -> str:
        """The worst of the modules'."""
        return worst([module.verdict.name for module in self.modules])

    @property
    def risk(self) -> str:
        """Of the module whose verdict is the pair's: high if any of those is."""
        risks = {module.verdict.risk for module in self.modules if module.verdict.name == self.verdict}
        return "high" if "high" in risks else "medium" if "medium" in risks else "low"

    @property
    def norms(self) -> tuple[float, float]:
        """Both adapters' ‖·‖_F over the modules that they share."""
        squares = np.square([module.norms for module in self.modules]).sum(axis=0)
        return float(np.sqrt(squares[0])), float(np.sqrt(squares[1]))

    @property
    def frobenius_ratio(self) -> float:
        """Of ``norms``, the larger over the smaller."""
        return _ratio(self.norms)

    @property
    def mean_overlap(self) -> float:
        """Mean over modules weighted by the larger norm; gradience's ``compatibility_score``, where high is bad."""
        weights = np.array([max(module.norms) for module in self.modules])
        overlaps = np.array([module.mean_overlap for module in self.modules])
        return float((weights * overlaps).sum() / weights.sum()) if weights.sum() else 0.0

    @property
    def cosine(self) -> float:
        """Between the updates over all modules."""
        return _cosine(sum(module.cosine * module.norms[0] * module.norms[1] for module in self.modules), *self.norms)

    def share(self, verdict: str) -> float:
        """The share of both adapters' energy that lies in modules of this verdict."""
        energies = np.array([module.norms[0] ** 2 + module.norms[1] ** 2 for module in self.modules])
        chosen = np.array([module.verdict.name == verdict for module in self.modules])
        return float(energies[chosen].sum() / energies.sum()) if energies.sum() else 0.0

    def to_dict(self, labels: Sequence[str]) -> dict[str, Any]:
        """Plain JSON values; ``labels`` of the pool's adapters in their order."""
        counts: dict[str, int] = {}
        for module in self.modules:
            counts[module.verdict.name] = counts.get(module.verdict.name, 0) + 1
        return {
            "adapters": [labels[self.first], labels[self.second]],
            "verdict": self.verdict,
            "risk": self.risk,
            "mean_overlap": self.mean_overlap,
            "frobenius_ratio": _finite(self.frobenius_ratio),
            "cosine": self.cosine,
            "verdicts": counts,
            "modules": [module.to_dict() for module in self.modules],
        }


def compare(
    name: str,
    first: Decomposed,
    second: Decomposed,
    products: tuple[np.ndarray, np.ndarray],
    thresholds: Thresholds,
    energy: float = ENERGY,
) -> ModulePair:
    """Measure two decomposed updates of one module, and judge them; ``products``: of their inputs and outputs."""
    ranks = tuple(max(energy_rank(update.sigma, energy), 1) for update in (first, second))
    inputs, outputs = products
    # ⟨u_i v_iᵀ, ΔW_b⟩ of a's singular directions, and of b's with ΔW_a.
    along = (outputs * inputs) @ second.sigma, first.sigma @ (outputs * inputs)
    cosines = principal_cosines(outputs[: ranks[0], : ranks[1]])
    agreement = _cosine_of(along[0][: ranks[0]], first.sigma[: ranks[0]])
    norms, largest = (first.norm, second.norm), (float(first.sigma[0]), float(second.sigma[0]))
    ratios = {"frobenius_ratio": _ratio(norms), "magnitude_ratio": _ratio(largest)}
    return ModulePair(
        name=name,
        ranks=(first.rank, second.rank),
        energy_ranks=(ranks[0], ranks[1]),
        norms=norms,
        largest=largest,
        stable_ranks=(first.stable_rank, second.stable_rank),
        cosines=tuple(cosines.tolist()),
        mean_input_overlap=float(principal_cosines(inputs[: ranks[0], : ranks[1]]).mean()),
        agreement=agreement,
        agreement_back=_cosine_of(along[1][: ranks[1]], second.sigma[: ranks[1]]),
        cosine=_cosine(float(first.sigma @ along[0]), *norms),
        random=random_overlap(ranks[0], ranks[1], first.shape[2]),
        verdict=verdict_of(float(cosines.mean()), agreement, ratios, thresholds),
    )


def _cosine_of(first: np.ndarray, second: np.ndarray) -> float:
    return _cosine(float(first @ second), sqrt(first @ first), sqrt(second @ second))


def _cosine(product: float, *norms: float) -> float:
    """0 where either norm is nothing."""
    return product / (norms[0] * norms[1]) if min(norms) > NOTHING else 0.0


def _ratio(values: tuple[float, float]) -> float:
    """The larger over the smaller; 1 of two that are nothing."""
    if min(values) > NOTHING:
        return max(values) / min(values)
    return inf if max(values) > NOTHING else 1.0


def _bounded(values: tuple[float, float]) -> float:
    """The smaller over the larger, in [0, 1]; 0 where either is nothing."""
    return min(values) / max(values) if min(values) > NOTHING else 0.0


def _log_ratio(values: tuple[float, float]) -> float | None:
    """log a − log b; None where either is nothing."""
    return log(values[0]) - log(values[1]) if min(values) > NOTHING else None


def _finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if value < inf else None
