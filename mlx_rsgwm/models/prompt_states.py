"""What the lower layers of a bare base make of a prompt: the mean of its tokens' hidden states, which no adapter
changes. Routers choose by it, and training keeps where a task's prompts lie (:mod:`~.prompt_statistics`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.slots import unwrap
from mlx_rsgwm.models.split import split_blocks

DEPTH = 0.25  # of the layers, where a prompt's state is taken; deeper ones cost more and told no more apart
BATCH_ROWS = 16


def depth_of(base: Base) -> int:
    """The number of layers after which states are taken: a quarter of them, at least one."""
    model: Any = base.model
    return max(1, round(DEPTH * len(model.layers)))


def prompt_states(base: Base, prompts: Sequence[Sequence[int]], layer: int) -> np.ndarray:
    """Mean hidden state of each prompt's tokens after ``layer`` layers of the bare base, (prompts, dims) float64.

    Raises:
        RsgwmError: the model's layers cannot be reached one by one, or there are not so many.
    """
    unwrap(base.model)
    return StateReader(base, layer).states(prompts)


class StateReader:
    """Reads prompts with the first ``layer`` layers of a base, ``batch_rows`` at a time; no adapter may be active.

    Raises:
        RsgwmError: as :func:`prompt_states`.
    """

    def __init__(self, base: Base, layer: int, batch_rows: int = BATCH_ROWS) -> None:
        blocks = split_blocks(base.model)
        if blocks is None:
            raise RsgwmError("the layers of this base cannot be reached one by one, so it has no states to route by")
        if not 0 < layer <= len(blocks):
            raise RsgwmError(f"layer must be in [1, {len(blocks)}], found {layer}")
        self._blocks = blocks[:layer]
        self._batch_rows = batch_rows

    def states(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """(prompts, dims) float64; prompts of like lengths are read together."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        read: dict[int, np.ndarray] = {}
        for start in range(0, len(order), self._batch_rows):
            indices = order[start : start + self._batch_rows]
            lengths = mx.array([len(prompts[index]) for index in indices])
            longest = len(prompts[indices[-1]])
            ids = mx.array([[*prompts[index], *[0] * (longest - len(prompts[index]))] for index in indices])
            states = ids
            for block in self._blocks:
                states = block(states)
            # What pads a prompt comes after it, and no earlier token sees it.
            inside = (mx.arange(longest)[None] < lengths[:, None]).astype(mx.float32)[..., None]
            means = (states.astype(mx.float32) * inside).sum(axis=1) / lengths[:, None]
            read.update(zip(indices, np.array(means).astype(np.float64), strict=True))
        return np.stack([read[index] for index in range(len(prompts))])
