"""Importance for adapters that someone else trained: one pass of squared gradients over data, nothing is changed.

The optimiser's moments of such an adapter are gone. What can still be had is how steep the loss is at its weights:
s = sqrt(mean over batches of g²), the root of the empirical Fisher's diagonal, at batch gradients. It is marked as
such, for it is not what training leaves (an average over the way there).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_rsgwm.core.errors import AdapterError, RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.batching import Batch, make_batch, plan_epoch, tell_rows
from mlx_rsgwm.models.adapter import IMPORTANCE_FILE, SIGNALS, Adapter, LoraSpec
from mlx_rsgwm.models.adapter_sidecars import put_beside
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.linux_cpu import lazily
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.loop import TrainingData
from mlx_rsgwm.training.losses import batch_loss

SOURCE = "collected after training: root mean square of batch gradients at the final weights"


def collect_importance(
    base: Base,
    adapter: Adapter,
    data: TrainingData,
    batch_size: int = 8,
    max_tokens: int = 1024,
    progress: Progress = SILENT,
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Importance arrays (``{signal}/{parameter}``, float32) of ``adapter`` on ``data``, and their metadata.

    Dropout is off; the base model is left as it was found.

    Raises:
        AdapterError: the adapter does not fit ``base``.
        RsgwmError: the data gives no rows, or a gradient that is not finite (names the rows).
    """
    modules = fitting_modules(base, adapter)
    rows, dropped = data.token_rows(base.tokenizer, max_tokens, "drop")
    tell_rows(rows, dropped, max_tokens, progress)
    plan = plan_epoch(rows, batch_size, seed=0, epoch=0)
    spec = LoraSpec(
        adapter.spec.rank,
        adapter.spec.scale,
        0.0,
        adapter.spec.keys,
        adapter.spec.num_layers,
        adapter.spec.fine_tune_type,
    )
    weights = {name: value.astype(mx.float32) for name, value in adapter.weights.items()}
    sums: dict[str, dict[str, mx.array]] = {signal: {} for signal in SIGNALS}
    batches = dict.fromkeys(SIGNALS, 0)
    model: Any = base.model
    with adapted(model, modules, spec, weights), progress.task("importance", len(plan)) as advance:
        hidden, head = split_head(model)

        def loss_of(_: Any, batch: Batch) -> mx.array:
            return batch_loss(hidden, head, batch)

        gradients_of = nn.value_and_grad(model, loss_of)
        model.eval()
        for indices in plan:
            batch = make_batch([rows[index] for index in indices])
            with lazily():
                loss, gradients = gradients_of(model, batch)
            flat: Any = tree_flatten(gradients)
            for signal in ("all", batch.role):
                batches[signal] += 1
                for name, gradient in flat:
                    square = mx.square(gradient.astype(mx.float32))
                    sums[signal][name] = sums[signal][name] + square if name in sums[signal] else square
            mx.eval(loss, sums)
            if not mx.isfinite(loss).item():
                raise RsgwmError(f"the loss is not finite on rows {', '.join(rows[index].id for index in indices)}")
            advance(1, f"{batch.role} loss {loss.item():.3f}")
    arrays = {
        f"{signal}/{name}": mx.sqrt(sums[signal][name] / batches[signal])
        for signal in SIGNALS
        if batches[signal]
        for name in adapter.weights
    }
    mx.eval(arrays)
    metadata = {"source": SOURCE, "batch_size": str(batch_size)}
    metadata |= {f"steps/{signal}": str(count) for signal, count in batches.items()}
    return arrays, metadata


def save_importance(
    adapter: Adapter, base: Base, data: TrainingData, arrays: dict[str, mx.array], metadata: dict[str, str]
) -> Path:
    """Put collected importance beside an adapter's weights: ``importance.safetensors``, then the manifest.

    Weights and config are not touched. An adapter without a manifest gets one of kind ``imported``.
    """
    folder = adapter.path
    assert folder is not None
    checked = Adapter(adapter.spec, adapter.weights, arrays, metadata, adapter.init, adapter.manifest, folder)
    raise_problems(str(folder), checked.problems(), AdapterError)
    entry = {**metadata, "collected": True, "data": data.describe()}
    return put_beside(adapter, IMPORTANCE_FILE, arrays, metadata, base.describe(), {"importance": entry})
