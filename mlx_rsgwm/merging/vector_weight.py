"""Choosing λ of a quantization vector on rows of the receiver, after which the result is no longer zero-shot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.merging.quantisation_vector import stacked, vector_format
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.training.average_choice import PARTS, nested_nats
from mlx_rsgwm.training.rounded_losses import rounded_nats

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class WeightChoice:
    """The λ of least loss of the rounded model, in nats per trained token, and the ``losses`` of all that were tried.

    ``nested``: of λ chosen on other rows; what it is above ``loss`` is what choosing hides.
    """

    weight: float
    loss: float
    nested: float
    losses: dict[str, float]
    rows: int

    def describe(self) -> dict[str, Any]:
        """JSON object."""
        return {**asdict(self), "optimism": self.nested - self.loss}


def choose_weight(
    base: Base,
    receiver: Adapter,
    vector: Adapter,
    rows: Sequence[TokenRow],
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> WeightChoice:
    """Try :data:`WEIGHTS` on ``rows``, in the vector's format; ``seed`` deals them to the parts of a nested split.

    Raises:
        RsgwmError: fewer rows than parts, a vector that is none, a base that cannot be rounded.
    """
    if len(rows) < PARTS:
        raise RsgwmError(f"{len(rows)} rows are too few to choose by; a nested split takes {PARTS} or more")
    quant, tried = vector_format(vector), []
    counts = np.zeros(0)
    with progress.task("choose", len(WEIGHTS)) as advance:
        for weight in WEIGHTS:
            patched = stacked([(receiver, 1.0), (vector, weight)])
            patched.manifest = {"base": receiver.manifest.get("base")}
            nats, counts = rounded_nats(base, patched, quant, rows, batch_size)
            tried.append(nats)
            advance(1, f"λ {weight:g}")
    stacked_nats, total = np.stack(tried), counts.sum()
    losses = stacked_nats.sum(axis=1) / total
    return WeightChoice(
        WEIGHTS[int(losses.argmin())],
        float(losses.min()),
        nested_nats(stacked_nats, seed) / float(total),
        {f"{weight:g}": float(loss) for weight, loss in zip(WEIGHTS, losses, strict=True)},
        len(rows),
    )
