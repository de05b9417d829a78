"""Which checkpoints, penalty and power average best on held-out rows, and what choosing on them hides.

The chosen average's loss on the rows that chose it is too low. A nested split says by how much: in each of five parts
the setting is chosen on the other four and scored on the fifth. Rows are scored once for every setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.training.average_weights import AverageOptions
from mlx_rsgwm.training.averaging import Weighted, mean_weights, weigh
from mlx_rsgwm.training.losses import row_nats
from mlx_rsgwm.training.run_checkpoints import RunCheckpoint

PARTS = 5
LAST = (3, 5, 10)  # newest checkpoints that are tried, with all of them
PENALTIES = (0.5, 0.7, 0.9, 1.0)
POWERS = (0.0, 1.0)


@dataclass(frozen=True)
class Choice:
    """The setting of least loss on the rows, in nats per trained token.

    ``loss`` on the rows that chose it; ``nested`` of settings chosen on other rows; ``uniform`` of the plain mean of
    all checkpoints and ``newest`` of the newest alone, on the same rows.
    """

    options: AverageOptions
    loss: float
    nested: float
    uniform: float
    newest: float
    settings: int
    rows: int

    @property
    def optimism(self) -> float:
        """By how much the loss on the choosing rows is too low."""
        return self.nested - self.loss

    @property
    def warning(self) -> str:
        """Where averaging gains nothing over the newest checkpoint, that it does not; else empty."""
        if self.nested < self.newest:
            return ""
        return (
            f"warning: the newest checkpoint alone is no worse: loss {self.newest:.4f} on these rows, the average's "
            f"{self.nested:.4f} where other rows chose it"
        )

    def describe(self) -> dict[str, Any]:
        """JSON object."""
        names = ("loss", "nested", "optimism", "uniform", "newest", "settings", "rows")
        chosen = {name: getattr(self.options, name) for name in ("last", "penalty", "power")}
        return {**chosen, **{name: getattr(self, name) for name in names}}


def candidates(checkpoints: int, options: AverageOptions, fixed: Sequence[str] = ()) -> list[AverageOptions]:
    """Settings that are tried: every combination of those that ``fixed`` does not name."""
    grid: dict[str, list[Any]] = {
        "last": [*(last for last in LAST if last < checkpoints), 0],
        "penalty": list(PENALTIES),
        "power": list(POWERS),
    }
    grid = {name: [getattr(options, name)] if name in fixed else values for name, values in grid.items()}
    return [replace(options, **dict(zip(grid, values, strict=True))) for values in product(*grid.values())]


def choose(
    base: Base,
    checkpoints: Sequence[RunCheckpoint],
    rows: Sequence[TokenRow],
    options: AverageOptions,
    fixed: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> Choice:
    """Try the settings of :func:`candidates` on ``rows``; ``seed`` deals the rows to the parts of the nested split.

    Raises:
        RsgwmError: fewer rows than parts; what :func:`~mlx_rsgwm.training.averaging.weigh` raises.
    """
    if len(rows) < PARTS:
        raise RsgwmError(f"too few held-out rows to choose by ({len(rows)}); a nested split takes {PARTS} or more")
    tried = candidates(len(checkpoints), options, fixed)
    weights = [np.zeros(len(checkpoints)) for _ in range(2 + len(tried))]
    weights[0][-1] = 1.0
    weights[1][:] = 1 / len(checkpoints)
    for column, setting in zip(weights[2:], tried, strict=True):
        weighted = weigh(checkpoints, setting)
        column[-len(weighted.checkpoints) :] = weighted.weights
    nats, counts = _scored(base, checkpoints, weights, rows, options, batch_size, progress)
    return _chosen(tried, nats, counts, seed)


def _scored(
    base: Base,
    checkpoints: Sequence[RunCheckpoint],
    weights: Sequence[np.ndarray],
    rows: Sequence[TokenRow],
    options: AverageOptions,
    batch_size: int,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats (settings, rows) of the averages by ``weights``, equal ones once, and trained tokens (rows,)."""
    known: dict[bytes, np.ndarray] = {}
    counts = np.zeros(len(rows), dtype=np.int64)
    slots = AdapterSlots(base)
    with progress.task("choose", len(weights)) as advance:
        for column in weights:
            if column.tobytes() not in known:
                taken = [place for place, weight in enumerate(column) if weight]
                weighted = Weighted(tuple(checkpoints[place] for place in taken), column[taken], options.metric)
                slots.load("average", mean_weights(weighted, options))
                with slots.using("average"):
                    known[column.tobytes()], counts = row_nats(slots.model, rows, batch_size)
            advance(1, "")
    return np.stack([known[column.tobytes()] for column in weights]), counts


def _chosen(tried: Sequence[AverageOptions], nats: np.ndarray, counts: np.ndarray, seed: int) -> Choice:
    """By nats of the newest, the uniform mean and the settings ``tried``, (2 + settings, rows)."""
    total = counts.sum()
    of_settings = nats[2:]
    best = int(of_settings.sum(axis=1).argmin())
    losses = nats.sum(axis=1) / total
    return Choice(
        tried[best],
        float(losses[2 + best]),
        float(nested_nats(of_settings, seed) / total),
        float(losses[1]),
        float(losses[0]),
        len(tried),
        len(counts),
    )


def nested_nats(nats: np.ndarray, seed: int) -> float:
    """Nats of rows under settings that other rows chose, of ``nats`` (settings, rows); ``seed`` deals five parts."""
    rows = np.arange(nats.shape[1])
    nested = 0.0
    for part in np.array_split(np.random.default_rng(seed).permutation(len(rows)), PARTS):
        others = np.setdiff1d(rows, part)
        nested += float(nats[nats[:, others].sum(axis=1).argmin(), part].sum())
    return nested
