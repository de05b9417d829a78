"""One adapter by its spectra: how much of its rank it uses, and where that is worth a word.

After gradience 0.11 (``audit/lora_audit.py``), whose singular values are of the factors without the adapter's scale;
here the scale is in them, which no ratio of them notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.linalg.spectrum import Decomposed, Spectrum, effective_rank, energy_rank

SHARES = (0.90, 0.95, 0.99)

# Flags of an adapter (gradience, audit/qa_artifact.py).
LOW_UTILISATION = 0.25
HIGH_WASTE = 0.75
CONCENTRATED_RANK, CONCENTRATED_FROM = 2, 8
UNDERUTILISED = 0.2


@dataclass(frozen=True)
class ModuleSpectrum(Spectrum):
    """The spectrum of one module's update, scale included."""

    name: str

    @property
    def effective_rank(self) -> float:
        """By the entropy of the singular values."""
        return effective_rank(self.sigma)

    @property
    def utilisation(self) -> float:
        """Stable rank over rank."""
        return self.stable_rank / self.rank

    def energy_rank(self, share: float) -> int:
        """The fewest singular values that have ``share`` of Σσ²."""
        return energy_rank(self.sigma, share)

    @property
    def parameters(self) -> int:
        """Entries of both factors."""
        rows, rank, columns = self.shape
        return rank * (rows + columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "norm": self.norm,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
            "utilisation": self.utilisation,
            **{f"energy_rank_{share:.0%}".rstrip("%"): self.energy_rank(share) for share in SHARES},
            "singular_values": self.sigma.tolist(),
        }


@dataclass(frozen=True)
class AdapterAudit:
    """An adapter's modules, and what they say together.

    ``label``: where it is; ``fingerprint``: what tells it from others, None for one that is only in memory.
    """

    label: str
    fingerprint: str | None
    rank: int
    modules: tuple[ModuleSpectrum, ...]

    @property
    def norm(self) -> float:
        """‖·‖_F over all modules."""
        return float(np.sqrt(sum(module.norm**2 for module in self.modules)))

    @property
    def stable_rank_mean(self) -> float:
        """Mean over modules."""
        return float(np.mean([module.stable_rank for module in self.modules]))

    @property
    def utilisation_mean(self) -> float:
        """Mean over modules of stable rank over rank."""
        return float(np.mean([module.utilisation for module in self.modules]))

    @property
    def waste(self) -> float:
        """1 − mean utilisation."""
        return 1.0 - self.utilisation_mean

    def energy_rank_quantile(self, share: float, quantile: float) -> float:
        """Quantile over modules, interpolated, of the fewest singular values with ``share`` of the energy."""
        return float(np.quantile([module.energy_rank(share) for module in self.modules], quantile))

    @property
    def flags(self) -> list[str]:
        """Names of what is worth a word."""
        concentrated = self.energy_rank_quantile(0.90, 0.5) <= CONCENTRATED_RANK and self.rank >= CONCENTRATED_FROM
        flags = {
            "low_utilisation": self.utilisation_mean < LOW_UTILISATION,
            "high_rank_waste": self.waste > HIGH_WASTE,
            "concentrated_spectrum": concentrated,
            "underutilised_capacity": self.stable_rank_mean < UNDERUTILISED * self.rank,
        }
        return [name for name, holds in flags.items() if holds]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, its modules among them."""
        return {
            "adapter": self.label,
            "fingerprint": self.fingerprint,
            "rank": self.rank,
            "norm": self.norm,
            "stable_rank_mean": self.stable_rank_mean,
            "stable_rank_median": float(np.median([module.stable_rank for module in self.modules])),
            "stable_rank_weighted_mean": self._weighted_stable_rank(),
            "effective_rank_mean": float(np.mean([module.effective_rank for module in self.modules])),
            "utilisation_mean": self.utilisation_mean,
            "rank_waste": self.waste,
            "energy_rank_90_p50": self.energy_rank_quantile(0.90, 0.5),
            "energy_rank_90_p90": self.energy_rank_quantile(0.90, 0.9),
            "flags": self.flags,
            "modules": [module.to_dict() for module in self.modules],
        }

    def _weighted_stable_rank(self) -> float:
        """Mean over modules, weighted by their parameters."""
        weights = [module.parameters for module in self.modules]
        return float(np.average([module.stable_rank for module in self.modules], weights=weights))


def spectrum_of(name: str, update: Decomposed) -> ModuleSpectrum:
    """What is kept of a decomposed module once its vectors are no more needed."""
    return ModuleSpectrum(update.shape, update.sigma, name)


def audit_of(label: str, fingerprint: str | None, modules: Sequence[ModuleSpectrum]) -> AdapterAudit:
    """An adapter's audit; its rank is the highest of its modules."""
    return AdapterAudit(label, fingerprint, max(module.rank for module in modules), tuple(modules))
