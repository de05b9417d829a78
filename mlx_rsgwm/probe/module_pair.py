"""What two adapters do to one module, from their factors: the audit's numbers, and what other measures are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np

from mlx_rsgwm.audit.pair_audit import ENERGY, ModulePair, compare
from mlx_rsgwm.audit.verdicts import PRESETS
from mlx_rsgwm.linalg.spectrum import NEGLIGIBLE, Decomposed, Decompositions

TOP = 10  # directions of a subspace, at most
LARGEST_SINGULAR_VALUES = 100
# Entries of an update that signs are counted in, about, at most; of a larger one in rows and columns that are drawn.
ENTRIES = 1 << 15


@dataclass(frozen=True)
class ModuleMeasures:
    """Two adapters in one module. ``pair``: the audit's measures.

    ``subspaces``: singular_value_overlap, left_subspace_overlap, the right ones and the interactions, by their names of
    the table. ``output_cos2``, ``input_cos2``: mean squared cosine between the subspaces that hold 90 % of the energy.
    ``opposed``, ``common``: Σ min(|a|, |b|) over the entries whose signs differ, and over all.
    """

    pair: ModulePair
    subspaces: Mapping[str, float]
    output_cos2: float
    input_cos2: float
    opposed: float
    common: float

    @property
    def dot(self) -> float:
        """⟨ΔW_a, ΔW_b⟩."""
        return self.pair.cosine * self.pair.norms[0] * self.pair.norms[1]

    @property
    def energy(self) -> float:
        """‖ΔW_a‖² + ‖ΔW_b‖²."""
        return self.pair.norms[0] ** 2 + self.pair.norms[1] ** 2


def measure_module(
    name: str, together: Decompositions, places: tuple[int, int], entries: tuple[np.ndarray, np.ndarray]
) -> ModuleMeasures:
    """Measure two of the decomposed updates of one module; both change it.

    Args:
        name: the module's.
        together: all updates of the module.
        places: of the two in it.
        entries: of both, the same ones, (rows, columns) as :func:`some_entries` gives them.
    """
    first, second = (together.updates[place] for place in places)
    products = together.products(*places)
    inputs, outputs = products
    pair = compare(name, first, second, products, PRESETS["post"], ENERGY)
    cut = np.s_[: pair.energy_ranks[0], : pair.energy_ranks[1]]
    fewest = min(pair.energy_ranks)
    opposed, common = opposed_and_common(*entries)
    return ModuleMeasures(
        pair,
        subspace_measures(first, second, inputs, outputs),
        float(np.square(outputs[cut]).sum() / fewest),
        float(np.square(inputs[cut]).sum() / fewest),
        opposed,
        common,
    )


def subspace_measures(
    first: Decomposed, second: Decomposed, inputs: np.ndarray, outputs: np.ndarray
) -> dict[str, float]:
    """The six of the fingerprints that are means over modules, of two updates that are not zero.

    Args:
        first: an update.
        second: another one of the same module.
        inputs: products (k_first, k_second) of their input directions.
        outputs: the same of their output directions.

    ``k`` is 10 or the lower rank. The last directions are the last with a singular value: beyond them lies the null
    space, which says nothing of an update (the source's code takes them from there).
    """
    ranks = (_nonzero(first.sigma), _nonzero(second.sigma))
    k = min(TOP, *ranks)
    top = float(np.square(inputs[:k, :k]).sum())
    bottom = float(np.square(inputs[ranks[0] - k : ranks[0], ranks[1] - k : ranks[1]]).sum())
    return {
        "singular_value_overlap": _cosine(
            first.sigma[:LARGEST_SINGULAR_VALUES], second.sigma[:LARGEST_SINGULAR_VALUES]
        ),
        "left_subspace_overlap": sqrt(float(np.square(outputs[:k, :k]).sum())) / k,  # over k, the right ones over √k
        "right_subspace_overlap_top": sqrt(top / k),
        "right_subspace_overlap_bottom": sqrt(bottom / k),
        "interaction_top": top / k,
        "interaction_bottom": bottom / k,
    }


def opposed_and_common(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Σ min(|a|, |b|) over the entries whose signs differ, and over all, of two arrays of one shape."""
    # ½(|a + b| − |a − b|) is min(|a|, |b|) with the sign of a·b.
    signed = np.abs(first + second)
    signed -= np.abs(first - second)
    total, common = float(signed.sum(dtype=np.float64)), float(np.abs(signed).sum(dtype=np.float64))
    return (common - total) / 4, common / 2


def some_entries(a: np.ndarray, b: np.ndarray, seed: int = 42) -> np.ndarray:
    """Entries of a @ b, a (in, r) and b (r, out), at most about 2¹⁵: all of a small update, else those of rows and
    columns that depend on the shape alone, so that they are the same of two adapters. (rows, columns) float32.
    """
    rows, columns = a.shape[0], b.shape[1]
    share = sqrt(min(1.0, ENTRIES / (rows * columns)))
    if share < 1:
        rng = np.random.default_rng((seed, rows, columns))
        a = a[rng.choice(rows, ceil(share * rows), replace=False)]
        b = b[:, rng.choice(columns, ceil(share * columns), replace=False)]
    product: np.ndarray = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)  # half the time of a pair
    return product


def _nonzero(sigma: np.ndarray) -> int:
    return int((sigma > NEGLIGIBLE * sigma[0]).sum())


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of two spectra; the shorter goes on with zeros."""
    length = min(len(first), len(second))
    return float(first[:length] @ second[:length] / np.sqrt((first @ first) * (second @ second)))
