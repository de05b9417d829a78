"""Losses of a base with an adapter once the sum of both is stored in few bits, without storing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.quantisation import QuantFormat
from mlx_rsgwm.models.rounded_weights import rounded_weights
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.losses import row_nats


@contextmanager
def rounded_sum(base: Base, adapter: Adapter, quant: QuantFormat | None) -> Iterator[Any]:
    """The model of ``base`` and ``adapter`` with every weight rounded to ``quant``; with None, as they are in floats.

    Raises:
        AdapterError: the adapter does not fit the base.
        RsgwmError: the base is quantised already, or the format does not fit its layers.
    """
    modules = fitting_modules(base, adapter)
    weights = {name: value.astype(mx.float32) for name, value in adapter.weights.items()}
    spec = replace(adapter.spec, dropout=0.0)
    with adapted(base.model, modules, spec, weights), rounded_weights(base.model, quant):
        yield base.model


def rounded_nats(
    base: Base, adapter: Adapter, quant: QuantFormat | None, rows: Sequence[TokenRow], batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and trained tokens of every row, (rows,) float64 and int64, under :func:`rounded_sum`."""
    with rounded_sum(base, adapter, quant) as model:
        return row_nats(model, rows, batch_size)
