"""The measures of a pair of adapters: one name each, where it comes from, and what it needs beside the weights.

The 28 of the fingerprints (arXiv 2601.22285), the signals of MergeProbe (arXiv 2606.19549) and those of the audit
stand in one table. A measure of modules becomes four of the pair: median, least and largest over the modules, and their
mean weighted by both updates' energy, as ``sign_disagreement.median``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

FINGERPRINTS, MERGEPROBE, AUDIT = "arXiv 2601.22285", "arXiv 2606.19549", "rsgwm audit"
# What a measure needs: weights alone; what training left beside them, in both and of one initialisation; data.
WEIGHTS, SIGNALS, DATA = "weights", "signals", "data"
OVER_MODULES = ("median", "min", "max", "mean")


@dataclass(frozen=True)
class Measure:
    """``source``: where it is defined; ``needs``: weights, signals or data; ``text``: what it is; ``by_module``: it is
    measured in every module and has four values."""

    source: str
    needs: str
    text: str
    by_module: bool = False

    def names(self, name: str) -> list[str]:
        """The columns of the table that it fills."""
        return [f"{name}.{over}" for over in OVER_MODULES] if self.by_module else [name]


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        # The 28: five of the updates as vectors over the modules that both adapt.
        "task_vector_cosine": Measure(FINGERPRINTS, WEIGHTS, "cosine of the updates"),
        "task_vector_l2": Measure(FINGERPRINTS, WEIGHTS, "distance of the updates"),
        "task_vector_dot": Measure(FINGERPRINTS, WEIGHTS, "inner product of the updates"),
        "task_vector_angle": Measure(FINGERPRINTS, WEIGHTS, "angle between the updates in degrees"),
        "task_vector_norm_ratio": Measure(FINGERPRINTS, WEIGHTS, "smaller norm over larger"),
        # Seven of the singular values of both stacked as two rows.
        "stack_effective_rank": Measure(FINGERPRINTS, WEIGHTS, "exp of the entropy of σ/Σσ"),
        "stack_effective_rank_score": Measure(FINGERPRINTS, WEIGHTS, "2 − effective rank, in [0, 1]"),
        "stack_stable_rank": Measure(FINGERPRINTS, WEIGHTS, "(Σσ)²/Σσ², not the usual stable rank"),
        "stack_spectral_gap": Measure(FINGERPRINTS, WEIGHTS, "(σ₁ − σ₂)/σ₁"),
        "stack_singular_ratio": Measure(FINGERPRINTS, WEIGHTS, "σ₂/σ₁"),
        "layer_effective_rank": Measure(FINGERPRINTS, WEIGHTS, "effective rank by module, weighted by ‖a‖ + ‖b‖"),
        "layer_effective_rank_score": Measure(FINGERPRINTS, WEIGHTS, "2 − that, in [0, 1]"),
        # Six of the subspaces, means over modules.
        "singular_value_overlap": Measure(FINGERPRINTS, WEIGHTS, "cosine of the 100 largest σ/Σσ"),
        "left_subspace_overlap": Measure(FINGERPRINTS, WEIGHTS, "‖U₁ᵀU₂‖/k of k output directions"),
        "right_subspace_overlap_top": Measure(FINGERPRINTS, WEIGHTS, "‖V₁V₂ᵀ‖/√k of the k first input directions"),
        "right_subspace_overlap_bottom": Measure(FINGERPRINTS, WEIGHTS, "the same of the k last within the rank"),
        "interaction_top": Measure(FINGERPRINTS, WEIGHTS, "mean σ² of V₁V₂ᵀ of the k first"),
        "interaction_bottom": Measure(FINGERPRINTS, WEIGHTS, "mean σ² of V₁V₂ᵀ of the k last within the rank"),
        # Ten on data: four of the last block's mean state on the shared rows, six of gradients on each one's own task.
        "activation_l2": Measure(FINGERPRINTS, DATA, "distance of the mean states"),
        "activation_cosine": Measure(FINGERPRINTS, DATA, "cosine of the mean states"),
        "activation_norm_ratio": Measure(FINGERPRINTS, DATA, "smaller norm of them over larger"),
        "activation_dot": Measure(FINGERPRINTS, DATA, "inner product of the mean states"),
        "gradient_cosine": Measure(FINGERPRINTS, DATA, "cosine of the gradients of the adapted weights"),
        "gradient_l2": Measure(FINGERPRINTS, DATA, "distance of them"),
        "gradient_dot": Measure(FINGERPRINTS, DATA, "inner product of them"),
        "input_gradient_cosine": Measure(FINGERPRINTS, DATA, "cosine of the gradients of the embedding"),
        "input_gradient_l2": Measure(FINGERPRINTS, DATA, "distance of them"),
        "input_gradient_dot": Measure(FINGERPRINTS, DATA, "inner product of them"),
        # MergeProbe's.
        "update_cosine": Measure(MERGEPROBE, WEIGHTS, "cosine of the updates", True),
        "log_norm_ratio": Measure(MERGEPROBE, WEIGHTS, "|log of the norms' ratio|", True),
        "output_cos2": Measure(MERGEPROBE, WEIGHTS, "mean cos² between output subspaces", True),
        "input_cos2": Measure(MERGEPROBE, WEIGHTS, "mean cos² between input subspaces", True),
        "sign_disagreement": Measure(MERGEPROBE, WEIGHTS, "Σ min(|a|, |b|) where signs differ, of all", True),
        "overamplification": Measure(MERGEPROBE, WEIGHTS, "‖a + b‖/√(‖a‖² + ‖b‖²)", True),
        "overamplification_squared": Measure(MERGEPROBE, WEIGHTS, "its square", True),
        "fisher_overlap": Measure(MERGEPROBE, SIGNALS, "Σ√(F_a F_b)/√(ΣF_a ΣF_b), F from importance"),
        "training_gradient_cosine": Measure(MERGEPROBE, SIGNALS, "cosine of the mean gradients of training so far"),
        "shared_gradient_cosine": Measure(MERGEPROBE, DATA, "cosine of the gradients on the shared rows", True),
        "cross_gradient": Measure(MERGEPROBE, DATA, "cos(ΔW, −g of the other's task), mean of both ways", True),
        "cross_gradient_worst": Measure(MERGEPROBE, DATA, "the lesser of both ways, of all modules together"),
        "activation_shift": Measure(MERGEPROBE, DATA, "‖h − h₀‖/‖h₀‖, mean over blocks and both"),
        "activation_shift_gap": Measure(MERGEPROBE, DATA, "|log of their ratio|"),
        "shift_cosine": Measure(MERGEPROBE, DATA, "cosine of the shifts, by block", True),
        "cka": Measure(MERGEPROBE, DATA, "linear CKA of the states, by block", True),
        # The audit's.
        "audit_overlap": Measure(AUDIT, WEIGHTS, "mean cosine between output subspaces, weighted by norm"),
        "audit_largest_overlap": Measure(AUDIT, WEIGHTS, "largest cosine in any module"),
        "audit_input_overlap": Measure(AUDIT, WEIGHTS, "mean cosine between input subspaces"),
        "audit_agreement": Measure(AUDIT, WEIGHTS, "directional agreement, both ways"),
        "audit_magnitude_ratio": Measure(AUDIT, WEIGHTS, "|log of the largest singular values' ratio|"),
        "audit_redundant": Measure(AUDIT, WEIGHTS, "share of the energy in modules that repeat each other"),
        "audit_imbalanced": Measure(AUDIT, WEIGHTS, "share of the energy in lopsided modules"),
        "audit_conflicting": Measure(AUDIT, WEIGHTS, "share of the energy in modules that oppose each other"),
        "audit_stable_rank": Measure(AUDIT, WEIGHTS, "mean stable rank"),
        "audit_utilisation": Measure(AUDIT, WEIGHTS, "mean stable rank over rank"),
    }
)


def columns(*needs: str) -> list[str]:
    """Names of the table's columns that need no more than what is named."""
    return [column for name, measure in MEASURES.items() if measure.needs in needs for column in measure.names(name)]


def over_modules(name: str, values: np.ndarray, energies: np.ndarray) -> Iterator[tuple[str, float]]:
    """The four columns of a measure from its value (n,) and both updates' energy (n,) in each of n modules."""
    mean = float(values @ energies / energies.sum()) if energies.sum() else float(values.mean())
    each = (float(np.median(values)), float(values.min()), float(values.max()), mean)
    yield from zip((f"{name}.{over}" for over in OVER_MODULES), each, strict=True)
