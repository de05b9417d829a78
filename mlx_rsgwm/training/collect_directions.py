"""Directions for adapters that someone else trained, or from other rows: one pass over data, nothing is changed.

The base runs with the adapter on: deeper modules see what the adapter makes of the rows. What it writes is the file
that training keeps (:mod:`mlx_rsgwm.models.directions`), marked as collected.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.data.batching import TokenRow, make_batch, plan_epoch, tell_rows
from mlx_rsgwm.data.loading import load_data
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.data.unlabelled import Unlabelled, load_unlabelled
from mlx_rsgwm.models.adapter import DIRECTIONS_FILE, WEIGHTS_FILE, Adapter
from mlx_rsgwm.models.adapter_sidecars import put_beside
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.linux_cpu import lazily
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.directions import DirectionSums
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.loop import TrainingData
from mlx_rsgwm.training.memory import device_limit


def collect_directions(
    base: Base,
    adapter: Adapter,
    data: TrainingData,
    rank: int = TrainConfig.directions,
    batch_size: int = 8,
    max_tokens: int = 1024,
    rows: int = 0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """What ``directions.safetensors`` holds of ``adapter`` over all tokens of ``data``: arrays and metadata.

    ``rank`` is k of the sketches, 0 for whole matrices. ``rows`` above 0 takes that many, drawn by ``seed``.

    Raises:
        AdapterError: the adapter does not fit ``base``.
        RsgwmError: the data gives no rows, or fewer tokens than k; the sums do not fit into memory; a value that is
            not finite.
    """
    modules = fitting_modules(base, adapter)
    fitting, dropped = data.token_rows(base.tokenizer, max_tokens, "drop")
    tell_rows(fitting, dropped, max_tokens, progress)
    chosen = draw_rows(fitting, rows, seed)
    plan = plan_epoch(chosen, batch_size, seed=0, epoch=0)
    weights = {name: value.astype(mx.float32) for name, value in adapter.weights.items()}
    model: Any = base.model
    with ExitStack() as stack:
        stack.enter_context(adapted(model, modules, replace(adapter.spec, dropout=0.0), weights))
        sums = DirectionSums(model, modules, {row.role for row in chosen}, rank, every=1)
        _check(sums, adapter, list(modules), base)
        hidden, head = split_head(model)
        stack.enter_context(sums.watching())
        advance = stack.enter_context(progress.task("directions", len(plan)))
        model.eval()
        for indices in plan:
            batch_rows = [chosen[index] for index in indices]
            batch = make_batch(batch_rows)
            sums.start(batch_rows, batch.inputs.shape[1], indices)
            with lazily():
                states = hidden(batch.inputs)
                head(states.reshape(-1, states.shape[-1])[batch.positions])  # never computed; its input is looked at
            sums.add(sums.end())
            sums.count(batch_rows, indices)
            mx.eval(sums.totals)
            advance(1, f"{sum(sums.rows.values())} rows")
    arrays = sums.arrays()
    _check_values(arrays, sums, adapter)
    labelled = "questions without answers or plain text" if isinstance(data, Unlabelled) else "labelled rows"
    source = f"collected, adapter on, {labelled}"
    return arrays, {**sums.metadata(), "data_hash": data.hash, "source": source}


def load_rows(corpus: Path, adapter: Adapter) -> TrainingData:
    """The rows at ``corpus``; questions without answers in the words that ``adapter`` was trained with.

    Raises RsgwmError for what cannot be read.
    """
    described = adapter.manifest.get("template")
    template = Template.from_description(described) if described else None
    return load_unlabelled(corpus, template) or load_data(corpus, None)[0]


def save_directions(
    adapter: Adapter, base: Base, data: TrainingData, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> Path:
    """Put collected directions beside an adapter's weights: ``directions.safetensors``, then the manifest.

    See :func:`~mlx_rsgwm.models.adapter_sidecars.put_beside`.
    """
    folder = adapter.own_folder or Path()
    of_weights = (adapter.manifest.get("files") or {}).get(WEIGHTS_FILE) or files.sha256_file(folder / WEIGHTS_FILE)
    about = {**metadata, "weights_sha256": of_weights}
    entry = {name: text for name, text in metadata.items() if name != "shared"}
    return put_beside(
        adapter, DIRECTIONS_FILE, arrays, about, base.describe(), {"directions": {**entry, "data": data.describe()}}
    )


def draw_rows(rows: list[TokenRow], limit: int, seed: int) -> list[TokenRow]:
    """``limit`` of ``rows``, drawn by ``seed``; all where that is 0 or more than there are."""
    if not limit or limit >= len(rows):
        return rows
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))[:limit]]


def _check(sums: DirectionSums, adapter: Adapter, modules: list[str], base: Base) -> None:
    """Raise where a module is never used, or where the sums do not fit into memory."""
    unused = [f"{name} is never used" for name in modules if name not in sums.owners]
    raise_problems(f"{adapter.where} on {base.name}", unused)
    limit, source = device_limit()
    if 2 * sums.nbytes > limit:
        advice = "leave --full out" if not sums.rank else "set --directions lower"
        raise RsgwmError(
            f"{adapter.where}: its directions take {2 * sums.nbytes / 1e9:.0f} GB and {source} is {limit / 1e9:.0f} "
            f"GB; {advice}"
        )


def _check_values(arrays: Mapping[str, mx.array], sums: DirectionSums, adapter: Adapter) -> None:
    """Raise where an input was not finite, or where a role has fewer tokens than a sketch has columns."""
    finite = {name: mx.all(mx.isfinite(mean)) for name, mean in arrays.items()}
    mx.eval(dict(arrays), finite)
    problems = [f"the inputs of {name} are not finite" for name, ok in finite.items() if not ok.item()]
    problems += [
        f"the {role} rows have {sums.tokens[f'{role}/states']} tokens, too few for k = {sums.rank}; take more rows"
        for role in sums.rows
        if sums.tokens[f"{role}/states"] < sums.rank
    ]
    raise_problems(f"directions of {adapter.where}", problems)
